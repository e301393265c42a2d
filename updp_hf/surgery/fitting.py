"""One Linear or convolution fitted by least squares to what a run of a gated model does."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from updp_hf.core.algebra.least_squares import Moments, fit_linear, statistics_of_fit
from updp_hf.core.gates.detour import Landing, Shortcut
from updp_hf.core.gates.gate import Gate
from updp_hf.core.plan.site import Site
from updp_hf.model.layout_updp import get_slot
from updp_hf.model.modules_updp import ChannelBatchNorm
from updp_hf.surgery.gate import site_gates

__all__ = ["Fit", "Hook", "batch_norm_of", "set_norm_"]

Hook = Callable[[Tensor, Tensor], None]
"""Called with the input and the output of a module."""
IMAGES, PATCHES = 16, 2**14
"""A convolution is fitted to so many patches of so many images at a time: neighbouring patches are much alike."""


class Fit(NamedTuple):
    """One Linear or convolution to be fitted: what it reads, what it is to give, and the sums over both."""

    target: nn.Linear | nn.Conv2d
    norm: nn.BatchNorm1d | nn.BatchNorm2d | None  # behind the target
    leading: list[nn.Module]  # the closed modules that the input of the run passes before the target reads it
    first: nn.Module  # its input is that of the run
    last: Gate  # its output is what the target is to give
    last_slot: str
    moments: list[Moments]  # one for each group of the target

    @classmethod
    def of(cls, model: nn.Module, site: Site) -> "Fit | None":
        """Return what is to be fitted for `site`, None if its gates leave nothing to fit."""
        found = site_gates(model, site)
        entry = next((gate for gate in found if isinstance(gate, Shortcut)), found[-1])
        target = getattr(entry, "pruned", None)
        if not isinstance(target, nn.Linear | nn.Conv2d):
            return None
        slots = [get_slot(model, slot) for slot in site.slots]
        before = slots[: slots.index(entry)]
        leading = [module.closed() if isinstance(module, Gate) else module for module in before]
        norm = batch_norm_of(found[-1].closed()) if isinstance(found[-1], Landing) else None
        last = site.slots[slots.index(found[-1])]
        return cls(target, norm, leading, before[0] if before else entry, found[-1], last, [])

    def hooks(self, wanted: Sequence[Tensor] | None = None) -> dict[nn.Module, Hook]:
        """Return the hooks that sum what `write_` needs; `wanted`, of each batch, stands for what `last` gives."""
        seen: list[Tensor] = []
        others = None if wanted is None else iter(wanted)

        def read(x: Tensor, y: Tensor) -> None:
            x = self.leading[0](x) if isinstance(self.first, Gate) else y
            for module in self.leading[1:]:
                x = module(x)
            seen.append(x)

        def add(x: Tensor, y: Tensor) -> None:
            self._sum(seen.pop() if seen else x, y if others is None else next(others))

        if self.first is self.last:
            return {self.first: add}
        if not self.leading:
            return {self.first: lambda x, y: seen.append(x), self.last: add}
        return {self.first: read, self.last: add}

    def _sum(self, x: Tensor, y: Tensor) -> None:
        if isinstance(self.target, nn.Linear):
            found = [Moments.joint(x, y)]
        else:
            chunks = zip(x.split(IMAGES), y.split(IMAGES), strict=True)
            parts = [_moments_of_patches(self.target, *chunk) for chunk in chunks]
            found = [sum(group[1:], group[0]) for group in zip(*parts, strict=True)]
        self.moments[:] = [a + b for a, b in zip(self.moments, found, strict=True)] if self.moments else found

    def write_(self) -> None:
        """Give the target the weights of least squares."""
        fitted = [fit_linear(moments) for moments in self.moments]
        weights, biases = zip(*fitted, strict=True)
        self.target.weight.copy_(torch.cat(weights).view_as(self.target.weight))
        assert self.target.bias is not None
        self.target.bias.copy_(torch.cat(biases))
        if self.norm is not None:
            groups = [statistics_of_fit(moments, *fit) for moments, fit in zip(self.moments, fitted, strict=True)]
            mean, variance = map(torch.cat, zip(*groups, strict=True))
            set_norm_(self.norm, mean, variance, torch.sqrt(variance + self.norm.eps), mean)


def _moments_of_patches(conv: nn.Conv2d, x: Tensor, y: Tensor) -> list[Moments]:
    """Sum over the patches of `x` that `conv` sees and the pixels of `y` that it is to give, for each of its groups."""
    assert isinstance(conv.padding, tuple)
    patches = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT  # (batch, pixels, in * kernel)
    step = max(1, patches.shape[0] * patches.shape[1] // PATCHES)
    while math.gcd(step, y.shape[-1]) > 1:  # else some columns would never be sampled
        step += 1
    patches = patches.flatten(0, 1)[::step]
    wanted = y.flatten(2).mT.flatten(0, 1)[::step]
    groups = zip(patches.chunk(conv.groups, 1), wanted.chunk(conv.groups, 1), strict=True)
    return [Moments.joint(*group) for group in groups]


def batch_norm_of(closed: nn.Module) -> nn.BatchNorm1d | nn.BatchNorm2d:
    """Return the BatchNorm in `closed`, which may have an activation behind it."""
    norm = closed[0] if isinstance(closed, nn.Sequential) else closed
    assert isinstance(norm, nn.BatchNorm2d | ChannelBatchNorm)
    return norm.norm if isinstance(norm, ChannelBatchNorm) else norm


def set_norm_(
    norm: nn.BatchNorm1d | nn.BatchNorm2d, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor
) -> None:
    """Give `norm` these statistics, scale and shift."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(weight)
    norm.bias.copy_(bias)
