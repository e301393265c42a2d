"""The layout of a merged model: which slots of the stock architecture hold something else, and what.

This file needs nothing but torch, because it travels to the Hub together with the modelling file.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "EPS",
    "ChannelBatchNorm",
    "EndActivation",
    "Mark",
    "Skip",
    "UPDPError",
    "UnlessMarked",
    "Zero",
    "apply_layout_",
    "batch_norm",
    "first_tensor",
    "get_slot",
    "layout_of",
    "let_marked_pass_",
    "marked",
    "set_slot",
    "short",
]

END_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
EPS = 1e-5
"""Of BatchNorms that are put in where the checkpoint has no norm."""

MAX_FEATURES = 2**16
"""Largest channel count that a layout may ask for; larger ones are taken for a damaged or hostile file."""

MAX_KERNEL = 127
"""Largest size, stride, padding or dilation of a kernel that a layout may ask for."""


class UPDPError(ValueError):
    """Whatever this package finds wrong with what it was given; the message is for the user."""


_repr = reprlib.Repr()
_repr.maxstring, _repr.maxdict = 200, 10
short = _repr.repr
"""What an error shows of a value that a stranger wrote: never more than a few lines of it."""


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


class Mark(nn.Module):
    """Return the input, marked: the activation that comes next, an `UnlessMarked`, lets it pass.

    A block may call one activation several times, of which one is pruned. The mark travels with the value, so that the
    activation needs no memory of its calls, and calls of several threads do not meet.
    """

    def forward(self, x: Tensor) -> Tensor:
        return marked(x, self)


class UnlessMarked(nn.Module):
    """An activation that lets through what `Mark` has marked."""

    stock_child = "activation"

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation
        self.training = activation.training

    def forward(self, x: Tensor) -> Tensor:
        mark = getattr(x, "_updp_mark", None)
        if mark is None:
            activated: Tensor = self.activation(x)
            return activated
        marked(x, None)  # `x` may be changed in place and come again
        return x if isinstance(mark, Mark) else mark.blend(self.activation, x)


def marked(x: Tensor, mark: nn.Module | None) -> Tensor:
    """Mark `x` itself, or take the mark away."""
    x._updp_mark = mark  # type: ignore[attr-defined]
    return x


def batch_norm(channels: int, eps: float, channel_axis: int) -> nn.BatchNorm2d | ChannelBatchNorm:
    """Build a BatchNorm for `(batch, channels, height, width)` if `channel_axis` is 1, else over the last axis."""
    return nn.BatchNorm2d(channels, eps) if channel_axis == 1 else ChannelBatchNorm(channels, eps)


def batch_norm_and_activation(channels: int, eps: float, channel_axis: int, activation: str) -> nn.Sequential:
    """Build what `EndActivation` puts behind a block."""
    return nn.Sequential(batch_norm(channels, eps, channel_axis), END_ACTIVATIONS[activation]())


def let_marked_pass_(model: nn.Module, path: str) -> None:
    """Wrap the activation in the slot `path` into an `UnlessMarked`, if it is not yet."""
    activation = get_slot(model, path)
    if not isinstance(activation, UnlessMarked):
        for part in activation.modules():
            if getattr(part, "inplace", False):
                part.inplace = False  # type: ignore[assignment]  # what is marked has to stay as it is
        set_slot(model, path, UnlessMarked(activation))


def unwrap(module: nn.Module) -> nn.Module:
    """Look through the modules of ours that wrap a stock module in its slot: they name it as `stock_child`."""
    while (name := getattr(module, "stock_child", None)) is not None:
        module = getattr(module, name)
    return module


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
            let_marked_pass_(model, path)
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
            return Mark()
        case _:
            return nn.Identity()


def layout_of(module: nn.Linear | nn.Conv2d) -> dict[str, Any]:
    """Return what a layout says of a slot that holds `module`."""
    kind = type(module).__name__.lower()
    fields = {name: getattr(module, name) for name in _FIELDS[kind] if name != "bias"}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return {"kind": kind, **fields, "bias": module.bias is not None}


_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "identity": {},
    "mark": {},
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
