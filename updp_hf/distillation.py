"""Learning from a teacher's predictions."""

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["distillation_losses"]


def distillation_losses(student: Tensor, teacher: Tensor, *, hard: bool, temperature: float = 1.0) -> Tensor:
    """Return the distillation loss of each image, from logits of shape `(batch, classes)`.

    Soft distillation is temperature² · KL(teacher ‖ student), both softened (Hinton et al., arXiv 1503.02531); hard
    distillation is the cross entropy with the teacher's classes (DeiT, arXiv 2012.12877).

    Raises:
        ValueError: student and teacher have different classes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The teacher returns logits of shape {tuple(teacher.shape)}, the student {tuple(student.shape)}: use a "
            "teacher with the same classes."
        )
    if hard:
        return F.cross_entropy(student, teacher.argmax(-1), reduction="none")
    target = F.log_softmax(teacher / temperature, -1)
    found = F.log_softmax(student / temperature, -1)
    return temperature**2 * F.kl_div(found, target, reduction="none", log_target=True).sum(-1)
