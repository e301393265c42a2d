"""How many images a second the input pipeline of a recipe delivers, with nothing behind it."""

import io
import time
from typing import Any

import datasets
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import ViTImageProcessor

from updp_hf.data.augmentation import AugmentationArguments, train_transform
from updp_hf.data.images import ImageDataset

__all__ = ["images_per_second", "training_images"]

SIZE = (500, 375)
"""Width and height of a picture before it is cropped: about that of ImageNet's."""
DISTINCT = 32
"""Pictures; more would be decoded no slower."""


def training_images(count: int, image_size: int) -> Dataset[dict[str, Any]]:
    """Return `count` JPEG files of coloured noise, to be decoded and augmented as DeiT's recipe does it."""
    generator = torch.Generator().manual_seed(0)
    files = [_jpeg(generator) for _ in range(min(count, DISTINCT))]
    pictures = datasets.Dataset.from_dict(
        {
            "image": [files[index % len(files)] for index in range(count)],
            "label": [index % 10 for index in range(count)],
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}),
    )
    processor = ViTImageProcessor(size={"height": image_size, "width": image_size})
    augmentation = AugmentationArguments(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)
    return ImageDataset(pictures, train_transform(processor, augmentation))


def _jpeg(generator: torch.Generator) -> dict[str, Any]:
    coarse = torch.randint(256, (24, 32, 3), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(coarse.numpy()).resize(SIZE, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return {"bytes": file.getvalue(), "path": None}


def images_per_second(images: Dataset[dict[str, Any]], batch_size: int, workers: int) -> float:
    """Return how many of `images` a second arrive from `workers` processes, the first batch of each not counted."""
    loader = DataLoader(images, batch_size=batch_size, num_workers=workers, drop_last=True)
    batches = iter(loader)
    for _ in range(max(workers, 1)):
        next(batches)
    begin = time.perf_counter()
    # What workers made ahead while the first batches were awaited is little beside all that follow.
    counted = sum(len(batch["pixel_values"]) for batch in batches)
    return counted / (time.perf_counter() - begin)
