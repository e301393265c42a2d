"""What a graph says of a model: which call can take part in a run, where the blocks are, and why not elsewhere."""

from collections.abc import Mapping
from functools import cache

import torch
from torch import nn

from updp_hf.core.graph.calls import Call, Graph, contracted, is_weighted, stock_modules
from updp_hf.core.graph.forward import Forward
from updp_hf.core.graph.roles import Part, Role, bends, is_pointwise, part_of, recalibrated_axis
from updp_hf.model.modules_updp import unwrap

__all__ = ["Structure", "has_children"]

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_PADS = {torch.ops.aten.constant_pad_nd.default, torch.ops.aten.pad.default}
MIN_PLAIN = 4
"""Convolutions or Linears that a list of leaves must have to be a plain network's body, not a stem or a head."""


class Structure:
    """What a graph and one forward say of a model: read once, and handed to whatever asks for sites.

    Args:
        model: gated or not; what is said is about the stock architecture.
        graph: what `trace` returned for it.
        forward: what `run_forward` returned for it.
    """

    def __init__(self, model: nn.Module, graph: Graph, forward: Forward):
        stock = stock_modules(model)
        self.seen, self.macs = forward
        self.modules: Mapping[str, nn.Module] = dict(stock.values())  # by their stock path
        units = _units(self.modules, graph)
        self.graph = contracted(graph, units)
        self._weighted = [
            call
            for call in self.graph.calls
            if call.path not in units and any(is_weighted(node) for node in call.operations)
        ]
        self.block_of = cache(self._block_of)  # asked for every path and every block
        self.parts: dict[Call, Part] = {}  # in order of execution
        self.reasons: dict[str, list[str]] = {}
        self.foreign_readers = self._foreign_readers({real: path for real, (path, _) in stock.items()})
        self._blocks = set(self.blocks())
        for call in self.graph.calls:
            self._classify(call)
        self._order = {call.path: index for index, call in reversed(list(enumerate(self.graph.calls)))}

    def blocks(self) -> list[str]:
        """Return the blocks in which there is a Linear or a convolution, in order."""
        return list(dict.fromkeys(block for call in self._weighted if (block := self.block_of(call.path))))

    def _block_of(self, path: str) -> str:
        """Return the path of the block around `path`, "" if there is none.

        It is the innermost entry of a list of repeated modules that holds more than one Linear or convolution. Where
        nothing is repeated, as in a network of one block, it is the innermost entry of any list, then a module that has
        siblings of its kind, then a list of many layers.
        """
        names = path.split(".")
        single = sibling = plain = ""
        for length in range(len(names) - 1, 0, -1):
            parent, entry = (self.modules.get(".".join(names[:n])) for n in (length - 1, length))
            if parent is None or entry is None or not has_children(entry):
                continue
            here = ".".join(names[:length])
            if isinstance(entry, _LISTS) and not plain and self._is_plain(here, entry):
                plain = here
            if not self._holds_two(here) or isinstance(entry, nn.ModuleList | nn.ModuleDict):
                continue  # a list is called by nobody, so it can be no block
            kinds = [type(unwrap(child)) for child in parent._modules.values() if child and has_children(child)]
            is_list = isinstance(parent, _LISTS) or len(set(kinds)) == 1
            if is_list and len(set(kinds)) < len(kinds):
                return here
            single = single or (here if isinstance(parent, _LISTS) else "")
            kind = type(unwrap(entry))
            is_repeated = kind is not nn.Sequential and kinds.count(kind) > 1  # which may be a stem and a head
            sibling = sibling or (here if is_repeated else "")
        return single or sibling or plain

    def _holds_two(self, path: str) -> bool:
        return sum(call.path.startswith(f"{path}.") for call in self._weighted) > 1

    def _is_plain(self, path: str, entry: nn.Module) -> bool:
        leaves = {f"{path}.{name}" for name, child in entry.named_children() if not has_children(child)}
        return sum(call.path in leaves for call in self._weighted) >= MIN_PLAIN

    def single_source(self, path: str, calls: list[Call]) -> Call | None:
        """Return the one call that feeds the module `path`, if what comes out has the shape of what went in."""
        return _single_source(self.graph, path, calls)

    def part_at(self, path: str) -> Call | None:
        """Return the call of the module `path` if it can take part in a run."""
        return next((call for call in self.parts if call.path == path), None)

    def place(self, path: str) -> int:
        """Return when the module `path` is called, as the number of its call or of the first call within it."""
        return self._order.get(path, self._order.get(self.graph.within(path)[0].path, 0))

    def has_live_children(self, call: Call) -> bool:
        """Return whether something is called inside the module that `call` is a call of."""
        return any(other.path.startswith(f"{call.path}.") for other in self.graph.calls)

    def channels_behind(self, block: str) -> tuple[int, int]:
        """Return how many channels `block` returns, and on which axis: that of what they come from, permuted or not."""
        calls = self.graph.within(block)
        inside = set(calls)
        result = [call for call in calls if call.is_output or any(user not in inside for user in call.users)][-1]
        shape = result.shape or (0,)
        queue = [(result, tuple(range(len(shape))))]  # with the axis of the call that each axis of the result is
        for call, axes in queue:
            part = self.parts.get(call)
            if len(call.shape or ()) != len(shape):
                continue
            if part is not None and part.axis is not None:
                axis = axes.index(part.axis % len(shape))
                return shape[axis], 1 if axis == 1 and len(shape) == 4 else -1
            if [node.target for node in call.operations] == [torch.ops.aten.permute.default]:
                dims = call.operations[0].args[1]
                axes = tuple(int(dims[axis]) for axis in axes)  # type: ignore[index,arg-type]
            queue += [(source, axes) for source in call.inputs if source in inside]
        return shape[-1], -1

    # parts and reasons

    def _foreign_readers(self, stock: Mapping[str, str]) -> dict[str, str]:
        """Map each module to another in whose forward its parameters are read: it cannot be exchanged."""
        readers = {}
        for call in self.graph.calls:
            for name in call.parameters:
                owner = stock.get(name.rpartition(".")[0])
                is_own = owner == call.path or (call.is_leaf and f"{owner}.".startswith(f"{call.path}."))
                if owner is not None and not is_own:
                    readers[owner] = call.path
        return readers

    def _classify(self, call: Call) -> None:
        module = self.modules[call.path]
        # A BatchNorm with an activation inside computes its own operation and calls a child for the other.
        if not call.is_leaf and not isinstance(module, nn.modules.batchnorm._BatchNorm):
            reason = _why_not_crossed(call)
        else:
            reason = self._take_part(call, module)
        if reason:
            block = call.path if call.path in self._blocks else self.block_of(call.path)
            found = self.reasons.setdefault(block, [])
            found += [] if (where := f"{call.path!r} {reason}") in found else [where]

    def _take_part(self, call: Call, module: nn.Module) -> str:
        """Enter the part that `call` takes, or return why it takes none."""
        part = part_of(module, call)
        if part is None:
            has_weights = call.inputs and any(True for _ in module.parameters())
            return f"({type(module).__name__}) is not affine in a way that is known" if has_weights else ""
        if (count := self.graph.call_counts[call.path]) > 1:
            return f"is called {count} times"
        if twins := [path for path, other in self.modules.items() if other is module and path != call.path]:
            return f"is the same module as {twins[0]!r}"
        if (reader := self.foreign_readers.get(call.path)) is not None:
            return f"has its parameters read by {reader!r}"
        self.parts[call] = part
        return ""

    def is_norm(self, call: Call) -> bool:
        """Return whether `call` is that of a norm."""
        return call in self.parts and self.parts[call].role is Role.NORM


def has_children(module: nn.Module) -> bool:
    """Return whether there are modules in `module`."""
    return next(module.children(), None) is not None


def _why_not_crossed(call: Call) -> str:
    """Return why no run crosses an operation outside of leaf modules, "" if none would be expected to."""
    node = call.operations[0]
    if node.target in _PADS:
        return "pads in its forward, by what may depend on the size of the image"
    keeps_shape = [call.shape] == [source.shape for source in call.inputs]
    if len(node.all_input_nodes) == 1 and is_pointwise(node.target) and keeps_shape:
        return f"applies {node.target} without a module that could be exchanged"
    return ""


def _units(modules: Mapping[str, nn.Module], graph: Graph) -> list[str]:
    """Return the outermost modules with children that close as one: squeeze-excite and its kin, some activations."""
    found: list[str] = []
    for path, module in modules.items():
        if not path or not has_children(module) or any(path.startswith(f"{outer}.") for outer in found):
            continue
        calls = graph.within(path)
        if _single_source(graph, path, calls) is None:
            continue
        computes_itself = any(call.path == path for call in calls)
        if recalibrated_axis(calls) is not None or (computes_itself and bends(calls)):
            found.append(path)
    return found


def _single_source(graph: Graph, path: str, calls: list[Call]) -> Call | None:
    if not calls or graph.call_counts.get(path) != 1:
        return None
    inside = set(calls)
    sources = {source for call in calls for source in call.inputs if source not in inside and source.depends_on_input}
    results = [call for call in calls if call.is_output or any(user not in inside for user in call.users)]
    if len(sources) != 1 or len(results) != 1:
        return None
    source = sources.pop()
    return source if source.shape is not None and source.shape == results[0].shape else None
