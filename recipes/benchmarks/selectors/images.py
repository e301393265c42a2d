"""Digits that were made hard."""

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import ViTImageProcessor

from recipes import digits

COPIES, TEST_COPIES = 16, 8
"""How often each digit is distorted anew: for training, which draws one of them each time, and held out."""
NOISE = 0.25
"""Standard deviation of the noise on pixels between -1 and 1."""
BATCH, SAMPLE = 256, 256
"""Images in a forward that needs no gradients, and training images by which selectors score."""


class Distorted(Dataset):
    """Digits of which each was distorted several times; reading one draws one of these."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels  # (copies, digits, 3, height, width), (digits,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        drawn = int(torch.randint(len(self.images), ()))
        return {"pixel_values": self.images[drawn, index], "labels": self.labels[index]}

    def batches(self) -> list[dict[str, Tensor]]:
        """Return all distorted images."""
        parts = zip(
            self.images.flatten(0, 1).split(BATCH), self.labels.repeat(len(self.images)).split(BATCH), strict=True
        )
        return [{"pixel_values": images, "labels": labels} for images, labels in parts]


def hard_digits(size: int, seed: int) -> tuple[Distorted, list[dict[str, Tensor]]]:
    """Return the digits rotated, moved, sheared, resized and with noise: for training, and held out."""
    processor = ViTImageProcessor(size={"height": size, "width": size})
    move = v2.RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.85, 1.1), shear=8, interpolation=2)
    distort = v2.Compose([v2.Resize(32, antialias=True), move, v2.Resize(size, antialias=True)])
    splits = digits.load_splits(processor, seed)
    torch.manual_seed(seed)
    found = []
    for split, copies in (("train", COPIES), ("test", TEST_COPIES)):
        clean = splits[split].with_format(None)[:]
        images = torch.stack([digits.to_inputs(clean, processor, distort)["pixel_values"] for _ in range(copies)])
        found.append(Distorted(images + NOISE * torch.randn(images.shape), torch.tensor(clean["label"])))
    return found[0], found[1].batches()
