"""What a leaf module is to a run: an affine map, a non-linearity that can be closed, or neither.

Roles are read off the exported operations, not off class names: an activation is any module without parameters that
computes pointwise operations only, so GELU, QuickGELU and a user's own are found alike.
"""

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import nn

from updp_hf.core import affine
from updp_hf.core.graph import Call
from updp_hf.layout_updp import ChannelBatchNorm

__all__ = [
    "Closing",
    "Role",
    "close_activation",
    "close_norm",
    "is_pointwise",
    "is_registered",
    "register_closable",
    "role_of",
]

Closing = Callable[[nn.Module], nn.Module]
"""From a non-linearity to the affine module that it closes to."""


class Role(Enum):
    """What a module contributes to a run."""

    DENSE = "mixes channels"
    DIAGONAL = "scales and shifts each channel"
    NORM = "normalises, closes to a BatchNorm"
    ACTIVATION = "is pointwise, closes to the identity"


def _to_identity(module: nn.Module) -> nn.Module:
    return nn.Identity()


_REGISTERED: dict[type[nn.Module], Closing] = {nn.PReLU: _to_identity}

_NORMS = {torch.ops.aten.layer_norm.default, torch.ops.aten.rms_norm.default}
_MULTIPLICATIONS = {torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor}
_UNTAGGED = {  # pointwise, but torch does not tag them so
    torch.ops.aten.hardswish.default,
    torch.ops.aten.hardswish_.default,
    torch.ops.aten.log_sigmoid.default,
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


def role_of(module: nn.Module, call: Call) -> Role | None:
    """Return the role of `module`, whose one call is `call`, or None if it ends every run."""
    if len(call.inputs) != 1 or call.shape is None:
        return None
    if is_registered(module):
        return Role.ACTIVATION
    targets = call.targets
    if type(module) is nn.Linear:
        return Role.DENSE if targets == [torch.ops.aten.linear.default] else None
    if len(targets) == 1 and targets[0] in _NORMS:
        return Role.NORM if call.operations[0].args[1] == [call.shape[-1]] else None
    if affine.is_readable(module):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # It acts on axis 1, the Linears around it on the last one.
            return Role.DIAGONAL if targets == [torch.ops.aten.batch_norm.default] and len(call.shape) == 2 else None
        scales = len(targets) == 1 and targets[0] in _MULTIPLICATIONS
        return Role.DIAGONAL if scales and next(module.parameters()).numel() == call.shape[-1] else None
    if call.shape != call.inputs[0].shape:
        return None
    has_tensors = any(True for _ in (*module.parameters(), *module.buffers()))
    if not has_tensors and all(is_pointwise(target) for target in targets):
        return Role.ACTIVATION
    return None


def close_activation(module: nn.Module) -> nn.Module:
    """Build what the activation `module` closes to."""
    return _REGISTERED.get(type(module), _to_identity)(module)


def close_norm(module: nn.Module) -> ChannelBatchNorm:
    """Build the BatchNorm that the norm `module`, over the last axis, closes to. It is not calibrated yet."""
    shape = getattr(module, "normalized_shape", None)
    channels = shape[-1] if shape else next(module.parameters()).numel()
    eps = getattr(module, "eps", None)
    return ChannelBatchNorm(channels, eps if isinstance(eps, float) else 1e-5)
