"""What a module is to a run: an affine map, a non-linearity that can be closed, or neither.

Roles are read off the exported operations, not off class names: an activation is any module that computes pointwise
operations only, so GELU, StarReLU and a user's own are found alike; a module that multiplies its input by what it made
of the pooled input is squeeze-excite or one of its many kin.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from updp_hf.core.algebra import modules
from updp_hf.core.graph.calls import Call
from updp_hf.model.modules_updp import EPS, batch_norm

__all__ = [
    "Closing",
    "Part",
    "Role",
    "bends",
    "close_activation",
    "close_norm",
    "is_pointwise",
    "is_registered",
    "part_of",
    "recalibrated_axis",
    "register_closable",
]

Closing = Callable[[nn.Module], nn.Module]
"""From a non-linearity to the affine module that it closes to."""


class Role(Enum):
    """What a module contributes to a run."""

    DENSE = "mixes channels"
    DIAGONAL = "scales and shifts each channel"
    NORM = "normalises, closes to a BatchNorm"
    RECALIBRATION = "multiplies each channel by a function of all means, closes to a BatchNorm"
    ACTIVATION = "is pointwise, closes to the identity"


class Part(NamedTuple):
    """A module's part in a run: its role, and the axis of the channels, None if it does not matter."""

    role: Role
    axis: int | None


def _to_identity(module: nn.Module) -> nn.Module:
    return nn.Identity()


_REGISTERED: dict[type[nn.Module], Closing] = {nn.PReLU: _to_identity}

_NORMS = {torch.ops.aten.layer_norm.default, torch.ops.aten.rms_norm.default}
_RESHAPES = {
    torch.ops.aten.permute.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.expand_as.default,
}
_MULTIPLICATIONS = {torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor}
_ARITHMETIC = {
    *_MULTIPLICATIONS,
    torch.ops.aten.add.Tensor,
    torch.ops.aten.add_.Tensor,
    torch.ops.aten.sub.Tensor,
    torch.ops.aten.div.Tensor,
    torch.ops.aten.neg.default,
    torch.ops.aten.addcmul.default,
}
_UNTAGGED = {  # pointwise, but torch does not tag them so
    torch.ops.aten.hardswish.default,
    torch.ops.aten.hardswish_.default,
    torch.ops.aten.log_sigmoid.default,
}
_POOLS: dict[Any, int | None] = {  # operation -> position of its dimensions, None for those that pool an image
    torch.ops.aten.mean.dim: 1,
    torch.ops.aten.amax.default: 1,
    torch.ops.aten.linalg_vector_norm.default: 2,
    torch.ops.aten.norm.ScalarOpt_dim: 2,
    torch.ops.aten.adaptive_avg_pool2d.default: None,
    torch.ops.aten.adaptive_max_pool2d.default: None,
}


def register_closable(module_class: type[nn.Module], closing: Closing | None = None) -> None:
    """Let runs cross modules of `module_class`, a non-linearity of your own that has parameters or children.

    Args:
        module_class: the exact class; it takes one tensor and returns one of the same shape.
        closing: from the module to the affine module that it closes to; the identity by default.

    Example:
        >>> register_closable(LearnedSwish)
    """
    _REGISTERED[module_class] = closing or _to_identity


def is_registered(module: nn.Module) -> bool:
    """Return whether `module` has been named to `register_closable`."""
    return type(module) in _REGISTERED


def is_pointwise(target: Any) -> bool:
    """Return whether the operation `target` maps each element by itself."""
    return target in _UNTAGGED or torch.Tag.pointwise in getattr(target, "tags", ())


def bends(calls: Sequence[Call]) -> bool:
    """Return whether `calls` map each element by itself, by more than scaling and shifting it."""
    targets = [target for call in calls for target in call.targets]
    is_elementwise = all(is_pointwise(target) or target in _RESHAPES for target in targets)
    return is_elementwise and any(target not in _ARITHMETIC | _RESHAPES for target in targets)


def part_of(module: nn.Module, call: Call) -> Part | None:
    """Return the part that `module`, whose one call is `call`, can take in a run, or None if it ends every run."""
    if len(call.inputs) != 1 or call.shape is None:
        return None
    if is_registered(module):
        return Part(Role.ACTIVATION, None)
    targets = call.targets
    if isinstance(module, nn.Linear):
        is_plain = targets == [torch.ops.aten.linear.default] and modules.is_readable(module)
        return Part(Role.DENSE, -1) if is_plain else None
    if isinstance(module, nn.Conv2d):
        is_plain = targets in ([torch.ops.aten.conv2d.default], [torch.ops.aten.conv2d.padding])
        return Part(Role.DENSE, 1) if is_plain and modules.is_readable(module) and len(call.shape) == 4 else None
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        # In three dimensions it acts on axis 1, and the Linears around it on the last one.
        is_plain = targets == [torch.ops.aten.batch_norm.default] and modules.is_readable(module)
        return Part(Role.DIAGONAL, {2: -1, 4: 1}[len(call.shape)]) if is_plain and len(call.shape) in (2, 4) else None
    if call.shape != call.inputs[0].shape:
        return None
    if (axis := _normalised_axis(call)) is not None:
        return Part(Role.NORM, axis)
    if modules.is_readable(module):
        return Part(Role.DIAGONAL, axis) if (axis := _scaled_axis(call)) is not None else None
    has_tensors = any(True for _ in (*module.parameters(), *module.buffers()))
    if bends([call]) or (not has_tensors and all(is_pointwise(target) for target in targets)):
        return Part(Role.ACTIVATION, None)
    if (axis := recalibrated_axis([call])) is not None:
        return Part(Role.RECALIBRATION, axis)
    return None


def recalibrated_axis(calls: Sequence[Call]) -> int | None:
    """Return the channel axis if `calls`, the inside of one module, multiply their input by what its means say.

    That is so if every operation either maps each element of the full-sized tensor by itself, or works on what is left
    after all positions have been pooled: squeeze-excite, effective squeeze-excite, ECA, global response normalisation.
    """
    nodes = [node for call in calls for node in call.operations]
    full: set[fx.Node] = set()  # what still has positions
    axes: set[int | None] = set()
    for node in nodes:
        sources = [n for n in node.all_input_nodes if n in full or (n not in nodes and n.op == "call_function")]
        if not sources:
            continue
        if node.target in _POOLS:
            axes.add(_pooled_axis(node))
        elif is_pointwise(node.target) or node.target in _RESHAPES:
            full.add(node)
        else:
            return None
    is_rescaled = len(axes) == 1 and nodes[-1] in full and len(calls[-1].shape or ()) == 4
    return axes.pop() if is_rescaled else None


def close_activation(module: nn.Module) -> nn.Module:
    """Build what the activation `module` closes to."""
    return _REGISTERED.get(type(module), _to_identity)(module)


def close_norm(module: nn.Module, channels: int, channel_axis: int) -> nn.Module:
    """Build the BatchNorm over `channel_axis` that the norm `module` closes to. It is not calibrated yet."""
    eps = getattr(module, "eps", None)
    return batch_norm(channels, eps if isinstance(eps, float) else EPS, channel_axis)


def _normalised_axis(call: Call) -> int | None:
    """Return the channel axis of a norm over channels (and positions), None if `call` is not such a norm."""
    rest = [node for node in call.operations if node.target not in _RESHAPES]
    assert call.shape is not None
    if len(rest) != 1:
        return None
    if rest[0].target is torch.ops.aten.group_norm.default and len(call.shape) == 4:
        return 1
    if rest[0].target not in _NORMS:
        return None
    normalised, shape = list(rest[0].args[1]), call.shape  # type: ignore[arg-type]
    if len(call.operations) == 1:
        return -1 if normalised == [shape[-1]] else None
    moved = tuple(rest[0].meta["val"].shape)
    return 1 if len(shape) == 4 and moved == (shape[0], *shape[2:], shape[1]) and normalised == [shape[1]] else None


def _scaled_axis(call: Call) -> int | None:
    """Return the axis along which `call` multiplies by a vector, None if it does something else."""
    *before, last = call.operations
    if last.target not in _MULTIPLICATIONS or any(node.target not in _RESHAPES for node in before):
        return None
    assert call.shape is not None
    scale = min((tuple(n.meta["val"].shape) for n in last.all_input_nodes), key=lambda s: sum(size > 1 for size in s))
    padded = (1,) * (len(call.shape) - len(scale)) + scale
    for axis in (-1, 1):
        others = [size for i, size in enumerate(padded) if i != axis % len(padded)]
        if padded[axis] == call.shape[axis] and all(size == 1 for size in others):
            return axis if axis == -1 or len(call.shape) == 4 else None
    return None


def _pooled_axis(node: fx.Node) -> int | None:
    """Return the axis of the channels that is left when `node` pools over all positions, None if it does not."""
    place = _POOLS[node.target]
    if place is None:
        return 1 if node.args[1] in (1, [1, 1]) else None
    dims = node.args[place] if len(node.args) > place else None
    if not isinstance(dims, list | tuple):
        return None
    return {(2, 3): 1, (1, 2): -1}.get(tuple(sorted(int(d) % 4 for d in dims)))  # type: ignore[arg-type]
