"""Learning from a teacher's predictions, beside the labels or instead of them."""

import copy

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from updp_hf.core.gates.gate import is_gated
from updp_hf.errors import UPDPError

__all__ = ["distillation_losses", "frozen_teacher"]


def frozen_teacher(teacher: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of `teacher` on `device` that only predicts, in bf16 on a GPU.

    Raises:
        ValueError: it has gates.
    """
    if is_gated(teacher):
        raise UPDPError("The teacher has gates, expected an unpruned image classifier: pass one as `teacher`.")
    copied = copy.deepcopy(teacher).to(device, torch.bfloat16 if device.type == "cuda" else None)
    return copied.eval().requires_grad_(False)


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
