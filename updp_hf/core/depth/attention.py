"""Attention branches, which become zero."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from updp_hf.core.cost import LatencyTable, count_parameters
from updp_hf.core.depth.containers import branches_in, result_of, why_other_results
from updp_hf.core.gates.gate import Blend, Gate
from updp_hf.core.graph.calls import Call
from updp_hf.core.graph.structure import Structure
from updp_hf.core.plan.site import Saving, Site, Start
from updp_hf.model.layout_updp import get_slot
from updp_hf.model.modules_updp import Zero

__all__ = ["Attention"]

_MIXING = {torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten.softmax.int}


@dataclass(frozen=True)
class Attention(Site):
    """An attention branch, with the norm in front of it where that feeds nothing else; its output becomes zero."""

    kind = "attention"
    forms: ClassVar[Mapping[str, str]] = {"attention-drop": "no attention"}
    looked_for = "a module with attention in it, one tensor in and one of the same shape out"
    outcome = "without attention"

    outputs: int = 0  # length of the tuple that the branch returns, 0 if it returns a tensor

    @classmethod
    def find_in(
        cls, structure: Structure, block: str, form: str, latencies: LatencyTable | None = None
    ) -> Iterator["Attention"]:
        for path in branches_in(structure, block, _is_attention):
            if structure.seen[path].is_droppable:
                slots = (*_norm_before(structure, path), path)
                saving = Saving(
                    sum(structure.macs[slot] for slot in slots),
                    sum(count_parameters(structure.modules[slot]) for slot in slots),
                )
                channels, _ = result_of(structure, path)
                yield cls(form, block, slots, channels, saving=saving, outputs=structure.seen[path].outputs)

    @classmethod
    def why_none(cls, structure: Structure, block: str) -> list[str]:
        own = [
            f"{path!r} returns more than tensors, so zeros cannot stand in its place"
            for path in branches_in(structure, block, _is_attention)
        ]
        return own + super().why_none(structure, block)

    def fits(self, structure: Structure) -> str:
        if reason := self.misplaced(structure):
            return reason
        *norms, path = self.slots
        calls, seen = structure.graph.within(path), structure.seen[path]
        if structure.single_source(path, calls) is None or not seen.is_droppable or not _is_attention(calls):
            return f"{path!r} is not {self.looked_for}"
        if norms and norms != _norm_before(structure, path):
            return f"{norms[0]!r} is no norm that feeds {path!r} alone"
        return why_other_results(structure, path, self.outputs, self.channels)

    def gates(self, model: nn.Module, start: Start) -> dict[str, Gate]:
        path = self.slots[-1]
        return {path: Blend(get_slot(model, path), Zero(self.outputs))}

    def merged(self, model: nn.Module) -> dict[str, nn.Module]:
        *norms, path = self.slots
        return {**{norm: nn.Identity() for norm in norms}, path: Zero(self.outputs)}


def _is_attention(calls: list[Call]) -> bool:
    return any(target in _MIXING for call in calls for target in call.targets)


def _norm_before(structure: Structure, path: str) -> list[str]:
    """Return the norm that feeds the branch `path` and nothing else, if there is one."""
    calls = structure.graph.within(path)
    source = structure.single_source(path, calls)
    leads = source is not None and structure.is_norm(source) and all(user in calls for user in source.users)
    return [source.path] if source is not None and leads else []
