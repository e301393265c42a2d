"""BatchNorms of several processes: one normalisation over all images, and the running statistics of one process."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import broadcast
from timm.layers import convert_sync_batchnorm
from torch import nn
from transformers.utils import logging

from updp_hf.training.arguments import UPDPTrainingArguments

__all__ = ["share_buffers_", "synchronized_batch_norms"]

logger = logging.get_logger(__name__)


def share_buffers_(model: nn.Module) -> None:
    """Give all processes the running statistics of the main one, which is the one that saves.

    While training, each has its own from its own images, until the next forward.
    """
    for buffer in model.buffers():
        buffer.copy_(broadcast(buffer))


@contextmanager
def synchronized_batch_norms(model: nn.Module, args: UPDPTrainingArguments) -> Iterator[None]:
    """Let the BatchNorms of `model` normalise by the images of all processes within, if `args` ask for that.

    Their parameters stay the same.
    """
    stock = []
    if args.sync_batch_norm and args.world_size > 1 and args.device.type == "cpu":
        logger.warning_once("SyncBatchNorm needs GPUs: on the CPU each process normalises by its own images.")
    elif args.sync_batch_norm and args.world_size > 1:
        stock = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.modules.batchnorm._BatchNorm)
        ]
        convert_sync_batchnorm(model)
    try:
        yield
    finally:
        for parent, name, child in stock:
            setattr(parent, name, child)
