"""What a graph says of a model: which call has which role, where the blocks are, and the sites in them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache

import torch
from torch import nn

from updp_hf.core.closable import Role, is_pointwise, role_of
from updp_hf.core.graph import Call, Graph, stock_modules
from updp_hf.core.sites import Form, Refusal, Site
from updp_hf.layout_updp import unwrap

__all__ = ["Structure"]

_MIXING = {torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten.softmax.int}
_PER_TOKEN = {
    torch.ops.aten.linear.default,
    torch.ops.aten.layer_norm.default,
    torch.ops.aten.rms_norm.default,
}
_SPLITS = {
    torch.ops.aten.chunk.default: 2,  # operation -> position of its axis argument
    torch.ops.aten.split.Tensor: 2,
    torch.ops.aten.split_with_sizes.default: 2,
}


class Structure:
    """What a graph says of a model: the role of each call, and the blocks. Forms look for their sites in it."""

    def __init__(self, model: nn.Module, graph: Graph):
        self.graph = graph
        stock = stock_modules(model)
        self.modules: Mapping[str, nn.Module] = dict(stock.values())  # by their stock path
        self.roles: dict[Call, Role] = {}
        self.reasons: dict[str, list[str]] = {}
        self.foreign_readers = self._foreign_readers({real: path for real, (path, _) in stock.items()})
        self.block_of = cache(self._block_of)  # asked for every path and every block
        for call in graph.calls:
            if call.is_leaf:
                self._classify(call)

    def blocks(self) -> list[str]:
        """Return the blocks: the innermost entries with children of a ModuleList or Sequential, in order."""
        dense = (call for call in self.graph.calls if self.roles.get(call) is Role.DENSE)
        return list(dict.fromkeys(block for call in dense if (block := self.block_of(call.path))))

    def _block_of(self, path: str) -> str:
        """Return the path of the block around `path`, "" if there is none.

        It is the innermost entry of a list of repeated modules. Where nothing is repeated, as in a network of one
        block, it is the innermost entry of any list.
        """
        names = path.split(".")
        innermost = ""
        for length in range(len(names) - 1, 0, -1):
            parent = self.modules.get(".".join(names[: length - 1]))
            entry = self.modules.get(".".join(names[:length]))
            if isinstance(parent, nn.ModuleList | nn.Sequential) and entry is not None and _has_children(entry):
                kinds = [type(unwrap(other)) for other in parent if _has_children(other)]
                if len(set(kinds)) < len(kinds):
                    return ".".join(names[:length])
                innermost = innermost or ".".join(names[:length])
        return innermost

    def find(self, form: Form) -> Iterator[Site | Refusal]:
        """Yield, block by block, the sites of `form` or the reason why there is none."""
        finder: Callable[[str], Iterable[Site]] = {
            Form.FFN: lambda block: self._runs(block, form, closes_norm=True),
            Form.FFN_KEEP_NORM: lambda block: self._runs(block, form, closes_norm=False),
            Form.BRANCH_FIT: lambda block: self._branches(block, form, self._is_per_token),
            Form.ATTENTION_DROP: lambda block: self._branches(block, form, self._is_attention),
            Form.BLOCK_DROP: self._whole,
        }[form]
        for block in self.blocks():
            sites = list(finder(block))
            if sites:
                yield from sites
            else:
                yield Refusal(form, block, self._why_not(block, form))

    def calls_within(self, path: str) -> list[Call]:
        """Return the calls made inside the one call of the module `path`."""
        return [call for call in self.graph.calls if call.path == path or call.path.startswith(path + ".")]

    # runs: affine modules, each feeding only the next

    def _runs(self, block: str, form: Form, *, closes_norm: bool) -> Iterator[Site]:
        for chain in self._chains(block):
            roles = [self.roles[call] for call in chain]
            dense = [i for i, role in enumerate(roles) if role is Role.DENSE]
            if len(dense) < 2 or Role.ACTIVATION not in roles[dense[0] : dense[-1]]:
                continue
            outer = {Role.DIAGONAL, Role.NORM} if closes_norm else {Role.DIAGONAL}
            begin, end = dense[0], dense[-1] + 1
            while begin > 0 and roles[begin - 1] in outer:
                begin -= 1
            while end < len(chain) and roles[end] in outer:
                end += 1
            run = chain[begin:end]
            yield Site(
                form=form,
                block=block,
                run=tuple(call.path for call in run),
                activations=tuple(call.path for call in run if self.roles[call] is Role.ACTIVATION),
                norms=tuple(call.path for call in run if self.roles[call] is Role.NORM),
                container=self._container_of(chain[dense[0] : dense[-1] + 1], block),
                channels=_channels(run[-1]),
                tokens=_tokens(run[-1]),
            )

    def _chains(self, block: str) -> Iterator[list[Call]]:
        calls = [call for call in self.graph.calls if call in self.roles and self.block_of(call.path) == block]
        linked = {
            call: call.users[0]
            for call in calls
            if len(call.users) == 1 and call.users[0] in calls and call.users[0].inputs == [call] and not call.is_output
        }
        followers = set(linked.values())
        for call in calls:
            if call not in followers:
                chain = [call]
                while chain[-1] in linked:
                    chain.append(linked[chain[-1]])
                yield chain

    def _container_of(self, calls: list[Call], block: str) -> str | None:
        container = calls[0].path
        while not all(call.path.startswith(f"{container}.") for call in calls):
            container = container.rpartition(".")[0]
        whole = self.calls_within(container)
        is_called = self.graph.call_counts.get(container) == 1  # its parts may be called without it
        if (
            container == block
            or not is_called
            or len(whole) != len(calls)
            or calls[0].inputs[0].shape != calls[-1].shape
        ):
            return None
        return container

    # branches: one module, one tensor in, one of the same shape out

    def _branches(self, block: str, form: Form, is_wanted: Callable[[list[Call]], bool]) -> Iterator[Site]:
        found: list[str] = []
        blocks = self.blocks()
        for path, module in self.modules.items():
            is_inside = self.block_of(path) == block and not any(path.startswith(f"{outer}.") for outer in found)
            holds_blocks = any(other.startswith(f"{path}.") for other in blocks)
            if not is_inside or path in blocks or holds_blocks or not _has_children(module):
                continue
            calls = self.calls_within(path)
            source = self._single_source(path, calls)
            if source is None or not is_wanted(calls):
                continue
            found.append(path)
            norm = source if self._feeds_only(source, calls) and form is Form.ATTENTION_DROP else None
            run = ((norm.path,) if norm else ()) + (path,)
            yield Site(form, block, run, container=path, channels=_channels(calls[-1]), tokens=_tokens(calls[-1]))

    def _whole(self, block: str) -> Iterator[Site]:
        calls = self.calls_within(block)
        if self._single_source(block, calls) is not None:
            yield Site(
                Form.BLOCK_DROP,
                block,
                (block,),
                container=block,
                channels=_channels(calls[-1]),
                tokens=_tokens(calls[-1]),
            )

    def _single_source(self, path: str, calls: list[Call]) -> Call | None:
        """Return the one call that feeds the module `path`, if what comes out has the shape of what went in."""
        if not calls or self.graph.call_counts.get(path) != 1:
            return None
        inside = set(calls)
        sources = {
            source for call in calls for source in call.inputs if source not in inside and source.depends_on_input
        }
        results = [call for call in calls if call.is_output or any(user not in inside for user in call.users)]
        if len(sources) != 1 or len(results) != 1:
            return None
        source = sources.pop()
        return source if source.shape is not None and source.shape == results[0].shape else None

    def _feeds_only(self, source: Call, calls: list[Call]) -> bool:
        return self.roles.get(source) is Role.NORM and all(user in calls for user in source.users)

    def _is_attention(self, calls: list[Call]) -> bool:
        return any(target in _MIXING for call in calls for target in call.targets)

    def _is_per_token(self, calls: list[Call]) -> bool:
        nodes = [node for call in calls for node in call.operations]
        return sum(node.target is torch.ops.aten.linear.default for node in nodes) > 1 and all(
            node.target in _PER_TOKEN
            or is_pointwise(node.target)
            or getattr(node.target, "__name__", "") == "getitem"
            or (node.target in _SPLITS and node.args[2:3] == (-1,))
            for node in nodes
        )

    # reasons

    def _foreign_readers(self, stock: Mapping[str, str]) -> dict[str, str]:
        """Map each module to another in whose forward its parameters are read: it cannot be exchanged."""
        readers = {}
        for call in self.graph.calls:
            for name in call.parameters:
                owner = stock.get(name.rpartition(".")[0])
                if owner is not None and owner != call.path:
                    readers[owner] = call.path
        return readers

    def _classify(self, call: Call) -> None:
        module = self.modules[call.path]
        count = self.graph.call_counts[call.path]
        twins = [path for path, other in self.modules.items() if other is module and path != call.path]
        role = role_of(module, call)
        reader = self.foreign_readers.get(call.path)
        reason = ""
        if role is None and call.inputs and any(True for _ in module.parameters()):
            reason = f"({type(module).__name__}) is not affine in a way that is known"
        elif role is not None and count > 1:
            reason = f"is called {count} times"
        elif role is not None and twins:
            reason = f"is the same module as {twins[0]!r}"
        elif role is not None and reader is not None:
            reason = f"has its parameters read by {reader!r}"
        elif role is not None:
            self.roles[call] = role
        if reason:
            self.reasons.setdefault(self.block_of(call.path), []).append(f"{call.path!r} {reason}")

    def _why_not(self, block: str, form: Form) -> str:
        run = "two Linears with only closable non-linearities between them, each feeding only the next"
        looked_for = {
            Form.FFN: run,
            Form.FFN_KEEP_NORM: run,
            Form.BRANCH_FIT: "a module that maps each token by itself, one tensor in and one of the same shape out",
            Form.ATTENTION_DROP: "a module with attention in it, one tensor in and one of the same shape out",
            Form.BLOCK_DROP: "one tensor into the block and one of the same shape out",
        }[form]
        reasons = self.reasons.get(block, [])
        return f"looked for {looked_for}" + (f"; {'; '.join(reasons[:3])}" if reasons else "")


def _channels(call: Call) -> int:
    return call.shape[-1] if call.shape else 0


def _tokens(call: Call) -> int:
    """Positions per image: an operation on windows has a batch of its own, and the example is one image."""
    return math.prod(call.shape[:-1]) if call.shape else 0


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None
