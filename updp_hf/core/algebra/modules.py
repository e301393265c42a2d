"""The doors between modules and affine maps: the map that a module computes, and a module that computes a map."""

from typing import Any

import torch
from torch import Tensor, nn

from updp_hf.core.algebra.affine import AffineMap, diagonal
from updp_hf.model.modules_updp import ChannelBatchNorm

__all__ = ["empty", "is_readable", "is_writable", "read", "write"]


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
        return diagonal(f64(next(module.parameters())), None, like)
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
    return diagonal(scale, shift, like)


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
