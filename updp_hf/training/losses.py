"""The loss of the labels, hard or mixed."""

from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["label_loss"]


def label_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Return the cross entropy with labels, the mean over the images: a `compute_loss_func` of a Trainer.

    The models of transformers would take mixed labels for several labels an image, and use another loss.

    Args:
        outputs: with logits of shape `(batch, classes)`.
        labels: classes of shape `(batch,)`, -100 for images that do not count, or their probabilities, mixed or
            smoothed, of shape `(batch, classes)`.
        num_items_in_batch: how many labels are in the accumulated batch of all processes, as the Trainer counts: each
            probability is one.
    """
    logits = outputs["logits"].float()
    if num_items_in_batch is None:
        return F.cross_entropy(logits, labels)
    images = num_items_in_batch / labels.shape[1] if labels.ndim == 2 else num_items_in_batch
    return F.cross_entropy(logits, labels, reduction="sum") / images
