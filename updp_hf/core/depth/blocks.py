"""Whole blocks, which become the identity."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from updp_hf.core.cost import LatencyTable, count_parameters
from updp_hf.core.depth.containers import why_other_results
from updp_hf.core.gates.gate import Blend, Gate
from updp_hf.core.graph.structure import Structure
from updp_hf.core.plan.site import Saving, Site, Start, Unsupported
from updp_hf.model.layout_updp import get_slot
from updp_hf.model.modules_updp import Skip

__all__ = ["Block"]


@dataclass(frozen=True)
class Block(Site):
    """A block that is dropped."""

    kind = "block"
    forms: ClassVar[Mapping[str, str]] = {"block-drop": "nothing"}
    looked_for = "one tensor into the block and one of the same shape out"
    outcome = "dropped"
    drops_block = True

    outputs: int = 0  # length of the tuple that the block returns, 0 if it returns a tensor

    @classmethod
    def find(
        cls, structure: Structure, form: str, latencies: LatencyTable | None = None
    ) -> Iterator["Site | Unsupported"]:
        """Yield the outermost blocks that can be dropped: a block goes with the block around it."""
        found = list(super().find(structure, form, latencies))
        whole = [site.block for site in found if isinstance(site, Site)]
        yield from (result for result in found if not any(result.block.startswith(f"{outer}.") for outer in whole))

    @classmethod
    def find_in(
        cls, structure: Structure, block: str, form: str, latencies: LatencyTable | None = None
    ) -> Iterator["Block"]:
        has_one_source = structure.single_source(block, structure.graph.within(block)) is not None
        if has_one_source and structure.seen[block].is_droppable:
            saving = Saving(structure.macs[block], count_parameters(structure.modules[block]))
            returns = structure.channels_behind(block)
            yield cls(form, block, (block,), *returns, saving=saving, outputs=structure.seen[block].outputs)

    def fits(self, structure: Structure) -> str:
        if reason := self.misplaced(structure):
            return reason
        if self.slots != (self.block,):
            return f"{', '.join(map(repr, self.slots))} is not the block {self.block!r} itself"
        (path,) = self.slots
        seen = structure.seen[path]
        if structure.single_source(path, structure.graph.within(path)) is None or not seen.is_droppable:
            return f"{path!r} is no block with {self.looked_for}"
        return why_other_results(structure, path, self.outputs)

    def gates(self, model: nn.Module, start: Start) -> dict[str, Gate]:
        (path,) = self.slots
        return {path: Blend(get_slot(model, path), Skip(self.outputs))}

    def merged(self, model: nn.Module) -> dict[str, nn.Module]:
        (path,) = self.slots
        return {path: Skip(self.outputs)}
