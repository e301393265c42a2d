"""Branches that map each token by itself, gated ones too: one Linear is fitted to them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from updp_hf.core.cost import LatencyTable, count_parameters
from updp_hf.core.depth.containers import branches_in, result_of, why_other_results
from updp_hf.core.depth.run_gates import zeroed
from updp_hf.core.gates.gate import Blend, Gate
from updp_hf.core.graph.calls import Call
from updp_hf.core.graph.roles import is_pointwise
from updp_hf.core.graph.structure import Structure
from updp_hf.core.plan.site import Saving, Site, Start
from updp_hf.model.layout_updp import get_slot

__all__ = ["Branch"]

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


@dataclass(frozen=True)
class Branch(Site):
    """A module that maps each token by itself, and becomes one Linear fitted to it: ours."""

    kind = "branch"
    forms: ClassVar[Mapping[str, str]] = {"branch-fit": "one fitted Linear"}
    looked_for = "a module that maps each token by itself, one tensor in and one of the same shape out"
    outcome = "merged"

    @classmethod
    def find_in(
        cls, structure: Structure, block: str, form: str, latencies: LatencyTable | None = None
    ) -> Iterator["Branch"]:
        for path in branches_in(structure, block, _is_per_token):
            if structure.seen[path].is_plain:
                channels, tokens = result_of(structure, path)
                saving = Saving(
                    structure.macs[path] - tokens * channels**2,
                    count_parameters(structure.modules[path]) - (channels + 1) * channels,
                )
                yield cls(form, block, (path,), channels, saving=saving)

    @classmethod
    def why_none(cls, structure: Structure, block: str) -> list[str]:
        own = [
            f"{path!r} is called with or returns more than one tensor, so no Linear can stand in its place"
            for path in branches_in(structure, block, _is_per_token)
        ]
        return own + super().why_none(structure, block)

    def fits(self, structure: Structure) -> str:
        if reason := self.misplaced(structure):
            return reason
        if len(self.slots) > 1:
            return f"a branch is one module, and not {len(self.slots)}"
        (path,) = self.slots
        calls = structure.graph.within(path)
        is_one_to_one = structure.single_source(path, calls) is not None and structure.seen[path].is_plain
        if not is_one_to_one or not _is_per_token(calls):
            return f"{path!r} is not {self.looked_for}"
        return why_other_results(structure, path, 0, self.channels)

    def gates(self, model: nn.Module, start: Start) -> dict[str, Gate]:
        (path,) = self.slots
        linear = nn.utils.skip_init(nn.Linear, self.channels, self.channels)
        return {path: Blend(get_slot(model, path), zeroed(linear))}

    def merged(self, model: nn.Module) -> dict[str, nn.Module]:
        (path,) = self.slots
        gate = get_slot(model, path)
        assert isinstance(gate, Gate)
        return {path: gate.closed()}


def _is_per_token(calls: list[Call]) -> bool:
    nodes = [node for call in calls for node in call.operations]
    return sum(node.target is torch.ops.aten.linear.default for node in nodes) > 1 and all(
        node.target in _PER_TOKEN
        or is_pointwise(node.target)
        or getattr(node.target, "__name__", "") == "getitem"
        or (node.target in _SPLITS and node.args[2:3] == (-1,))
        for node in nodes
    )
