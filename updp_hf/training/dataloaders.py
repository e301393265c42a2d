"""How loaders of the Trainer are made otherwise, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from updp_hf.training.arguments import UPDPTrainingArguments

__all__ = ["nothing_dropped", "read_by_each_process"]


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
