"""Versions of a network of timm with more and more sites merged."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from updp_hf import Plan, close_, merge, recalibrate_batch_norms_
from updp_hf.surgery.calibrate import calibrated_copy
from updp_hf.surgery.model_io import example_inputs_of

CALIBRATION_IMAGES = 8


@torch.no_grad()
def randomize_(model: nn.Module) -> None:
    """Give `model` weights under which activations keep their scale, and statistics unlike those of a fresh net."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.1)
        elif parameter.dim() == 1:  # scales of norms and of branches
            parameter.uniform_(0.5, 1.5)
        elif name.endswith("weight"):
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    recalibrate_batch_norms_(model, [example_inputs_of(model, CALIBRATION_IMAGES)])
    for norm in norms:
        norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.7, 1.4)


def merged(baseline: nn.Module, plan: Plan, batches: Sequence[dict[str, Tensor]]) -> nn.Module:
    """Return a copy of `baseline` in which the sites of `plan` are closed and merged, without training."""
    model = calibrated_copy(baseline, plan, batches)
    close_(model)
    return merge(model)
