"""Characters in many fonts, distorted and noisy: any number of images at any resolution, harder than the digits."""

from collections.abc import Iterator
from importlib.metadata import version
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from updp_hf.data.made_here.fonts import fonts_with
from updp_hf.data.made_here.rendering import render
from updp_hf.errors import UPDPError

__all__ = ["CLASSES", "fonts_of", "glyphs"]

CLASSES = "ABCDEFGHJKLMNOPQRSTUVWXYZabdefghijmnrt123456789"
"""Letters and digits that can be told apart without knowing their size, upright or slanted.

Of upper and lower case of one shape the upper is left (Cc Kk Oo Pp Ss Uu Vv Ww Xx Yy Zz), as are O without 0, 1 without
I and l, g without q.
"""
RENDERING = 1
"""Counted up when a change of the code changes images: what older code has left in the cache is not read then."""
MIN_IMAGES = 5
MIN_RESOLUTION = 16
LIBRARIES = ("matplotlib", "numpy", "pillow")
SPLITS = ("train", "test")


def glyphs(
    num_images: int, resolution: int, seed: int = 0, cache_dir: str | PathLike[str] | None = None
) -> datasets.DatasetDict:
    """Return `num_images` pictures of characters, a fifth of them in `test`, in fonts of which `train` has none.

    Every split has `image`, RGB, and `label`, the place of the character in `CLASSES`; neighbours have different
    labels, so that each class has equally many images, or one more. An image is fixed by seed, split and its place
    in it: a larger set begins with the smaller one. The set is made once and then read from the cache of `datasets`.

    Args:
        num_images: images in both splits together, 5 or more.
        resolution: height and width in pixels, 16 or more.
        seed: from which fonts, distortions, colours and noise are drawn, 0 or more.
        cache_dir: where the set is kept, by default where `datasets` keeps all.

    Raises:
        ValueError: a number is too small.
        FileNotFoundError: matplotlib's fonts are not there.
    """
    _check_at_least(MIN_IMAGES, num_images=num_images)
    _check_at_least(MIN_RESOLUTION, resolution=resolution)
    _check_at_least(0, seed=seed)
    num_test = num_images // 5
    made_by = f"{RENDERING}, " + ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_generator(
                _images,
                features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[*CLASSES])}),
                cache_dir=None if cache_dir is None else str(cache_dir),
                gen_kwargs={
                    "split": split,
                    "num_images": count,
                    "resolution": resolution,
                    "seed": seed,
                    "made_by": made_by,
                },
                split=datasets.NamedSplit(split),
                dataset_name="glyphs",
            )
            for split, count in zip(SPLITS, (num_images - num_test, num_test), strict=True)
        }
    )


def _check_at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise UPDPError(f"`{name}` is {number}, expected {least} or more: pass a larger number.")


def _images(split: str, num_images: int, resolution: int, seed: int, made_by: str) -> Iterator[dict[str, Any]]:
    """Yield the images of a split; `made_by` is there for the cache, which is found by what is passed here."""
    fonts = fonts_of(split)
    for index in range(num_images):
        random = np.random.default_rng((seed, SPLITS.index(split), index))
        font = fonts[random.integers(len(fonts))]
        label = index % len(CLASSES)
        file = BytesIO()
        # stronger compression saves a sixth, and takes four times as long at 224 pixels
        render(CLASSES[label], font, resolution, random).save(file, "PNG", compress_level=1)
        yield {"image": {"bytes": file.getvalue(), "path": None}, "label": label}


def fonts_of(split: str) -> tuple[Path, ...]:
    """Return the fonts of a split: every fifth of all, in the order of their names, is held out."""
    fonts = fonts_with(CLASSES)
    held_out = fonts[4::5]
    return held_out if split == "test" else tuple(font for font in fonts if font not in held_out)
