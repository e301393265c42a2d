"""The losses: of the labels, hard or mixed, and of a teacher's predictions."""

from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from updp_hf.errors import UPDPError

__all__ = ["distillation_losses", "label_loss"]


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


def distillation_losses(student: Tensor, teacher: Tensor, *, hard: bool, temperature: float = 1.0) -> Tensor:
    """Return the distillation loss of each image, from logits of shape `(batch, classes)`.

    Soft distillation is temperature² · KL(teacher ‖ student), both softened (Hinton et al., arXiv 1503.02531); hard
    distillation is the cross entropy with the teacher's classes (DeiT, arXiv 2012.12877).

    Raises:
        ValueError: student and teacher have different classes.
    """
    if student.shape != teacher.shape:
        raise UPDPError(
            f"The teacher returns logits of shape {tuple(teacher.shape)}, the student {tuple(student.shape)}: use a "
            "teacher with the same classes."
        )
    if hard:
        return F.cross_entropy(student, teacher.argmax(-1), reduction="none")
    target = F.log_softmax(teacher / temperature, -1)
    found = F.log_softmax(student / temperature, -1)
    return temperature**2 * F.kl_div(found, target, reduction="none", log_target=True).sum(-1)
