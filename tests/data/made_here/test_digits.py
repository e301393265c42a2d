import sys
from collections import Counter

import datasets
import numpy as np
import pytest

from updp_hf.data.made_here.digits import digits


@pytest.fixture(scope="module")
def splits():
    return digits()


def test_a_quarter_is_held_out(splits):
    assert {name: len(split) for name, split in splits.items()} == {"train": 1347, "test": 450}


def test_there_are_grey_images_and_named_labels(splits):
    label = datasets.ClassLabel(names=[*"0123456789"])
    for split in splits.values():
        assert split.features == datasets.Features({"image": datasets.Image(), "label": label})
        assert (split[0]["image"].size, split[0]["image"].mode) == ((8, 8), "L")


def test_the_whole_range_of_grey_is_used(splits):
    images = np.stack([np.asarray(image) for image in splits["test"]["image"]])
    assert (images.min(), images.max()) == (0, 255)


def test_each_class_is_held_out_by_a_quarter(splits):
    train, test = (Counter(splits[name]["label"]) for name in ("train", "test"))
    assert all(abs(test[label] - (train[label] + test[label]) / 4) < 1 for label in range(10))


def test_the_seed_says_what_is_held_out(splits):
    assert digits(0)["test"]["label"] == splits["test"]["label"]
    assert digits(1)["test"]["label"] != splits["test"]["label"]


def test_without_scikit_learn_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'updp-hf\[recipes\]'"):
        digits()
