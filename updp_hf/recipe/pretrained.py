"""The checkpoints that a recipe starts from: the network to prune, and the one to learn from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    ViTImageProcessor,
)
from transformers.utils import logging

from updp_hf.data.augmentation import inputs_of
from updp_hf.errors import AccessError, UPDPError
from updp_hf.surgery.model_io import load_classifier
from updp_hf.training.checkpoints import appearing_whole

__all__ = ["check_trained", "load_checkpoint", "load_teacher", "save_tiny"]

logger = logging.get_logger(__name__)


def save_tiny(config: PreTrainedConfig, folder: Path, labels: Sequence[str]) -> str:
    """Save a network with random weights as an ordinary checkpoint, unless it is there."""
    if PartialState().is_main_process and not folder.is_dir():
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
        with appearing_whole(folder) as whole:
            AutoModelForImageClassification.from_config(config).save_pretrained(whole)
            ViTImageProcessor(size={"height": config.image_size, "width": config.image_size}).save_pretrained(whole)
    return str(folder)


def load_checkpoint(
    name: str, labels: Sequence[str], drop_path_rate: float | None = None
) -> tuple[PreTrainedModel, Any]:
    """Return the model `name` and what prepares its images.

    It gets a new classifier where it has been trained for another number of classes.

    Raises:
        OSError: it cannot be reached.
        ValueError: the model knows no such drop path, or has the same classes in another order.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name)
        options: dict[str, Any] = {}
        _check_order(name, list(config.id2label.values()), labels)
        if config.num_labels != len(labels):
            logger.warning(
                f"{name} has been trained for {config.num_labels} classes and there are {len(labels)} here, so its "
                "classifier is a new one: fine-tune it before it is pruned, or what is left of it will not be known."
            )
            names = dict(enumerate(labels))
            options = {
                "num_labels": len(labels),
                "id2label": names,
                "label2id": {label: index for index, label in names.items()},
            }
        if drop_path_rate is not None:
            options |= _drop_path(config, drop_path_rate)
    except OSError as error:
        raise AccessError(
            f"The checkpoint {name} could not be reached ({str(error).splitlines()[0]}): connect, log in if it is "
            "gated, or give the folder of one with `--model_name_or_path`."
        ) from error
    return load_classifier(name, may_have_new_head=True, **options), processor


def load_teacher(name: str, labels: Sequence[str], processor: Any) -> PreTrainedModel:
    """Return the image classifier `name` to distil from, which gets the images that `processor` makes.

    Raises:
        OSError: it cannot be reached.
        ValueError: it knows other classes, or expects other images.
    """
    teacher, own = load_checkpoint(name, labels)
    check_trained(name, labels)
    found, expected = ({key: inputs_of(p)[key] for key in ("mean", "std")} for p in (processor, own))
    if found != expected:
        raise UPDPError(
            f"The teacher {name} expects images normalised by {expected}, but those of the model have {found}: name a "
            "teacher that was trained with the same."
        )
    return teacher


def check_trained(name: str, labels: Sequence[str]) -> None:
    """Refuse to learn from the checkpoint `name` if its classifier is a new one.

    Raises:
        ValueError: it is.
    """
    if AutoConfig.from_pretrained(name).num_labels != len(labels):
        raise UPDPError(
            f"{name} does not know the {len(labels)} classes of the images, so nothing can be learnt from it: name a "
            "teacher that does with `--teacher_name_or_path`, or set `--distillation none`."
        )


def _check_order(name: str, known: Sequence[str], labels: Sequence[str]) -> None:
    if list(known) != list(labels) and sorted(known) == sorted(labels):
        raise UPDPError(
            f"{name} knows the classes of the images in another order ({known[:3]}… and not {list(labels)[:3]}…): "
            "order the classes of the images like those, for example by `align_labels_with_mapping` of datasets."
        )


def _drop_path(config: PreTrainedConfig, rate: float) -> dict[str, Any]:
    if isinstance(config, TimmWrapperConfig):
        return {"model_args": {**(config.model_args or {}), "drop_path_rate": rate}}
    if not hasattr(config, "drop_path_rate"):
        raise UPDPError(
            f"`drop_path_rate` is {rate}, but a {type(config).__name__} knows no drop path: leave it out, or load the "
            "model from timm."
        )
    return {"drop_path_rate": rate}
