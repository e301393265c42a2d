"""Who feeds whom: the exported graph of a model, collapsed to calls of modules."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from updp_hf.core.gates.contexts import evaluation, open_gates
from updp_hf.errors import ExportError, UPDPError

__all__ = ["Call", "Graph", "check_unwrapped", "contracted", "is_weighted", "stock_modules", "trace"]


@dataclass(eq=False)
class Call:
    """One call of a leaf module, or one operation in the forward of a larger one."""

    path: str  # of the leaf module, or of the module in whose forward the operation stands
    is_leaf: bool
    operations: list[fx.Node] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)  # names of the parameters and buffers that it reads
    inputs: list["Call"] = field(default_factory=list)  # distinct, without parameters
    users: list["Call"] = field(default_factory=list)
    depends_on_input: bool = False
    is_output: bool = False

    @property
    def targets(self) -> list[Any]:
        """The operations' functions, e.g. `torch.ops.aten.linear.default`."""
        return [node.target for node in self.operations]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the result, None if that is not one tensor."""
        value = self.operations[-1].meta.get("val")
        return tuple(value.shape) if isinstance(value, Tensor) else None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the Linears and convolutions in it."""
        return sum(math.prod(_shape(n)) * math.prod(_shape(n.args[1])[1:]) for n in self.operations if is_weighted(n))


@dataclass(frozen=True)
class Graph:
    """The calls of one forward, in order of execution, and how often each module is called."""

    calls: tuple[Call, ...]
    call_counts: Mapping[str, int]

    def within(self, path: str) -> list[Call]:
        """Return the calls made inside the module `path`."""
        return [call for call in self.calls if call.path == path or call.path.startswith(f"{path}.")]


_WEIGHTED = {
    torch.ops.aten.linear.default,
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv1d.padding,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv2d.padding,
}


def is_weighted(node: fx.Node) -> bool:
    """Return whether the operation is a Linear's or a convolution's, whose weight is its second argument."""
    return node.target in _WEIGHTED


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.meta["val"].shape)


_TRANSPARENT = {
    torch.ops.aten.dropout.default,  # the graph is exported in evaluation mode
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.lift_fresh_copy.default,
}


def trace(
    model: nn.Module,
    example_inputs: Mapping[str, Tensor],
    is_atomic: Callable[[nn.Module], bool] = lambda module: False,
) -> Graph:
    """Export `model` in evaluation mode with its gates open, and collapse the graph to calls.

    Paths are those of the stock architecture, whether the model is gated or not. A call is that of a module without
    children, or of one that `is_atomic` names.

    Raises:
        ExportError: `torch.export` does not understand the model's forward.
    """
    with evaluation(model), open_gates(model), torch.no_grad(), warnings.catch_warnings():
        # Export warns of its own internals and of stock forwards; neither is for our user to mend.
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, (), dict(example_inputs), strict=False)
        except Exception as error:  # export raises whatever the forward raises, under dozens of types
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ExportError(
                f"torch.export fails on {type(model).__name__} with {type(error).__name__}: {reason[0]} "
                f"Sites are found in the exported graph; give `example_inputs` that the model accepts "
                f"(here: { {name: tuple(x.shape) for name, x in example_inputs.items()} })."
            ) from error
    signature = program.graph_signature
    states = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return _collapse(model, program.graph, states, set(signature.user_inputs), is_atomic)


def check_unwrapped(model: nn.Module) -> None:
    """Make sure that the structure of `model` can be changed.

    Raises:
        UPDPError: it is wrapped for training in parallel, or compiled.
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch._dynamo.eval_frame.OptimizedModule)
    if isinstance(model, wrappers):
        raise UPDPError(
            f"The model is wrapped in {type(model).__name__}, but its structure can be changed only before that: pass "
            "the model itself, and wrap or compile it afterwards."
        )


def contracted(graph: Graph, paths: Iterable[str]) -> Graph:
    """Return `graph` with all that happens inside each of the modules `paths` as one call, its result the last."""
    calls = list(graph.calls)
    for path in paths:
        inside = graph.within(path)
        whole = Call(path, is_leaf=True)
        for call in inside:
            whole.operations += call.operations
            whole.parameters += call.parameters
            whole.depends_on_input |= call.depends_on_input
            whole.is_output |= call.is_output
            for source in call.inputs:
                if source not in inside and source not in whole.inputs:
                    whole.inputs.append(source)
                    source.users = [user for user in source.users if user not in inside] + [whole]
            for user in call.users:
                if user not in inside and user not in whole.users:
                    whole.users.append(user)
                    user.inputs = [source for source in user.inputs if source not in inside] + [whole]
        calls[calls.index(inside[-1])] = whole
        calls = [call for call in calls if call not in inside]
    return Graph(tuple(calls), graph.call_counts)


def stock_modules(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Map the real path of every module to its path in the stock architecture and what the stock has there.

    Gates and wrappers leave no name in the stock path, and what they add to the model is left out.
    """
    found: dict[str, tuple[str, nn.Module]] = {}

    def walk(real: str, stock: str, module: nn.Module) -> None:
        inner = getattr(module, "stock_child", None)
        if inner is not None:
            walk(f"{real}.{inner}", stock, getattr(module, inner))
            return
        found[real] = (stock, module)
        for name, child in module._modules.items():
            if child is not None:
                walk(f"{real}.{name}" if real else name, f"{stock}.{name}" if stock else name, child)

    walk("", "", model)
    return found


def _collapse(
    model: nn.Module,
    graph: fx.Graph,
    states: Mapping[str, str],
    user_inputs: set[str],
    is_atomic: Callable[[nn.Module], bool],
) -> Graph:
    stock = stock_modules(model)
    calls: dict[Any, Call] = {}
    made_by: dict[fx.Node, Call] = {}
    keys_of: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.op == "output":
            for source in node.all_input_nodes:
                if source in made_by:
                    made_by[source].is_output = True
        if node.op != "call_function":
            continue
        stack = {key: real for key, (real, _) in (node.meta.get("nn_module_stack") or {}).items() if real in stock}
        for key, real in stack.items():
            keys_of.setdefault(stock[real][0], set()).add(key)
        key, path, is_leaf = _innermost(stack, stock, is_atomic)
        sources = [made_by[source] for source in node.all_input_nodes if source in made_by]
        if node.target in _TRANSPARENT and len(sources) == 1:
            made_by[node] = sources[0]
            continue
        identity = key if is_leaf else node
        if identity not in calls:
            calls[identity] = Call(path, is_leaf)
        call = made_by[node] = calls[identity]
        call.operations.append(node)
        call.depends_on_input |= any(source.name in user_inputs for source in node.all_input_nodes)
        call.parameters += [states[source.name] for source in node.all_input_nodes if source.name in states]
        for source in sources:
            call.depends_on_input |= source.depends_on_input
            if source is not call and source not in call.inputs:
                call.inputs.append(source)
                source.users.append(call)
    return Graph(tuple(calls.values()), {path: len(keys) for path, keys in keys_of.items()})


def _innermost(
    stack: Mapping[str, str], stock: Mapping[str, tuple[str, nn.Module]], is_atomic: Callable[[nn.Module], bool]
) -> tuple[str, str, bool]:
    """Return key and stock path of the call that an operation belongs to, and whether that is a whole module."""
    key, path = "", ""
    for key, real in stack.items():
        path, module = stock[real]
        if real and (next(module.children(), None) is None or is_atomic(module)):
            return key, path, True
    return key, path, False
