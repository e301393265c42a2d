"""Modules of ours that a merged model may hold, beside those of torch.

This file needs nothing but torch, because it travels to the Hub together with the modelling file.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "END_ACTIVATIONS",
    "EPS",
    "ChannelBatchNorm",
    "EndActivation",
    "LetPass",
    "PassNext",
    "Skip",
    "Zero",
    "batch_norm",
    "batch_norm_and_activation",
    "first_tensor",
    "unwrap",
]

END_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
EPS = 1e-5
"""Of BatchNorms that are put in where the checkpoint has no norm."""


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first tensor among the arguments of a call, which is the activation by every stock convention."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def with_outputs(value: Tensor, outputs: int) -> Tensor | tuple[Tensor | None, ...]:
    """Shape `value` like the return value of the replaced module: bare for 0 outputs, else a tuple padded with None."""
    return value if outputs == 0 else (value, *[None] * (outputs - 1))


class Zero(nn.Module):
    """Return zeros shaped like the input: a branch that was dropped, its addition left as the stock forward has it."""

    def __init__(self, outputs: int = 0):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        return with_outputs(torch.zeros_like(first_tensor(args, kwargs)), self.outputs)


class Skip(nn.Module):
    """Return the input: a block that was dropped."""

    def __init__(self, outputs: int = 0):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        return with_outputs(first_tensor(args, kwargs), self.outputs)


class ChannelBatchNorm(nn.Module):
    """BatchNorm over the last axis, for tokens of shape `(batch, ..., channels)`.

    `nn.BatchNorm1d` on tokens normalises axis 1, silently so when there are as many tokens as channels.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.norm(x.reshape(-1, x.shape[-1]))
        return normalised.view(x.shape)


class EndActivation(nn.Module):
    """A block followed by BatchNorm and an activation, as UPDP (arXiv 2401.06426) puts at the end of a pruned block."""

    stock_child = "block"

    def __init__(self, block: nn.Module, end: nn.Module):
        super().__init__()
        self.block = block
        self.end = end.train(block.training)
        self.training = block.training  # what is frozen inside `block` keeps its own mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        if isinstance(output, Tensor):
            return self.end(output)
        return (self.end(output[0]), *output[1:])


class PassNext(nn.Module):
    """Return the input, and let it pass the `LetPass` that is called next: in merged models of release 0.1 only.

    A block may call one activation several times, of which one was pruned. Such sites are not found any more.
    """

    called = threading.local()

    def forward(self, x: Tensor) -> Tensor:
        self.called.passes = True
        return x


class LetPass(nn.Module):
    """An activation that lets through what comes right after a `PassNext`."""

    stock_child = "activation"

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation
        self.training = activation.training
        for part in activation.modules():
            if getattr(part, "inplace", False):
                part.inplace = False  # type: ignore[assignment]  # what passes has to stay as it is

    def forward(self, x: Tensor) -> Tensor:
        passes, PassNext.called.passes = getattr(PassNext.called, "passes", False), False
        return x if passes else self.activation(x)


def batch_norm(channels: int, eps: float, channel_axis: int) -> nn.BatchNorm2d | ChannelBatchNorm:
    """Build a BatchNorm for `(batch, channels, height, width)` if `channel_axis` is 1, else over the last axis."""
    return nn.BatchNorm2d(channels, eps) if channel_axis == 1 else ChannelBatchNorm(channels, eps)


def batch_norm_and_activation(channels: int, eps: float, channel_axis: int, activation: str) -> nn.Sequential:
    """Build what `EndActivation` puts behind a block."""
    return nn.Sequential(batch_norm(channels, eps, channel_axis), END_ACTIVATIONS[activation]())


def unwrap(module: nn.Module) -> nn.Module:
    """Look through the modules of ours that wrap a stock module in its slot: they name it as `stock_child`."""
    while (name := getattr(module, "stock_child", None)) is not None:
        module = getattr(module, name)
    return module
