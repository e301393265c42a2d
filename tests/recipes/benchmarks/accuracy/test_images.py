"""The images of the benchmark of accuracy."""

import datasets
import pytest
import torch

from recipes.benchmarks.accuracy import images as images_of
from updp_hf.data.made_here.digits import digits


def test_what_is_kept_apart_shares_no_digit_with_the_rest_and_each_digit_is_distorted_anew():
    split = digits(seed=0)["train"].select(range(40))
    numbered = datasets.Dataset.from_dict({"image": split["image"], "label": list(range(40))})
    count = images_of.DIGITS_COPIES
    found = images_of.distorted(numbered, 16, apart=10 * count)
    apart, rest = found.part(0, 10 * count), found.part(10 * count, 40 * count)
    assert not set(apart.labels.tolist()) & set(rest.labels.tolist())
    copies = apart.labels.view(count, -1)
    assert (copies == copies[0]).all()  # all copies of the same digits
    images = apart.images.view(count, -1, 3, 16, 16)
    assert not torch.equal(images[0], images[1])
    assert torch.equal(found.images, images_of.distorted(numbered, 16, apart=10 * count).images)


@pytest.mark.slow
def test_all_digits_are_used():
    splits = images_of.load_images("digits", 16, images_of.Budget())
    assert [len(split) for split in splits] == [9776, 1000, 3600]


@pytest.mark.parametrize(("train", "held_out"), [(40, 30), (300, 20)])
def test_there_are_as_many_glyphs_as_the_budget_says(monkeypatch, train, held_out):
    monkeypatch.setattr(images_of, "VALIDATION", 10)
    splits = images_of.load_images("glyphs", 16, images_of.Budget(train, held_out))
    assert [len(split) for split in splits] == [train, 10, held_out]


def test_glyphs_are_white_on_black_whatever_their_colours():
    colours = torch.tensor([[200, 20, 90], [30, 220, 40]]).view(2, 3, 1, 1)
    pictures = colours.expand(2, 3, 16, 16).clone()
    pictures[:, :, 5:9, 6:8] = torch.tensor([[10, 200, 60], [90, 90, 250]]).view(2, 3, 1, 1)
    inked = images_of.inked(images_of.Images(pictures.byte(), torch.tensor([3, 4])))
    expected = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    expected[:, :, 5:9, 6:8] = 255
    assert torch.equal(inked.images, expected)
    assert inked.labels.tolist() == [3, 4]
