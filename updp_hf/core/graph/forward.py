"""What one forward tells that the graph does not: how each module is called, and what it computes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from updp_hf.core.cost import macs_by_module
from updp_hf.core.gates.contexts import open_gates
from updp_hf.core.graph.calls import stock_modules

__all__ = ["Forward", "Seen", "run_forward"]


class Seen(NamedTuple):
    """How a module was called."""

    outputs: int  # length of the tuple that it returned, 0 for a tensor
    is_plain: bool  # called with one tensor and nothing else, and returning one: a Linear can stand in its place
    is_droppable: bool  # returning tensors only: None can stand for all but the first


class Forward(NamedTuple):
    """One forward on one image, by the stock paths of the modules."""

    seen: Mapping[str, Seen]
    macs: Mapping[str, int]  # multiply-accumulates, "" for the whole model


def run_forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Forward:
    """Run `model` once with its gates open, and return what was seen of its modules."""
    seen: dict[str, Seen] = {}

    def hook(path: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            is_tensor = isinstance(output, Tensor)
            values = output if isinstance(output, tuple | list) else [output]
            seen[path] = Seen(
                outputs=0 if is_tensor else len(values),
                is_plain=is_tensor and len(args) == 1 and not kwargs,
                is_droppable=bool(values) and all(v is None or isinstance(v, Tensor) for v in values),
            )

        return note

    stock = stock_modules(model)
    handles = [module.register_forward_hook(hook(path), with_kwargs=True) for path, module in stock.values() if path]
    try:
        with open_gates(model):
            macs = macs_by_module(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Forward(seen, {path: macs.get(real, 0) for real, (path, _) in stock.items()})
