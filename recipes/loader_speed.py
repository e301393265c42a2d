"""How many images a second the input pipeline of a recipe delivers, with nothing behind it."""

import io
import time
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["images_per_second", "training_images"]

SIZE = (500, 375)
"""Width and height of a picture before it is cropped: about that of ImageNet's."""


class JpegImages(Dataset[dict[str, Any]]):
    """Coloured noise as JPEG files in memory, decoded and augmented each time one is asked for."""

    def __init__(self, count: int, distinct: int, image_size: int):
        generator = torch.Generator().manual_seed(0)
        self.files = [_jpeg(generator) for _ in range(distinct)]
        self.count = count
        # "mmax9": at magnitude 10, which draws around 9 reach, timm posterizes to 0 bits, and Pillow 13 refuses that.
        augmentation = "rand-m9-mmax9-mstd0.5-inc1"
        self.transform = create_transform(
            image_size, is_training=True, auto_augment=augmentation, interpolation="bicubic", re_prob=0.25
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = Image.open(io.BytesIO(self.files[index % len(self.files)])).convert("RGB")
        return {"pixel_values": self.transform(image), "labels": index % 1000}


def _jpeg(generator: torch.Generator) -> bytes:
    coarse = torch.randint(256, (24, 32, 3), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(coarse.numpy()).resize(SIZE, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def training_images(count: int, image_size: int) -> Dataset[dict[str, Any]]:
    """Return `count` training images, (3, size, size), with the augmentation of the recipes."""
    return JpegImages(count, min(count, 32), image_size)


def images_per_second(images: Dataset[dict[str, Any]], batch_size: int, workers: int) -> float:
    """Return how many of `images` a second arrive from `workers` processes, the first batch of each not counted."""
    loader = DataLoader(images, batch_size=batch_size, num_workers=workers, drop_last=True)
    batches = iter(loader)
    for _ in range(max(workers, 1)):
        next(batches)
    begin = time.perf_counter()
    # What workers made ahead while the first batches were awaited is little beside all that follow.
    counted = sum(len(_pixels(batch)) for batch in batches)
    return counted / (time.perf_counter() - begin)


def _pixels(batch: dict[str, Tensor]) -> Tensor:
    return batch["pixel_values"]
