"""From options to a trainer: images, checkpoint, teacher."""

import math
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from transformers import AutoConfig, PreTrainedConfig, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from updp_hf.data.augmentation import AugmentationArguments, Mix, eval_transform, train_transform
from updp_hf.data.callbacks import BrokenImagesCallback
from updp_hf.data.images import ImageDataset
from updp_hf.data.sources import DataArguments, Splits, load_splits
from updp_hf.data.streams import Tally, image_stream
from updp_hf.errors import UPDPError
from updp_hf.processes import on_main_process
from updp_hf.recipe.arguments import RecipeArguments
from updp_hf.recipe.pretrained import check_trained, load_checkpoint, load_teacher, save_tiny
from updp_hf.training.checkpoints import last_checkpoint
from updp_hf.training.losses import label_loss
from updp_hf.training.metrics import compute_accuracy
from updp_hf.training.trainer import UPDPTrainer

__all__ = ["prepare", "set_steps"]


def prepare(data: DataArguments, augmentation: AugmentationArguments, args: RecipeArguments) -> UPDPTrainer:
    """Load images and checkpoint, and return their trainer.

    Raises:
        UPDPError: something does not fit, or cannot be reached.
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
            args.model_name_or_path = save_tiny(tiny_of(args), Path(args.output_dir) / "tiny", splits.labels)
    set_seed(args.seed)  # the same also where a tiny network has been drawn
    model, processor = load_checkpoint(args.model_name_or_path, splits.labels, args.drop_path_rate)
    if args.distillation != "none" and args.teacher_name_or_path is None:
        check_trained(args.model_name_or_path, splits.labels)
    teacher = args.teacher_name_or_path and load_teacher(args.teacher_name_or_path, splits.labels, processor)
    check_count(args, splits.train)
    if data.streaming:
        set_steps(args, splits.num_train_images)
    train, held_out, tallies = image_sets(splits, data, augmentation, args, processor)
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


def tiny_of(args: RecipeArguments) -> PreTrainedConfig:
    """Return the configuration of the network that a smoke run prunes.

    Raises:
        UPDPError: the recipe has none.
    """
    if not isinstance(args.tiny, dict) or "model_type" not in args.tiny:
        raise UPDPError("`--smoke` needs `tiny` in the file of the recipe: a configuration with its `model_type`.")
    return AutoConfig.for_model(**args.tiny)


def image_sets(
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


def check_count(args: RecipeArguments, train: Any) -> None:
    """Check that the images fill one batch of each process.

    Raises:
        UPDPError: they do not.
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
        UPDPError: the source does not tell how many there are.
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
