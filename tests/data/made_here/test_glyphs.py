import hashlib
import os
import random
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from datasets.exceptions import DatasetGenerationError

from updp_hf.data.made_here import glyphs as module
from updp_hf.data.made_here.glyphs import CLASSES, fonts_of, glyphs

NUM_IMAGES = 5 * len(CLASSES)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def splits(cache):
    return glyphs(NUM_IMAGES, 32, cache_dir=cache)


def files(split):
    return [image["bytes"] for image in split.cast_column("image", datasets.Image(decode=False))["image"]]


def digest(splits):
    return {name: hashlib.sha256(b"".join(files(split))).hexdigest() for name, split in splits.items()}


class Rendered(list):
    """Render, and remember the arguments of each call."""

    def __init__(self, monkeypatch, fails_after=10**9):
        super().__init__()
        self.render, self.fails_after = module.render, fails_after
        monkeypatch.setattr(module, "render", self)

    def __call__(self, *args):
        if len(self) == self.fails_after:
            raise OSError("disk full")
        self.append(args)
        return self.render(*args)


# what is in a set


def test_a_fifth_is_held_out(splits):
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 4 * len(CLASSES),
        "test": len(CLASSES),
    }


def test_there_are_colour_images_and_named_labels(splits):
    label = datasets.ClassLabel(names=[*CLASSES])
    for split in splits.values():
        assert split.features == datasets.Features({"image": datasets.Image(), "label": label})
        assert {(image.size, image.mode) for image in split["image"]} == {((32, 32), "RGB")}


def test_the_set_tells_its_name_and_splits(splits):
    assert {(name, str(split.split), split.info.dataset_name) for name, split in splits.items()} == {
        (name, name, "glyphs") for name in ("train", "test")
    }


def test_every_class_has_equally_many_images(splits, cache):
    assert Counter(splits["train"]["label"]) == dict.fromkeys(range(len(CLASSES)), 4)
    assert Counter(splits["test"]["label"]) == dict.fromkeys(range(len(CLASSES)), 1)
    counts = Counter(glyphs(150, 16, cache_dir=cache)["train"]["label"]).values()
    assert max(counts) - min(counts) == 1


def test_no_image_is_there_twice(splits):
    assert len(set(files(splits["train"]) + files(splits["test"]))) == NUM_IMAGES


@pytest.mark.parametrize("resolution", [16, 21])
def test_images_have_the_resolution_asked_for(resolution, cache):
    for split in glyphs(5, resolution, cache_dir=cache).values():
        assert {image.size for image in split["image"]} == {(resolution, resolution)}


def test_held_out_fonts_are_not_trained_on(tmp_path, monkeypatch):
    assert not set(fonts_of("train")) & set(fonts_of("test"))
    rendered = Rendered(monkeypatch)
    glyphs(NUM_IMAGES, 16, cache_dir=tmp_path)
    fonts = [font for _, font, _, _ in rendered]
    assert set(fonts[: 4 * len(CLASSES)]) == set(fonts_of("train"))
    assert set(fonts[4 * len(CLASSES) :]) == set(fonts_of("test"))


# the same every time


def test_the_same_arguments_give_the_same_files(splits, tmp_path):
    assert digest(glyphs(NUM_IMAGES, 32, cache_dir=tmp_path)) == digest(splits)


def test_another_seed_gives_other_images(splits, cache):
    others = glyphs(NUM_IMAGES, 32, seed=1, cache_dir=cache)
    for name, split in splits.items():
        assert not set(files(others[name])) & set(files(split))


def test_a_larger_set_begins_with_the_smaller(splits, cache):
    for name, split in glyphs(50, 32, cache_dir=cache).items():
        assert files(split) == files(splits[name])[: len(split)]


def test_random_numbers_of_others_are_left_alone(tmp_path):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    glyphs(5, 16, cache_dir=tmp_path)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


# the cache


def test_a_set_is_made_once(splits, cache, monkeypatch):
    rendered = Rendered(monkeypatch)
    assert digest(glyphs(NUM_IMAGES, 32, cache_dir=cache)) == digest(splits)
    assert rendered == []


@pytest.mark.parametrize("change", [{"num_images": 11}, {"resolution": 17}, {"seed": 1}])
def test_another_set_is_not_taken_for_it(change, tmp_path, monkeypatch):
    arguments = {"num_images": 10, "resolution": 16, "seed": 0}
    glyphs(**arguments, cache_dir=tmp_path)
    rendered = Rendered(monkeypatch)
    glyphs(**{**arguments, **change}, cache_dir=tmp_path)
    assert len(rendered) >= 10 - 2  # two images of `test` are the same for 10 and 11


@pytest.mark.parametrize("made_by", [{"RENDERING": -1}, {"version": lambda library: "0.1"}])
def test_what_other_code_has_made_is_not_taken(made_by, tmp_path, monkeypatch):
    glyphs(10, 16, cache_dir=tmp_path)
    for name, value in made_by.items():
        monkeypatch.setattr(module, name, value)
    rendered = Rendered(monkeypatch)
    glyphs(10, 16, cache_dir=tmp_path)
    assert len(rendered) == 10


@pytest.mark.parametrize("fails_after", [3, 9])  # in either split
def test_a_set_that_was_not_finished_is_not_taken_for_whole(fails_after, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Rendered(patch, fails_after)
        with pytest.raises(DatasetGenerationError):
            glyphs(10, 16, cache_dir=tmp_path)
    assert {name: len(split) for name, split in glyphs(10, 16, cache_dir=tmp_path).items()} == {"train": 8, "test": 2}


@pytest.mark.slow
def test_processes_that_start_together_make_one_set(tmp_path):
    code = (
        "import sys, datasets; from updp_hf.data.made_here import glyphs; made = []; render = glyphs.render\n"
        "glyphs.render = lambda *args: made.append(1) or render(*args)\n"
        "[len(s[:]['image']) for s in glyphs.glyphs(1000, 32, cache_dir=sys.argv[1]).values()]; print(len(made))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sum(int(lines.split()[-1]) for lines in printed) == 1000
    assert digest(glyphs(1000, 32, cache_dir=tmp_path)) == digest(glyphs(1000, 32, cache_dir=tmp_path / "other"))


# what is refused


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, 32), "`num_images` is 0, expected 5 or more"),
        ((4, 32), "`num_images` is 4, expected 5 or more"),
        ((100, 15), "`resolution` is 15, expected 16 or more"),
        ((100, 32, -1), "`seed` is -1, expected 0 or more"),
    ],
)
def test_numbers_that_are_too_small_are_refused(arguments, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        glyphs(*arguments, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
