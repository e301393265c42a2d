"""What a Trainer has to do for images: tell them the epoch, and report broken ones."""

from typing import Any, Protocol

from transformers import TrainerCallback
from transformers.utils import logging

from updp_hf.data.images import ImageDataset, ImageSubset

__all__ = ["BrokenImagesCallback", "EpochCallback"]

logger = logging.get_logger(__name__)


class Counted(Protocol):
    """Whatever counts broken images."""

    @property
    def broken(self) -> int:
        """How many there were."""
        ...


class EpochCallback(TrainerCallback):
    """Tell an `ImageDataset` which epoch begins.

    accelerate's loader does so as well, but not where it tells the sampler: with several processes, and for the rest
    of an epoch after resuming.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        dataset = getattr(train_dataloader, "dataset", None)
        if isinstance(dataset, ImageDataset | ImageSubset):
            dataset.set_epoch(int(state.epoch))


class BrokenImagesCallback(TrainerCallback):
    """Log how many broken images this process has met, and warn of them at the end of training.

    Args:
        *counted: the sets, or the tallies of streams, of training and of evaluation.
    """

    def __init__(self, *counted: Counted):
        self.counted = counted

    @property
    def broken(self) -> int:
        """All of them."""
        return sum(images.broken for images in self.counted)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and logs.keys() & {"loss", "eval_loss", "train_loss"} and self.broken:
            logs["broken_images"] = state.log_history[-1]["broken_images"] = self.broken

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.broken:
            logger.warning(
                f"{self.broken} images could not be read: in training others took their place, in evaluation they do "
                "not count."
            )
