"""The algebra of affine maps. All merging in this package is a fold with `compose` and `add`.

`read` and `write` are the only doors between this algebra and `nn.Module`. Everything inside is float64.
"""

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from updp_hf.errors import UPDPError
from updp_hf.model.modules_updp import ChannelBatchNorm

__all__ = [
    "AffineMap",
    "InexactMerge",
    "add",
    "apply",
    "compose",
    "empty",
    "fold",
    "identity",
    "is_readable",
    "is_writable",
    "read",
    "write",
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
    return _diagonal(like.bias.new_ones(like.in_channels), None, like)


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
    _refuse_leaking_border(first, then)
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


def is_readable(module: nn.Module) -> bool:
    """Return whether `read` accepts `module`.

    A subclass of Linear or of a convolution may compute its weight or pad at run time, so it must have their forward.
    That a BatchNorm does nothing else, and that a scale multiplies, the graph has to show.
    """
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        is_stock = type(module).forward in (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward)
        return is_stock and not nn.utils.parametrize.is_parametrized(module) and _pads_zeros(module)
    return isinstance(module, _BATCH_NORMS) or _is_scale(module)


def read(module: nn.Module, like: AffineMap | None = None, *, device: str = "cpu") -> AffineMap:
    """Read the map that `module` computes in evaluation mode, in float64.

    `like` tells a diagonal map (BatchNorm, LayerScale) how many spatial axes it acts on: those of its neighbour. On the
    device `meta` the map has shapes and no values, which is enough to know what a composition would cost.

    Raises:
        TypeError: the module is none of the types whose map is known.
    """

    def f64(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, torch.float64, copy=True)

    if not is_readable(module):
        raise TypeError(f"{type(module).__name__} has no affine map that is known: expected Linear, Conv or BatchNorm.")
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        weight = f64(module.weight)
        bias = weight.new_zeros(weight.shape[0]) if module.bias is None else f64(module.bias)
        if isinstance(module, nn.Linear):
            return AffineMap(weight, bias)
        padding = _padding(module)
        return AffineMap(weight, bias, module.stride, padding, module.dilation, module.groups, channel_axis=1)
    if _is_scale(module):
        return _diagonal(f64(next(module.parameters())), None, like)
    norm = module.norm if isinstance(module, ChannelBatchNorm) else module
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if norm.running_mean is None or norm.running_var is None:
        raise TypeError(f"{type(module).__name__} keeps no running statistics, so it is not an affine map.")
    mean, variance = f64(norm.running_mean), f64(norm.running_var)
    scale = torch.rsqrt(variance + norm.eps)
    if norm.affine:
        scale = scale * f64(norm.weight)
    shift = -mean * scale
    if norm.affine:
        shift = shift + f64(norm.bias)
    return _diagonal(scale, shift, like)


def is_writable(map: AffineMap) -> bool:
    """Return whether there is a Linear or a two-dimensional convolution that computes `map`."""
    if not map.kernel:
        return map.groups == 1
    return len(map.kernel) == 2 and map.padding[::2] == map.padding[1::2]


def empty(map: AffineMap, **options: Any) -> nn.Linear | nn.Conv2d:
    """Build the Linear or Conv2d that can compute `map`, with a bias and without values; `options` as for both.

    Raises:
        TypeError: neither of them can.
    """
    if not is_writable(map):
        raise TypeError(
            f"A map with kernel {map.kernel}, padding {map.padding} and {map.groups} groups is neither a Linear nor a "
            "Conv2d."
        )
    kind: type[nn.Module] = nn.Linear
    if map.kernel:
        kind = nn.Conv2d
        options |= {"kernel_size": map.kernel, "stride": map.stride, "padding": map.padding[::-2]}
        options |= {"dilation": map.dilation, "groups": map.groups}
    module: nn.Linear | nn.Conv2d = nn.utils.skip_init(kind, map.in_channels, map.out_channels, **options)
    return module


def write(map: AffineMap, like: nn.Module) -> nn.Linear | nn.Conv2d:
    """Write `map` into a new Linear or Conv2d with the dtype, device and mode of `like`.

    Raises:
        TypeError: neither of them computes it.
    """
    parameter = next(like.parameters())
    module = empty(map, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad():
        module.weight.copy_(map.weight)
        assert module.bias is not None
        module.bias.copy_(map.bias)
    return module.train(like.training)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, ChannelBatchNorm)


def _pads_zeros(module: nn.Linear | nn.Conv1d | nn.Conv2d) -> bool:
    return isinstance(module, nn.Linear) or module.padding_mode == "zeros"


def _is_scale(module: nn.Module) -> bool:
    """A layer scale by its content: one vector and nothing else. That it multiplies, the graph has to show."""
    tensors = [*module.parameters(), *module.buffers()]
    is_leaf = next(module.children(), None) is None
    return is_leaf and len(tensors) == 1 and tensors[0].ndim == 1 and isinstance(tensors[0], nn.Parameter)


def _padding(module: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    if module.padding == "valid":
        return (0, 0) * len(module.kernel_size)
    if isinstance(module.padding, str):  # "same"
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple(p for total in reversed(totals) for p in (total // 2, total - total // 2))
    return tuple(p for p in reversed(module.padding) for _ in range(2))


def _diagonal(scale: Tensor, shift: Tensor | None, like: AffineMap | None) -> AffineMap:
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


def _refuse_leaking_border(first: AffineMap, then: AffineMap) -> None:
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
