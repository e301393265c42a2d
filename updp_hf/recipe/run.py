"""The straight line of every recipe: load, prune while fine-tuning, merge, save, say what came of it."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from transformers import PreTrainedConfig, TrainerState, set_seed
from transformers.hf_argparser import string_to_bool
from transformers.trainer import TRAINER_STATE_NAME

from updp_hf.data.augmentation import AugmentationArguments, Mix, eval_transform, train_transform
from updp_hf.data.callbacks import BrokenImagesCallback
from updp_hf.data.images import ImageDataset
from updp_hf.data.sources import DataArguments, Splits, load_splits
from updp_hf.data.streams import Tally, image_stream
from updp_hf.errors import UPDPError
from updp_hf.processes import on_main_process
from updp_hf.recipe.command_line import Layer, parse_arguments
from updp_hf.recipe.pretrained import load_checkpoint, load_teacher, refuse_untrained, save_tiny
from updp_hf.reporting.report import Report
from updp_hf.reporting.tables import numbers, side_by_side, speed_ups
from updp_hf.training.arguments import UPDPTrainingArguments
from updp_hf.training.checkpoints import last_checkpoint
from updp_hf.training.losses import label_loss
from updp_hf.training.metrics import compute_accuracy
from updp_hf.training.trainer import UPDPTrainer

__all__ = ["RecipeArguments", "recipe_arguments", "run"]

SMOKE = "smoke.yaml"


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


def run(recipe: str, tiny: PreTrainedConfig) -> None:
    """Run the recipe in the file `recipe`, whose values are those of the YAML file beside it.

    The same command again goes on where a run was interrupted. What is wrong with the input ends it with one sentence.

    Args:
        recipe: `__file__` of the recipe.
        tiny: the network that `--smoke` prunes.
    """
    try:
        data, augmentation, args = recipe_arguments(Path(recipe))
        prune(prepare(data, augmentation, args, tiny), augmentation)
    except UPDPError as error:
        sys.exit(f"{Path(recipe).name}: {error}" if PartialState().is_main_process else 1)


def recipe_arguments(
    recipe: Path, argv: Sequence[str] | None = None
) -> tuple[DataArguments, AugmentationArguments, RecipeArguments]:
    """Return the values of the recipe: those of its file, of `--config`, of `--smoke`, and of the command line.

    Raises:
        ValueError: they do not go together.
    """
    options = list(sys.argv[1:] if argv is None else argv)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--smoke", nargs="?", const=True, default=False, type=string_to_bool)
    is_smoke = finder.parse_known_args(options)[0].smoke
    over: list[Layer] = [recipe.parent / SMOKE, {"output_dir": f"{recipe.stem}-smoke"}] if is_smoke else []
    types = (DataArguments, AugmentationArguments, RecipeArguments)
    data, augmentation, args = parse_arguments(*types, argv=options, under=[recipe.with_suffix(".yaml")], over=over)
    if args.smoke is not is_smoke:
        raise UPDPError("`smoke` is on in a file: give `--smoke` on the command line.")
    return data, augmentation, args


def prepare(
    data: DataArguments, augmentation: AugmentationArguments, args: RecipeArguments, tiny: PreTrainedConfig
) -> UPDPTrainer:
    """Load images and checkpoint, and return their trainer.

    Raises:
        ValueError: something does not fit, in one sentence.
        OSError: something cannot be reached.
    """
    set_seed(args.seed)
    args.ignore_data_skip |= data.streaming  # instead a stream goes on in another order
    first_step = on_main_process(lambda: step_to_go_on_from(args), PartialState()) if data.streaming else 0
    # On the main process first, which downloads; the others are told if it cannot.
    on_main_process(lambda: bool(load_splits(data, args.seed)), PartialState())
    splits = load_splits(data, args.seed, first_step=first_step)
    with PartialState().main_process_first():
        if args.smoke:
            PartialState().print("A smoke run: the weights are random, so its figures say no more than that it works.")
            args.model_name_or_path = save_tiny(tiny, Path(args.output_dir) / "tiny", splits.labels)
    set_seed(args.seed)  # the same also where a tiny network has been drawn
    model, processor = load_checkpoint(args.model_name_or_path, splits.labels, args.drop_path_rate)
    if args.distillation != "none" and args.teacher_name_or_path is None:
        refuse_untrained(args.model_name_or_path, splits.labels)
    teacher = args.teacher_name_or_path and load_teacher(args.teacher_name_or_path, splits.labels, processor)
    refuse_too_few(args, splits.train)
    if data.streaming:
        set_steps(args, splits.num_train_images)
    train, held_out, tallies = images(splits, data, augmentation, args, processor)
    return UPDPTrainer(
        model=model,
        args=args,
        teacher=teacher or None,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=Mix(augmentation, len(splits.labels), label_smoothing=args.label_smoothing_factor),
        compute_loss_func=label_loss,
        processing_class=processor,
        compute_metrics=compute_accuracy,
        callbacks=[BrokenImagesCallback(*tallies)],
    )


def prune(trainer: UPDPTrainer, augmentation: AugmentationArguments) -> None:
    """Prune, or go on with what was interrupted; merge, save, push if asked for, and print what came of it.

    The report and the card get the `augmentation`, which the trainer does not know.
    """
    args, say = trainer.args, PartialState().print  # on the main process only
    is_begun = trainer.is_begun()
    say(f"{'Going on with' if is_begun else 'Pruning'} {args.model_name_or_path}, to be saved in {args.output_dir}.")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or is_begun)
    say(f"Pruned: {', '.join(trainer.plan.blocks)}.")
    trainer.save_model()
    if args.process_index == 0:
        report = Report.load(args.output_dir)
        changed = {f.name: getattr(augmentation, f.name) for f in fields(augmentation)}
        changed = {name: value for name, value in changed.items() if value != getattr(AugmentationArguments, name)}
        replace(report, arguments=report.arguments | changed).save(args.output_dir)
        trainer.create_model_card()
        print(f"\n{summary(report)}\n")
    say(f"The merged model, its report and its card are in {args.output_dir}.")
    if args.push_to_hub:
        say(f"Pushed: {trainer.push_to_hub()}")


def images(
    splits: Splits, data: DataArguments, augmentation: AugmentationArguments, args: RecipeArguments, processor: Any
) -> tuple[Any, Any, list[Any]]:
    """Return the images to train and to evaluate on, and what counts the broken ones."""
    columns = {"image_column": data.image_column_name, "label_column": data.label_column_name}
    augmented, plain = train_transform(processor, augmentation), eval_transform(processor)
    found: list[Any] = []
    tallies: list[Any] = []
    for split, is_training in ((splits.train, True), (splits.held_out, False)):
        transform = augmented if is_training else plain
        options: dict[str, Any] = {**columns, "plain_transform": plain, "carry_seeds": is_training}
        if isinstance(split, datasets.IterableDataset):
            tallies.append(Tally())
            found.append(image_stream(split, transform, tallies[-1], **options))
        else:
            options |= {"seed": args.seed, "replace_broken": is_training}
            found.append(ImageDataset(split, transform, **options))
            tallies.append(found[-1])
    return found[0], found[1], tallies


def refuse_too_few(args: RecipeArguments, train: Any) -> None:
    """Refuse a set that does not fill one batch of each process.

    Raises:
        ValueError: it does not.
    """
    at_once = args.per_device_train_batch_size * args.world_size
    if not isinstance(train, datasets.IterableDataset) and len(train) < at_once:
        raise UPDPError(
            f"There are {len(train)} images to train on, but {args.world_size} processes take {at_once} at once: give "
            "more images, or a smaller `global_batch_size`."
        )


def set_steps(args: RecipeArguments, count: int | None) -> None:
    """Say in steps how long to train on a stream of `count` images, which has no epochs.

    Raises:
        ValueError: the source does not tell how many there are.
    """
    if args.max_steps > 0:
        return
    if count is None:
        raise UPDPError("The stream does not tell how many images it has: say with `--max_steps` how long to train.")
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    args.max_steps = math.ceil(count * args.num_train_epochs / batch_size)


def step_to_go_on_from(args: RecipeArguments) -> int:
    """Return the step of the checkpoint that training goes on from, 0 if there is none."""
    checkpoint = args.resume_from_checkpoint or last_checkpoint(args.output_dir)
    file = Path(checkpoint or "") / TRAINER_STATE_NAME
    return TrainerState.load_from_json(str(file)).global_step if file.is_file() else 0


def summary(report: Report) -> str:
    """Return a table of the model before and after pruning."""
    columns = {}
    for name, cost, metrics in (
        ("before", report.before, report.metrics_before),
        ("after", report.after, report.metrics_after),
    ):
        accuracy = numbers(metrics).get("accuracy")
        columns[name] = {
            "held-out accuracy": "not measured" if accuracy is None else f"{100 * accuracy:.2f} %",
            **cost.facts(),
        }
    for size, factor in speed_ups(report.before.latency, report.after.latency).items():
        columns["before"][f"speed-up, batch {size}"] = "1.00×"
        columns["after"][f"speed-up, batch {size}"] = f"{factor:.2f}×"
    return side_by_side(columns)
