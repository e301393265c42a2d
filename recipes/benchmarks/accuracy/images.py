"""The images of the accuracy benchmark, and how many of them are trained on: the same for all its ways."""

from dataclasses import dataclass
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from updp_hf.data.made_here.digits import digits
from updp_hf.data.made_here.glyphs import glyphs

__all__ = ["DATASETS", "EVALUATED", "Budget", "Images", "Splits", "load_images"]

DATASETS = {"digits": 1.0, "glyphs": 4.0}
"""By name how much longer a baseline is trained on them than `nets.py` says: glyphs are harder."""
VALIDATION = 1000
"""Training images kept back, by which learning rates are chosen; the held-out images choose nothing."""
EVALUATED = 250
"""Images in a forward that needs no gradients."""
DIGITS_SIZE, DIGITS_NOISE, DIGITS_COPIES = 16, 0.6, 8
"""Pixels at which noise is added, its standard deviation for pixels from -1 to 1, and how often each digit is used."""

WHITE = 0.99
"""Share of a glyph's pixels that are no brighter than white."""


@dataclass(frozen=True)
class Budget:
    """How much is trained, the same for every way."""

    train_images: int = 9_776  # the digits have no more, each distorted eight times
    test_images: int = 3_600
    epochs: float = 1.0  # of fine-tuning
    baseline_scale: float = 1.0  # of the baseline's epochs
    batch_size: int = 64
    calibration_images: int = 256


class Images(Dataset):
    """Images in memory."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels  # (images, 3, height, width) of bytes, (images,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index].float() / 127.5 - 1, "labels": self.labels[index]}

    def part(self, begin: int, end: int) -> "Images":
        """Return the images from `begin` to `end`."""
        return Images(self.images[begin:end], self.labels[begin:end])

    def batches(self) -> list[dict[str, Tensor]]:
        """Return all images, in batches."""
        parts = zip(self.images.split(EVALUATED), self.labels.split(EVALUATED), strict=True)
        return [{"pixel_values": images.float() / 127.5 - 1, "labels": labels} for images, labels in parts]


class Splits(NamedTuple):
    """What is trained on, what learning rates are chosen by, and what is reported."""

    train: Images
    validation: Images
    test: Images


def load_images(dataset: str, resolution: int, budget: Budget) -> Splits:
    """Return distorted, noisy digits or glyphs, whose held-out fonts are new; the same for every seed of a network."""
    count = budget.train_images + VALIDATION
    if dataset == "digits":
        train, test = (distorted(split, resolution, VALIDATION) for split in digits(seed=0).values())
    else:
        found = glyphs(5 * max(budget.test_images, -(-count // 4)), resolution)  # a fifth of them is held out
        train, test = (inked(_in_memory(found[split])) for split in ("train", "test"))
    count = min(count, len(train))
    return Splits(train.part(VALIDATION, count), train.part(0, VALIDATION), test.part(0, budget.test_images))


def _in_memory(split: datasets.Dataset) -> Images:
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in split["image"]])
    return Images(torch.tensor(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(split["label"]))


def inked(glyphs: Images) -> Images:
    """Return the glyphs in grey on black, as the digits are: what differs most from the colour of the border is white.

    Colours say nothing, and to learn that takes small networks most of their training.
    """
    pixels = glyphs.images.float()
    border = torch.cat([pixels[:, :, [0, -1]].flatten(2), pixels[:, :, :, [0, -1]].flatten(2)], -1)
    difference = (pixels - border.median(-1).values[..., None, None]).abs().amax(1, keepdim=True)
    white = difference.flatten(1).quantile(WHITE, dim=1).clamp_min(1)[:, None, None, None]
    grey = (255 * difference / white).clamp(0, 255).byte()
    return Images(grey.expand_as(pixels).contiguous(), glyphs.labels)


def distorted(split: datasets.Dataset, resolution: int, apart: int) -> Images:
    """Return every digit of `split` several times, each time distorted anew.

    The first `apart` images are all copies of the first digits, the others all of the others: they share no digit.
    """
    generator = torch.Generator().manual_seed(0)
    copies = DIGITS_COPIES
    move = v2.RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.85, 1.1), shear=8, interpolation=2)
    clean = v2.functional.resize(_in_memory(split).images, [2 * DIGITS_SIZE] * 2, antialias=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moved = torch.stack([move(image) for _ in range(copies) for image in clean])
    small = v2.functional.resize(moved, [DIGITS_SIZE] * 2, antialias=True).float()
    noisy = small + 127.5 * DIGITS_NOISE * torch.randn(small.shape, generator=generator)
    noisy = v2.functional.resize(noisy.clamp(0, 255), [resolution] * 2, antialias=True)
    labels = torch.tensor(split["label"]).repeat(copies)
    places, kept = torch.arange(len(noisy)).view(copies, -1), apart // copies
    order = torch.cat([places[:, :kept].flatten(), places[:, kept:].flatten()])
    return Images(noisy.clamp(0, 255).byte()[order], labels[order])
