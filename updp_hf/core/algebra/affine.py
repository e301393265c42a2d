"""The algebra of affine maps. All merging in this package is a fold with `compose` and `add`.

`read` and `write` in `modules.py` are the only doors between it and `nn.Module`. Everything inside is float64.
"""

import math
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from updp_hf.errors import UPDPError

__all__ = [
    "AffineMap",
    "InexactMerge",
    "add",
    "apply",
    "compose",
    "diagonal",
    "fold",
    "identity",
]


class InexactMerge(UPDPError):  # noqa: N818
    """Two maps have no single map that equals them everywhere, borders included."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """An affine map on the channels (and a spatial neighbourhood) of a tensor.

    A Linear has an empty kernel and acts on the last axis; a convolution acts on axis 1. Padding is zero padding.
    """

    weight: Tensor  # (out, in / groups, *kernel), float64
    bias: Tensor  # (out,), float64
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()  # (left, right) for the last axis, then (top, bottom), as F.pad counts them
    dilation: tuple[int, ...] = ()
    groups: int = 1
    channel_axis: int = -1

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def is_pointwise(self) -> bool:
        """Whether one output position depends on one input position only."""
        return math.prod(self.kernel) == 1 and not any(self.padding) and all(s == 1 for s in self.stride)


def apply(map: AffineMap, x: Tensor) -> Tensor:
    """Apply `map` to `x`, of shape `(..., in)` for a Linear and `(batch, in, *spatial)` for a convolution."""
    if not map.kernel:
        if map.groups == 1:
            return F.linear(x, map.weight, map.bias)
        blocks = x.unflatten(-1, (map.groups, -1))  # (..., groups, in / groups)
        weight = map.weight.unflatten(0, (map.groups, -1))  # (groups, out / groups, in / groups)
        return torch.einsum("...gi,goi->...go", blocks, weight).flatten(-2) + map.bias
    convolve = {1: F.conv1d, 2: F.conv2d}[len(map.kernel)]
    padded = F.pad(x, map.padding)
    return convolve(padded, map.weight, map.bias, map.stride, 0, map.dilation, map.groups)


def identity(like: AffineMap) -> AffineMap:
    """Return the identity on the input of `like`."""
    return diagonal(like.bias.new_ones(like.in_channels), None, like)


def compose(first: AffineMap, then: AffineMap) -> AffineMap:
    """Return the one map that equals `first` followed by `then`, for every input and at every position.

    Kernel `k1 + s1 (k2 - 1)`, stride `s1 s2`, padding `p1 + s1 p2`, bias `b2 + sum(W2) b1`, kernels counted with
    their dilation.

    Raises:
        InexactMerge: `then` pads with zeros what `first` would not have made zero, so that the border differs.
    """
    if first.channel_axis != then.channel_axis or len(first.kernel) != len(then.kernel):
        raise InexactMerge(
            f"A map on axis {first.channel_axis} with kernel {first.kernel} is followed by one on axis "
            f"{then.channel_axis} with kernel {then.kernel}; only maps on the same axis have a common map."
        )
    if first.out_channels != then.in_channels:
        raise UPDPError(f"A map to {first.out_channels} channels is followed by one from {then.in_channels}.")
    _check_border(first, then)
    groups = math.gcd(first.groups, then.groups)
    first, then = _with_groups(first, groups), _with_groups(then, groups)
    taps = then.weight.flatten(2).sum(-1) if then.kernel else then.weight  # (out, mid / groups)
    bias = apply(AffineMap(taps, then.bias, groups=groups), first.bias)
    dilation, first_weight, then_weight = _common_dilation(first, then)
    blocks = [
        _compose_weights(a, b, first.stride)
        for a, b in zip(first_weight.chunk(groups), then_weight.chunk(groups), strict=True)
    ]
    per_axis = [s for s in reversed(first.stride) for _ in range(2)]  # in the order of `padding`
    return AffineMap(
        weight=torch.cat(blocks),
        bias=bias,
        stride=tuple(a * b for a, b in zip(first.stride, then.stride, strict=True)),
        padding=tuple(p + s * q for p, s, q in zip(first.padding, per_axis, then.padding, strict=True)),
        dilation=dilation,
        groups=groups,
        channel_axis=first.channel_axis,
    )


def add(left: AffineMap, right: AffineMap) -> AffineMap:
    """Return the one map that equals the sum of both, for maps whose kernels can be centred on each other.

    Raises:
        InexactMerge: strides differ, or the kernels do not line up.
    """
    groups = math.gcd(left.groups, right.groups)
    left, right = _with_groups(_undilated(left), groups), _with_groups(_undilated(right), groups)
    if left.stride != right.stride or left.channel_axis != right.channel_axis:
        raise InexactMerge(f"Maps with strides {left.stride} and {right.stride} have no sum that is one map.")
    padding = tuple(max(p, q) for p, q in zip(left.padding, right.padding, strict=True))
    weights = [F.pad(m.weight, [p - q for p, q in zip(padding, m.padding, strict=True)]) for m in (left, right)]
    if weights[0].shape != weights[1].shape:
        raise InexactMerge(
            f"Kernels {left.kernel} (padding {left.padding}) and {right.kernel} (padding {right.padding}) give outputs "
            "of different sizes, so they cannot be added."
        )
    return replace(
        left, weight=weights[0] + weights[1], bias=left.bias + right.bias, padding=padding, dilation=left.dilation
    )


def fold(maps: list[AffineMap]) -> AffineMap:
    """Compose `maps`, the first one applied first."""
    return reduce(compose, maps)


def diagonal(scale: Tensor, shift: Tensor | None, like: AffineMap | None) -> AffineMap:
    """Return the map that scales and shifts each channel, on as many spatial axes as `like` has."""
    axes = 0 if like is None else len(like.kernel)
    return AffineMap(
        weight=scale.reshape(-1, 1, *[1] * axes).clone(),
        bias=torch.zeros_like(scale) if shift is None else shift,
        stride=(1,) * axes,
        padding=(0, 0) * axes,
        dilation=(1,) * axes,
        groups=scale.numel(),
        channel_axis=-1 if like is None else like.channel_axis,
    )


def _with_groups(map: AffineMap, groups: int) -> AffineMap:
    """Write `map` with fewer groups, by filling in the zeros between its blocks."""
    if map.groups == groups:
        return map
    merged = map.groups // groups  # blocks that become one
    blocks = map.weight.unflatten(0, (groups, merged, -1))  # (groups, merged, out, in, *kernel)
    weight = blocks.new_zeros(groups, merged, *blocks.shape[2:3], merged, *blocks.shape[3:])
    diagonal = torch.arange(merged, device=weight.device)
    weight[:, diagonal, :, diagonal] = blocks.movedim(1, 0)
    return replace(map, weight=weight.flatten(3, 4).flatten(0, 2), groups=groups)


def _undilated(map: AffineMap) -> AffineMap:
    """Write a dilated kernel as a dense one, with explicit zeros."""
    if all(d == 1 for d in map.dilation):
        return map
    size = [d * (k - 1) + 1 for d, k in zip(map.dilation, map.kernel, strict=True)]
    weight = map.weight.new_zeros(*map.weight.shape[:2], *size)
    taps = weight
    for axis, d in enumerate(map.dilation, start=2):
        taps = taps.unfold(axis, 1, d).squeeze(-1)  # a view of every d-th tap
    taps.copy_(map.weight)
    return replace(map, weight=weight, dilation=(1,) * len(size))


def _common_dilation(first: AffineMap, then: AffineMap) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Keep the dilation of one map where the other is a single tap; otherwise both become dense."""
    if math.prod(then.kernel) == 1:
        return first.dilation, first.weight, then.weight
    if math.prod(first.kernel) == 1 and all(s == 1 for s in first.stride):
        return then.dilation, first.weight, then.weight
    return (1,) * len(first.kernel), _undilated(first).weight, _undilated(then).weight


def _compose_weights(first: Tensor, then: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Convolve two kernels, the second one's taps `stride` apart: (out, mid, *k2) after (mid, in, *k1)."""
    if first.ndim == 2:
        return then @ first
    transpose = {1: F.conv_transpose1d, 2: F.conv_transpose2d}[first.ndim - 2]
    return transpose(then, first, stride=stride)  # (out, in, *(k1 + s (k2 - 1)))


def _check_border(first: AffineMap, then: AffineMap) -> None:
    if not any(then.padding):
        return
    pointwise = math.prod(first.kernel) == 1 and not any(first.padding)
    if pointwise and not first.bias.any():
        return
    cause = "a bias that the padding would not carry" if pointwise else f"a kernel {first.kernel} that reaches over it"
    raise InexactMerge(
        f"A map with padding {then.padding} follows one with {cause}: no single map is equal at the border. "
        "Move the padding to the front of the run first."
    )
