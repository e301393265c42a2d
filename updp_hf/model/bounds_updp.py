"""Bounds on what is built from an untrusted configuration before its weights are there: no real model reaches them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from .layout_updp import UPDPError

__all__ = ["small_skeleton"]

MAX_MODULES = 2**13
"""Largest number of modules in a model."""

MAX_OPERATIONS = 2**15
"""Largest number of operations on tensors while the skeleton is built."""

MAX_VALUES = 2**16
"""Largest tensor that is computed while the skeleton is built, such as the rates of drop path."""


@contextmanager
def small_skeleton() -> Iterator[None]:
    """Stop a model from being built within if it takes more modules, time or memory than any image classifier does.

    Time and memory are bounded on the device `meta` alone, where `from_pretrained` builds a model before it loads it.

    Raises:
        UPDPError: it does.
    """
    is_on_meta = torch.empty(0).device.type == "meta"
    with _few_modules(), _SmallTensors() if is_on_meta else nullcontext():  # type: ignore[no-untyped-call]
        yield


@contextmanager
def _few_modules() -> Iterator[None]:
    count = 0

    def count_one(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise UPDPError(f"it has more than {MAX_MODULES} modules")

    hook = register_module_module_registration_hook(count_one)
    try:
        yield
    finally:
        hook.remove()


class _SmallTensors(TorchDispatchMode):
    """Stops before a large tensor is allocated on a real device. The weights are on `meta`, where they take nothing.

    An operation on another device is tried on `meta` first, which tells the size of its result.
    """

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count += 1
        if self.count > MAX_OPERATIONS:
            raise UPDPError(f"it takes more than {MAX_OPERATIONS} operations to build")
        if not _is_on_meta(args, kwargs) and (size := _size_of_result(func, args, kwargs)) > MAX_VALUES:
            raise UPDPError(f"it computes a tensor of {size} values while it is built")
        return func(*args, **kwargs)


def _is_on_meta(args: Any, kwargs: Any) -> bool:
    devices = [getattr(value, "device", value) for value in tree_iter((args, kwargs))]
    devices = [device for device in devices if isinstance(device, torch.device)]
    return bool(devices) and all(device.type == "meta" for device in devices)


def _size_of_result(func: Any, args: Any, kwargs: Any) -> int:
    args, kwargs = tree_map(_on_meta, (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs["device"] = torch.device("meta")
    try:
        results = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # the result depends on the values, of which there are few
        return 0
    return sum(value.numel() for value in tree_iter(results) if isinstance(value, Tensor))


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
