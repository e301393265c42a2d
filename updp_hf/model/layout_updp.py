"""The layout of a merged model: which slots of the stock architecture hold something else, and what.

This file needs nothing but torch, because it travels to the Hub together with the modelling file.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .modules_updp import (
    END_ACTIVATIONS,
    EndActivation,
    LetPass,
    PassNext,
    Skip,
    Zero,
    batch_norm_and_activation,
    unwrap,
)

__all__ = ["MAX_FEATURES", "UPDPError", "apply_layout_", "get_slot", "layout_of", "set_slot", "short"]


MAX_FEATURES = 2**16
"""Largest channel count that a layout may ask for; larger ones are taken for a damaged or hostile file."""

MAX_KERNEL = 127
"""Largest size, stride, padding or dilation of a kernel that a layout may ask for."""


class UPDPError(ValueError):
    """Whatever this package finds wrong with what it was given; the message is for the user."""


_repr = reprlib.Repr()
_repr.maxstring, _repr.maxdict = 200, 10
short = _repr.repr
"""What an error shows of a value in an untrusted file: never more than a few lines of it."""


def get_slot(model: nn.Module, path: str) -> nn.Module:
    """Return what stands in the slot `path`, a path of the stock architecture; wrappers on the way are looked through.

    Raises:
        KeyError: there is no such slot.
    """
    module = model
    for name in path.split("."):
        child = unwrap(module)._modules.get(name)
        if child is None:
            raise KeyError(path)
        module = child
    return module


def set_slot(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` into the slot `path`."""
    parent, _, name = path.rpartition(".")
    holder = unwrap(get_slot(model, parent) if parent else model)
    if name not in holder._modules:
        raise KeyError(path)
    holder._modules[name] = module


def apply_layout_(model: nn.Module, layout: Mapping[str, Mapping[str, Any]]) -> None:
    """Exchange the slots of a stock `model` as `layout` says. The new modules hold no meaningful weights yet.

    Raises:
        ValueError: the layout names a slot that is not there, an unknown kind, or an absurd size. Nothing is
            allocated before the whole layout has been checked.
    """
    if not isinstance(layout, Mapping):
        raise UPDPError(
            f"The layout is {short(layout)}, expected what stands in each slot: the file is damaged, download it again."
        )
    for path, spec in layout.items():
        _check(model, path, spec)
    for path in layout:
        outer = next((p for p in _parents(path) if p in layout and layout[p]["kind"] != "end"), None)
        if outer is not None:
            raise UPDPError(
                f"The layout names the slot {path!r} inside {outer!r}, which it replaces: the file is damaged, "
                "download it again."
            )
    wrapped = [path for path, spec in layout.items() if spec["kind"] == "end"]
    for path, spec in layout.items():
        if spec["kind"] == "unless_marked":
            set_slot(model, path, LetPass(get_slot(model, path)))
        elif spec["kind"] != "end":
            set_slot(model, path, _build(spec))
    for path in wrapped:
        spec = layout[path]
        end = batch_norm_and_activation(spec["channels"], spec["eps"], spec["channel_axis"], spec["activation"])
        set_slot(model, path, EndActivation(get_slot(model, path), end))


def _parents(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[:length]) for length in range(1, len(names))]


def _build(spec: Mapping[str, Any]) -> nn.Module:
    match spec["kind"]:
        case "linear":
            return nn.Linear(spec["in_features"], spec["out_features"], bias=spec["bias"])
        case "conv2d":
            return nn.Conv2d(**{name: value for name, value in spec.items() if name != "kind"})
        case "zero":
            return Zero(spec["outputs"])
        case "skip":
            return Skip(spec["outputs"])
        case "mark":
            return PassNext()
        case _:
            return nn.Identity()


def layout_of(module: nn.Module) -> dict[str, Any]:
    """Return what a layout says of a slot that holds `module`.

    Raises:
        UPDPError: there is no kind for modules of its type.
    """
    kind = _KINDS.get(type(module))
    if kind is None:
        raise UPDPError(f"A layout has no kind for {type(module).__name__}, expected one of {sorted(_FIELDS)}.")
    fields = {name: getattr(module, name) for name in _FIELDS[kind]}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return {"kind": kind, **fields, **({"bias": module.bias is not None} if "bias" in fields else {})}


_KINDS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.Linear: "linear",
    nn.Conv2d: "conv2d",
    Zero: "zero",
    Skip: "skip",
}
_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "identity": {},
    "mark": {},  # of release 0.1, as the next one
    "unless_marked": {},
    "linear": {
        "in_features": lambda n: _is_count(n, MAX_FEATURES),
        "out_features": lambda n: _is_count(n, MAX_FEATURES),
        "bias": lambda flag: isinstance(flag, bool),
    },
    "conv2d": {
        "in_channels": lambda n: _is_count(n, MAX_FEATURES),
        "out_channels": lambda n: _is_count(n, MAX_FEATURES),
        "kernel_size": lambda pair: _is_pair(pair, 1, MAX_KERNEL),
        "stride": lambda pair: _is_pair(pair, 1, MAX_KERNEL),
        "padding": lambda pair: _is_pair(pair, 0, MAX_KERNEL),
        "dilation": lambda pair: _is_pair(pair, 1, MAX_KERNEL),
        "groups": lambda n: _is_count(n, MAX_FEATURES),
        "bias": lambda flag: isinstance(flag, bool),
    },
    "zero": {"outputs": lambda n: n == 0 or _is_count(n, 8)},
    "skip": {"outputs": lambda n: n == 0 or _is_count(n, 8)},
    "end": {
        "channels": lambda n: _is_count(n, MAX_FEATURES),
        "eps": lambda eps: isinstance(eps, float) and 0 < eps < 1,
        "channel_axis": lambda axis: type(axis) is int and axis in (1, -1),
        "activation": lambda name: isinstance(name, str) and name in END_ACTIVATIONS,
    },
}


def _is_count(number: Any, largest: int) -> bool:
    return type(number) is int and 0 < number <= largest


def _wrong_sizes(conv: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is wrong with the sizes of a convolution whose every single number is valid."""
    if conv["in_channels"] % conv["groups"] or conv["out_channels"] % conv["groups"]:
        return {"groups": conv["groups"]}
    weights = conv["in_channels"] // conv["groups"] * conv["out_channels"] * math.prod(conv["kernel_size"])
    return {} if weights <= MAX_FEATURES**2 else {"kernel_size": conv["kernel_size"]}


def _is_pair(pair: Any, smallest: int, largest: int) -> bool:
    is_pair = isinstance(pair, list | tuple) and len(pair) == 2
    return is_pair and all(type(n) is int and smallest <= n <= largest for n in pair)


def _check(model: nn.Module, path: Any, spec: Any) -> None:
    kind = spec.get("kind") if isinstance(spec, Mapping) else None
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise UPDPError(
            f"The layout puts {short(spec)} into the slot {short(path)}, but this version of updp_hf knows the kinds "
            f"{sorted(_FIELDS)}: was the model made by a newer version?"
        )
    fields = _FIELDS[kind]
    wrong = {name: spec.get(name) for name, is_valid in fields.items() if not is_valid(spec.get(name))}
    if kind == "conv2d" and not wrong:
        wrong = _wrong_sizes(spec)
    if wrong or set(spec) != {"kind", *fields}:
        raise UPDPError(
            f"The layout of the slot {short(path)} is {short(dict(spec))}, but a {kind!r} needs valid values for "
            f"exactly {sorted(fields)}: the file is damaged, download it again."
        )
    try:
        get_slot(model, path)
    except (KeyError, AttributeError):  # no such slot, or a path that is no text
        raise UPDPError(
            f"The layout names the slot {short(path)}, which {type(model).__name__} does not have: does the base "
            "configuration belong to another model?"
        ) from None
