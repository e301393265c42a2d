"""The options of a recipe, and where their values come from."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers.hf_argparser import string_to_bool

from updp_hf.data.augmentation import AugmentationArguments
from updp_hf.data.sources import DataArguments
from updp_hf.errors import UPDPError
from updp_hf.recipe.command_line import Layer, parse_arguments
from updp_hf.training.arguments import UPDPTrainingArguments

__all__ = ["RecipeArguments", "changed", "recipe_arguments"]

SMOKE = "smoke.yaml"
"""The file beside the scripts that `--smoke` lays over the others."""


@dataclass
class RecipeArguments(UPDPTrainingArguments):
    """Which checkpoint to prune, and how: `UPDPTrainingArguments`, with the images of a step counted in all."""

    model_name_or_path: str = field(default="", metadata={"help": "The checkpoint: its id on the Hub, or a folder."})
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "The image classifier to distil from; by default the checkpoint itself."}
    )
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "Probability that a branch is left out in training, for models that know it."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Images in one step of the optimizer, on all processes together; gradients are accumulated where "
            "`per_device_train_batch_size` is too small for that."
        },
    )
    smoke: bool = field(
        default=False, metadata={"help": "Prune a tiny model of the same family on the digits: a minute on a CPU."}
    )
    tiny: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The configuration of the network that `--smoke` prunes, with a `model_type`."}
    )
    ddp_timeout: int = 14_400  # seconds: the first run may prepare the images on one process, while the others wait
    eval_on_start: bool = True
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        """Take the CPU where there is no other device, and share the images of a step out among the processes."""
        if not torch.accelerator.is_available():
            # Unless told so, each of several processes would believe that it is the only one.
            self.use_cpu = True
        if self.use_cpu:
            self.bf16 = self.dataloader_pin_memory = False  # what the recipes say of GPUs
        if isinstance(self.tiny, str):
            self.tiny = json.loads(self.tiny)
        super().__post_init__()
        if str(self.resume_from_checkpoint).lower() == "true":  # which a recipe does by itself
            self.resume_from_checkpoint: str | None = None
        if self.global_batch_size is None:
            return
        at_once = self.per_device_train_batch_size * self.world_size
        if self.global_batch_size < at_once:
            at_once = self.global_batch_size // self.world_size * self.world_size
        if at_once == 0 or self.global_batch_size % at_once:
            raise UPDPError(
                f"`global_batch_size` is {self.global_batch_size}, which {self.world_size} processes with at most "
                f"{self.per_device_train_batch_size} images at once cannot share out: choose a number of processes, "
                "and a `per_device_train_batch_size`, that divide it."
            )
        self.per_device_train_batch_size: int = at_once // self.world_size
        self.gradient_accumulation_steps: int = self.global_batch_size // at_once


def recipe_arguments(
    script: Path, argv: Sequence[str] | None = None
) -> tuple[DataArguments, AugmentationArguments, RecipeArguments]:
    """Return the values of a recipe: those of its YAML file, of `--config`, of `--smoke`, and of the command line.

    Args:
        script: the recipe; the YAML file beside it, if there is one, has its name.
        argv: the command line, by default that of this process.

    Raises:
        UPDPError: they do not go together.
    """
    options = list(sys.argv[1:] if argv is None else argv)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--smoke", nargs="?", const=True, default=False, type=string_to_bool)
    finder.add_argument("--config", type=Path, default=script)
    found = finder.parse_known_args(options)[0]
    own = script.with_suffix(".yaml")
    under: list[Layer] = [own] if own.is_file() else []
    name = own.stem if under else found.config.stem
    over: list[Layer] = [script.parent / SMOKE, {"output_dir": f"{name}-smoke"}] if found.smoke else []
    types = (DataArguments, AugmentationArguments, RecipeArguments)
    data, augmentation, args = parse_arguments(*types, argv=options, under=under, over=over)
    if args.smoke is not found.smoke:
        raise UPDPError("`smoke` is on in a file: give `--smoke` on the command line.")
    if not (args.smoke or args.model_name_or_path):
        raise UPDPError("No checkpoint is named: give `--model_name_or_path`, or `--config` with the file of a recipe.")
    if not args.smoke:
        args.tiny = None  # no fact of this run, so the report is not to name it
    return data, augmentation, args


def changed(augmentation: AugmentationArguments) -> dict[str, Any]:
    """Return what of the augmentation is not the default, by the names of the options."""
    values = {name: getattr(augmentation, name) for name in (field.name for field in fields(augmentation))}
    return {name: value for name, value in values.items() if value != getattr(AugmentationArguments, name)}
