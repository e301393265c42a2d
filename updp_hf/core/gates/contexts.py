"""Temporary states of a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from updp_hf.core.gates.gate import Gate, gates

__all__ = ["evaluation", "full_precision", "open_gates", "stock_statistics_kept"]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode, and give each module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def full_precision() -> Iterator[None]:
    """Let GPUs compute float32 in float32 within: in TF32, torch's default for convolutions, a thousandth is lost."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    name, full = ("fp32_precision", "ieee") if hasattr(cudnn, "conv") else ("allow_tf32", False)  # since torch 2.9
    parts = (getattr(cudnn, "conv", cudnn), matmul)
    asked = [getattr(part, name) for part in parts]
    for part in parts:
        setattr(part, name, full)
    try:
        yield
    finally:
        for part, value in zip(parts, asked, strict=True):
            setattr(part, name, value)


@contextmanager
def open_gates(model: nn.Module) -> Iterator[None]:
    """Let every gate of `model` compute its original side, whatever its λ."""
    stages = [(module, module.stage) for module in model.modules() if isinstance(module, Gate)]
    for gate, _ in stages:
        gate.stage = 0.0
    try:
        yield
    finally:
        for gate, stage in stages:
            gate.stage = stage


@contextmanager
def stock_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Let no BatchNorm of the checkpoint update its running statistics: they describe the open network.

    While training they normalise by the batch all the same. Those on the pruned sides of gates go on updating theirs.
    """
    own = {id(m) for _, gate in gates(model) for m in getattr(gate, "pruned", nn.Identity()).modules()}
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and id(m) not in own]
    tracking = [norm for norm in norms if norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
