"""The networks of the accuracy benchmark, their images, and how any of them is trained: all that its ways share."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import (
    AutoModelForImageClassification,
    MobileNetV2Config,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from updp_hf import UPDPTrainer, UPDPTrainingArguments
from updp_hf.data.digits import digits
from updp_hf.data.glyphs import glyphs
from updp_hf.scoring import labels_of, log_probabilities

__all__ = [
    "DATASETS",
    "FAMILIES",
    "Budget",
    "Splits",
    "config_of",
    "held_out",
    "load_images",
    "options",
    "pruned",
    "trained",
    "untrained",
]

VALIDATION = 1000
"""Training images kept back, by which learning rates are chosen; the held-out images choose nothing."""
EVALUATED = 250
"""Images in a forward that needs no gradients."""
DIGITS_SIZE, DIGITS_NOISE, DIGITS_COPIES = 16, 0.6, 8
"""Pixels at which noise is added, its standard deviation for pixels from -1 to 1, and how often each digit is used."""


class Family(NamedTuple):
    """A network by its width, 1.0 for the baseline, and the learning rate at which it is trained from scratch."""

    width: int  # channels of the baseline where `config` says so
    multiple: int  # what widths are a multiple of
    resolution: int  # as small as leaves its last layers 2×2 pixels
    learning_rate: float
    baseline_epochs: float


FAMILIES = {
    "vit": Family(64, 4, 32, 1e-3, 12),
    "convnext": Family(16, 2, 64, 2e-3, 3),
    "mobilenetv2": Family(16, 1, 48, 3e-3, 3),
    "resnet": Family(16, 1, 48, 2e-3, 3),
}
DATASETS = ("digits", "glyphs")
PATCHES = 4
"""Of the transformer, in a row and in a column."""


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
    """Return glyphs, or digits that are rotated, moved, sheared and noisy; the same for every seed of a network."""
    count = budget.train_images + VALIDATION
    if dataset == "digits":
        train, test = (_distorted(split, resolution) for split in digits(seed=0).values())
    else:
        found = glyphs(count + max(budget.test_images, count // 4), resolution)
        train, test = (_in_memory(found[split]) for split in ("train", "test"))
    count = min(count, len(train))
    return Splits(train.part(VALIDATION, count), train.part(0, VALIDATION), test.part(0, budget.test_images))


def _in_memory(split: datasets.Dataset) -> Images:
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in split["image"]])
    return Images(torch.tensor(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(split["label"]))


def _distorted(split: datasets.Dataset, resolution: int) -> Images:
    """Return every digit of `split` several times, each time distorted anew: all of the first ones, then the others."""
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
    places, kept = torch.arange(len(noisy)).view(copies, -1), VALIDATION // copies
    # validation shares no digit with training
    order = torch.cat([places[:, :kept].flatten(), places[:, kept:].flatten()])
    return Images(noisy.clamp(0, 255).byte()[order], labels[order])


def config_of(family: str, num_labels: int, width: int | None = None) -> PreTrainedConfig:
    """Return the configuration of a network, of the baseline's width or another one."""
    width, resolution = width or FAMILIES[family].width, FAMILIES[family].resolution
    timm_args: dict[str, Any] = {}
    if family == "mobilenetv2":  # transformers' own: the width of timm's is in its name
        return MobileNetV2Config(
            depth_multiplier=width / 32,
            depth_divisible_by=4,
            min_depth=4,
            tf_padding=False,
            image_size=resolution,
            num_labels=num_labels,
        )
    if family == "vit":
        architecture = "vit_tiny_patch16_224"
        timm_args |= {"img_size": resolution, "embed_dim": width, "depth": 12, "num_heads": 4}
        timm_args["patch_size"] = resolution // PATCHES
    elif family == "convnext":
        architecture = "convnext_atto"
        timm_args |= {"depths": (2, 2, 6, 2), "dims": tuple(width * 2**stage for stage in range(4))}
    else:
        architecture = "resnet18"
        timm_args |= {"layers": (2, 3, 4, 3), "channels": tuple(width * factor for factor in (1, 2, 3, 4))}
        timm_args |= {"stem_type": "deep", "stem_width": max(width // 2, 1)}  # a stem that is small beside the blocks
    return TimmWrapperConfig(
        architecture=architecture, model_args=timm_args, num_labels=num_labels, image_size=resolution
    )


def untrained(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Return a network with fresh weights."""
    set_seed(seed)
    return AutoModelForImageClassification.from_config(config)


def options(budget: Budget, folder: Path, epochs: float, learning_rate: float, seed: int) -> dict[str, Any]:
    """Return the options of `TrainingArguments` that all trainings share, and those that they do not."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": budget.batch_size,
        "per_device_eval_batch_size": EVALUATED,
        "weight_decay": 0.05,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "seed": seed,
    }


def trained(model: nn.Module, images: Images, settings: Mapping[str, Any]) -> nn.Module:
    """Return `model` as it is after training with `settings`, options of `TrainingArguments`."""
    set_seed(settings["seed"])
    trainer = Trainer(model=model, args=TrainingArguments(**settings), train_dataset=images)
    trainer.train()
    return trainer.model


def pruned(model: nn.Module, images: Images, settings: Mapping[str, Any]) -> nn.Module:
    """Return `model` pruned with `settings`, options of `UPDPTrainingArguments`, and merged."""
    set_seed(settings["seed"])
    pruner = UPDPTrainer(model=copy.deepcopy(model), args=UPDPTrainingArguments(**settings), train_dataset=images)
    pruner.train()
    return pruner.merge()


def held_out(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Return accuracy and mean loss of `model` on the batches."""
    model.eval()
    found, labels = log_probabilities(model, batches), torch.cat([labels_of(batch) for batch in batches])
    return {
        "accuracy": float((found.argmax(-1) == labels).double().mean()),
        "loss": float(F.nll_loss(found, labels)),
    }
