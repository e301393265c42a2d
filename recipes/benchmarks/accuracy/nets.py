"""The networks of the accuracy benchmark, and how any of them is trained: all that its ways share."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
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

from recipes.benchmarks.accuracy.images import EVALUATED, Budget, Images
from updp_hf import UPDPTrainer, UPDPTrainingArguments

__all__ = [
    "FAMILIES",
    "config_of",
    "options",
    "pruned",
    "trained",
    "untrained",
]


class Family(NamedTuple):
    """A network, the size of its images, and how it is trained from scratch."""

    width: int  # of the baseline: channels of its first blocks
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
PATCHES = 4
"""Of the transformer, in a row and in a column."""


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
