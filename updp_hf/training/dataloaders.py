"""How loaders of the Trainer are made otherwise, for a while, and the images that are read before training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import datasets
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from updp_hf.data.calibration_set import sample_and_rest
from updp_hf.data.randomness import random_states_kept, seed_generators
from updp_hf.training.arguments import UPDPTrainingArguments

__all__ = ["calibration_batches", "nothing_dropped", "read_by_each_process", "whole_or_nothing"]

_LABELS = ("label", "label_ids", "labels")
"""Columns that the collators of transformers return as `labels`."""


@contextmanager
def read_by_each_process(accelerator: Accelerator) -> Iterator[None]:
    """Let each process read its part of the streams whose loaders are made within, unless told how to read them."""
    config = accelerator.dataloader_config
    asked = config.dispatch_batches
    if asked is None:
        config.dispatch_batches = False
    try:
        yield
    finally:
        config.dispatch_batches = asked


@contextmanager
def nothing_dropped(args: UPDPTrainingArguments) -> Iterator[None]:
    """Let loaders that are made within keep the last batch: the Trainer drops that of an evaluation, too."""
    asked = args.dataloader_drop_last
    args.dataloader_drop_last = False
    try:
        yield
    finally:
        args.dataloader_drop_last = asked


def whole_or_nothing(batches: Iterator[Any], count: int) -> Iterator[Any]:
    """Return the next `count` of `batches`, or none if there are fewer."""
    found = list(islice(batches, count))
    return iter(found if len(found) == count else ())


def calibration_batches(
    dataset: Any, collator: Callable[[list[Any]], Any], args: UPDPTrainingArguments, image_key: str
) -> list[dict[str, Tensor]]:
    """Return images to calibrate with and to score by, the same on every process, with labels if they have any.

    Raises:
        ValueError: `dataset` cannot be sampled.
    """
    sample, _ = sample_and_rest(dataset, args.calibration_size, args.seed)
    if isinstance(sample, datasets.Dataset) and args.remove_unused_columns:
        sample = sample.select_columns([name for name in sample.column_names if name in (image_key, *_LABELS)])
    loader = DataLoader(sample, batch_size=args.per_device_eval_batch_size, collate_fn=collator)
    with random_states_kept():
        # Augmentation draws from the global generators; training is not to notice.
        seed_generators(args.seed)
        return [{name: batch[name] for name in (image_key, "labels") if name in batch} for batch in loader]
