"""Augmentation by timm: of one image, and of a batch whose images are mixed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.mixup import mixup_target
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from transformers import TimmWrapperImageProcessor, default_data_collator

from updp_hf.data.images import SEED, Transform
from updp_hf.data.processors import data_config_of
from updp_hf.data.randomness import random_states_kept, seed_of
from updp_hf.errors import UPDPError

__all__ = ["AugmentationArguments", "Mix", "eval_transform", "inputs_of", "train_transform"]

_INTERPOLATIONS = ("bicubic", "bilinear", "random")

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass
class AugmentationArguments:
    """How training images are augmented; the defaults crop and flip, and no more."""

    auto_augment: str | None = field(
        default=None,
        metadata={"help": "timm's name of a policy, such as 'rand-m9-mstd0.5-inc1' (RandAugment); none by default."},
    )
    random_erasing: float = field(default=0.0, metadata={"help": "Probability that a rectangle becomes noise."})
    color_jitter: float = field(
        default=0.0,
        metadata={"help": "Largest change of brightness, contrast and saturation; of no effect with `auto_augment`."},
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability that left and right are exchanged."})
    min_crop_scale: float = field(
        default=0.08,
        metadata={"help": "Smallest fraction of the image that a crop shows; 1 neither crops at random nor stretches."},
    )
    interpolation: str = field(
        default="bicubic",
        metadata={"help": "How crops are resized; random: bilinear or bicubic.", "choices": list(_INTERPOLATIONS)},
    )
    mixup: float = field(default=0.0, metadata={"help": "α of mixup, by which batches are blended; 0 switches it off."})
    cutmix: float = field(
        default=0.0, metadata={"help": "α of cutmix, by which rectangles are exchanged; 0 switches it off."}
    )
    mixup_switch_prob: float = field(
        default=0.5, metadata={"help": "Share of the batches that cutmix gets where mixup is on too."}
    )

    def __post_init__(self) -> None:
        """Check what can be checked without images."""
        for name in ("random_erasing", "horizontal_flip", "mixup_switch_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UPDPError(f"`{name}` is {getattr(self, name)}, expected a probability from 0 to 1.")
        for name in ("color_jitter", "mixup", "cutmix"):
            if not getattr(self, name) >= 0.0:
                raise UPDPError(f"`{name}` is {getattr(self, name)}, expected a number that is not negative.")
        if not 0.0 < self.min_crop_scale <= 1.0:
            raise UPDPError(f"`min_crop_scale` is {self.min_crop_scale}, expected a fraction above 0 and up to 1.")
        if self.auto_augment is not None and not _is_policy(self.auto_augment):
            raise UPDPError(
                f"`auto_augment` is {self.auto_augment!r}, expected a policy of timm, such as 'rand-m9-mstd0.5-inc1'."
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise UPDPError(f"`interpolation` is {self.interpolation!r}, expected one of {list(_INTERPOLATIONS)}.")

    @property
    def mixes(self) -> bool:
        """Whether the images of a batch are mixed."""
        return self.mixup > 0.0 or self.cutmix > 0.0


def _is_policy(name: str) -> bool:
    """Return whether timm knows a policy of this `name`: it says so by all kinds of errors."""
    try:
        transforms_imagenet_train(auto_augment=name)
    except (AssertionError, ValueError, KeyError, IndexError):
        return False
    return True


def train_transform(processor: Any, args: AugmentationArguments) -> Transform:
    """Return what makes an augmented tensor of an RGB image, with the size, mean and deviation of `processor`.

    Raises:
        ValueError: what the processor does is not known, or is not for RGB images.
    """
    config = inputs_of(processor)
    _, height, width = config["input_size"]
    crops = args.min_crop_scale < 1.0
    transform: Transform = create_transform(
        (height, width),
        is_training=True,
        scale=(args.min_crop_scale, 1.0),
        ratio=(3 / 4, 4 / 3) if crops else (width / height, width / height),
        hflip=args.horizontal_flip,
        color_jitter=args.color_jitter or None,
        auto_augment=args.auto_augment,
        interpolation=args.interpolation,
        mean=config["mean"],
        std=config["std"],
        re_prob=args.random_erasing,
        re_mode="pixel",
    )
    for step in transform.transforms:  # type: ignore[attr-defined]  # timm composes
        for op in _ops_of(step):
            _keep_a_bit_(op)
    return transform


def inputs_of(processor: Any) -> Mapping[str, Any]:
    """Return the size, mean and deviation of the RGB images that `processor` makes, as timm names them.

    Raises:
        ValueError: it does not tell, or they are not RGB images.
    """
    config = processor.data_config if isinstance(processor, TimmWrapperImageProcessor) else data_config_of(processor)
    if config is None or config["input_size"][0] != 3:
        raise UPDPError(
            f"{type(processor).__name__} does not say size, mean and deviation of RGB images as a ViTImageProcessor "
            "does, so images cannot be augmented for it: pass one that does, or a training set with a transform."
        )
    return config


def _ops_of(step: Any) -> list[AugmentOp]:
    """Return the operations that timm's policies draw from."""
    listed = [*getattr(step, "ops", []), *(op for part in getattr(step, "policy", []) for op in part)]
    return [op for op in listed if isinstance(op, AugmentOp)]


def _keep_a_bit_(op: AugmentOp) -> None:
    """Let posterising keep one bit at least: timm may ask for none, a black image, which Pillow 13 refuses."""
    if op.aug_fn is posterize:
        op.level_fn = partial(_at_least_one, op.level_fn)  # no lambda, which could not be sent to a worker


def _at_least_one(level: Callable[..., tuple[int]], *args: Any) -> tuple[int]:
    return (max(*level(*args), 1),)


def eval_transform(processor: Any) -> Transform:
    """Return what makes a tensor of an RGB image as `processor` does, which is what a model's users get."""
    return partial(_processed, processor)


def _processed(processor: Any, image: PIL.Image.Image) -> Tensor:
    pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
    return pixels[0]


class Mix:
    """Collate, and mix the images of a training batch and their labels by timm's mixup and cutmix.

    Batches are mixed whose items carry a seed, which is what tells training from evaluation and calibration: see
    `ImageDataset`. What is drawn depends on these seeds alone. The labels become probabilities of shape
    (batch, classes), smoothed as timm does it; others stay class numbers. The image left over in a batch of odd size
    is smoothed and not mixed, for timm mixes pairs.

    The Trainer must leave the items as they are: `remove_unused_columns=False`. Its own `label_smoothing_factor`
    would smooth once more.

    Args:
        args: how to mix; without mixup and cutmix labels are smoothed at most.
        num_classes: of the labels.
        label_smoothing: share of the probability that is spread over all classes.
        collator: makes a batch with "pixel_values" (batch, channels, height, width) and "labels" (batch,) of items.
    """

    def __init__(
        self,
        args: AugmentationArguments,
        num_classes: int,
        *,
        label_smoothing: float = 0.0,
        collator: Collator = default_data_collator,
    ):
        self._collator = collator
        self._num_classes, self._label_smoothing = num_classes, label_smoothing
        self._mixup = (
            Mixup(
                mixup_alpha=args.mixup,
                cutmix_alpha=args.cutmix,
                switch_prob=args.mixup_switch_prob,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
            if args.mixes
            else None
        )

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        seeds = [int(item[SEED]) for item in items if SEED in item]
        batch = self._collator([{name: value for name, value in item.items() if name != SEED} for item in items])
        if not seeds or (self._mixup is None and not self._label_smoothing):
            return batch
        images, labels = batch["pixel_values"], batch["labels"]
        pairs = len(items) // 2 * 2
        targets = mixup_target(labels, self._num_classes, smoothing=self._label_smoothing)
        if pairs and self._mixup is not None:
            with random_states_kept():
                np.random.seed(seed_of(*seeds) & 0xFFFF_FFFF)  # timm draws from the global generator
                images[:pairs], targets[:pairs] = self._mixup(images[:pairs], labels[:pairs])
        return {**batch, "pixel_values": images, "labels": targets}
