"""Temporary states of a model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from updp_hf.core.gate import Gate

__all__ = ["evaluation", "open_gates"]


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
