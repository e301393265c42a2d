"""Runs: Linears or convolutions with closable non-linearities between them, which become one map."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import nn

from updp_hf.core.algebra.affine import fold
from updp_hf.core.algebra.kernels import can_fill, crop_some, move_padding
from updp_hf.core.algebra.modules import is_writable, read, write
from updp_hf.core.cost import LatencyTable, count_parameters
from updp_hf.core.depth.chains import (
    CLOSES_TO_BATCH_NORM,
    Stretch,
    chains_in,
    disjoint,
    feeds_only,
    merged_map,
    stretches_of,
    where_chains_end,
)
from updp_hf.core.depth.run_gates import annealing_gates, fitted_gates
from updp_hf.core.gates.gate import Gate
from updp_hf.core.graph.calls import Call
from updp_hf.core.graph.roles import Role
from updp_hf.core.graph.structure import Structure
from updp_hf.core.plan.site import Saving, Site, Start, outermost
from updp_hf.errors import UPDPError
from updp_hf.model.layout_updp import get_slot

__all__ = ["Run"]


@dataclass(frozen=True)
class Run(Site):
    """A run of affine modules, each feeding only the next, with non-linearities between them that can be closed.

    `merge` is UPDP's (arXiv 2401.06426): norms close to BatchNorms and other non-linearities to the identity; the run
    becomes one Linear or one convolution. Cropping all kernels but the largest to their centres, where that is cheaper,
    is ours, and `merge-whole-kernels` does without it: two 3×3 convolutions become one 5×5. `merge-keep-norm` keeps the
    norm in front: ours, and HetDPT's choice.
    """

    kind = "run"
    forms: ClassVar[Mapping[str, str]] = {
        "merge": "one map",
        "merge-keep-norm": "the norm and one map",
        "merge-whole-kernels": "one map with whole kernels",
    }
    looked_for = (
        "two Linears or convolutions with only closable non-linearities between them, each feeding only the next"
    )
    outcome = "merged"

    activations: tuple[str, ...] = ()  # those of the slots that close to the identity
    norms: tuple[str, ...] = ()  # those of the slots that close to a BatchNorm
    norm_channels: tuple[int, ...] = ()  # of each of `norms`
    cropped: tuple[str, ...] = ()  # those of the slots that are cropped to their centre tap

    @property
    def closed(self) -> tuple[str, ...]:
        return (*self.norms, *self.activations)

    @classmethod
    def why_none(cls, structure: Structure, block: str) -> list[str]:
        return super().why_none(structure, block) or where_chains_end(structure, block)

    @classmethod
    def find_in(
        cls, structure: Structure, block: str, form: str, latencies: LatencyTable | None = None
    ) -> Iterator["Run"]:
        """Yield the runs in `block` that save compute, and of a chain without such the one that comes nearest to it."""
        for chain in chains_in(structure, block):
            crops = form != "merge-whole-kernels"
            for stretch in disjoint(stretches_of(structure, chain, crops=crops, latencies=latencies)):
                yield cls.of(structure, block, form, chain, stretch)

    @classmethod
    def of(cls, structure: Structure, block: str, form: str, chain: list[Call], stretch: Stretch) -> "Run":
        """Return the run that merges a stretch of a chain in `block`, and what can be folded into it on both sides."""
        roles = [structure.parts[call].role for call in chain]
        outer = {Role.DIAGONAL} if form == "merge-keep-norm" else {Role.DIAGONAL, Role.NORM}
        begin, end = stretch.dense[0], stretch.dense[-1] + 1
        # What shifts in front of padding would leak into the border.
        while begin > 0 and roles[begin - 1] in outer and not any(stretch.merged.padding):
            begin -= 1
        while end < len(chain) and roles[end] in outer and not structure.has_live_children(chain[end]):
            end += 1
        calls = chain[begin:end]
        slots = tuple(call.path for call in calls)
        norms = [call for call in calls if structure.parts[call].role in CLOSES_TO_BATCH_NORM]
        before = sum(count_parameters(structure.modules[path]) for path in outermost(slots))
        channels, channel_axis = structure.channels_behind(block)
        return cls(
            form=form,
            block=block,
            slots=slots,
            channels=channels,
            channel_axis=channel_axis,
            saving=Saving(
                stretch.macs_saved,
                before - stretch.merged.weight.numel() - stretch.merged.bias.numel(),
                stretch.seconds_saved,
            ),
            activations=tuple(call.path for call in calls if structure.parts[call].role is Role.ACTIVATION),
            norms=tuple(call.path for call in norms),
            norm_channels=tuple(_channels(structure, call) for call in norms),
            cropped=tuple(chain[i].path for i in stretch.cropped),
        )

    def fits(self, structure: Structure) -> str:
        if reason := self.misplaced(structure):
            return reason
        calls = [structure.part_at(slot) for slot in self.slots]
        if None in calls:
            slot = self.slots[calls.index(None)]
            reasons = [reason for found in structure.reasons.values() for reason in found]
            return next((r for r in reasons if r.startswith(f"{slot!r} ")), f"{slot!r} cannot be part of a run")
        found = [call for call in calls if call is not None]
        for call, following in pairwise(found):
            if not feeds_only(structure, call, following):
                return f"{call.path!r} does not feed {following.path!r} alone"
        if structure.has_live_children(found[-1]):
            return f"{found[-1].path!r} has an operation in it that the run leaves out"
        roles = {call.path: structure.parts[call].role for call in found}
        norms = {call.path: _channels(structure, call) for call in found if roles[call.path] in CLOSES_TO_BATCH_NORM}
        bent = [path for path, role in roles.items() if path in norms or role is Role.ACTIVATION]
        if set(norms) != set(self.norms) or set(bent) - set(norms) != set(self.activations):
            return f"its non-linearities are {_listed(bent)} where {_listed(self.closed)} are expected"
        if tuple(norms[path] for path in self.norms) != self.norm_channels:
            return f"the norms have {_listed(norms.values())} channels where {_listed(self.norm_channels)} are expected"
        found_channels, axis = structure.channels_behind(self.block)
        if (self.channels, self.channel_axis) != (found_channels, axis):
            expected = f"{self.channels} channels on axis {self.channel_axis} are expected"
            return f"{self.block!r} returns {found_channels} channels on axis {axis} where {expected}"
        return self._why_no_map(structure, roles)

    def _why_no_map(self, structure: Structure, roles: dict[str, Role]) -> str:
        dense = [path for path, role in roles.items() if role is Role.DENSE]
        if len(dense) < 2:
            return f"there are fewer than two Linears or convolutions among {_listed(self.slots)}"
        if other := [path for path in self.cropped if path not in dense]:
            return f"{other[0]!r} is to be cropped and is no convolution of the run"
        in_front = self.slots[: self.slots.index(dense[0])]
        if bent := [path for path in in_front if roles[path] is Role.ACTIVATION]:
            return f"the activation {bent[0]!r} stands in front of all Linears and convolutions of the run"
        try:
            maps = [read(structure.modules[path], device="meta") for path in dense]
            closed = crop_some(maps, [path in self.cropped for path in dense])
            merged = merged_map(closed)
        except (UPDPError, IndexError, TypeError, ValueError) as error:
            return f"{_listed(dense)} do not become one map ({str(error).rstrip('.')})"
        between = self.slots[self.slots.index(dense[0]) : self.slots.index(dense[-1])]
        pools = any(roles[path] in CLOSES_TO_BATCH_NORM for path in between)
        is_shifted = self.slots[0] != dense[0] and any(merged.padding)
        if not is_writable(merged) or is_shifted or (pools and not can_fill(closed)):
            return f"at the border of an image no single layer computes what {_listed(dense)} do"
        return ""

    def gates(self, model: nn.Module, start: Start) -> dict[str, Gate]:
        slots = {slot: get_slot(model, slot) for slot in self.slots}
        norms = dict(zip(self.norms, self.norm_channels, strict=True))
        if start == "fit":
            return fitted_gates(slots, norms, self.cropped)
        return annealing_gates(slots, norms, self.activations, self.cropped)

    def merged(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the one map in the first slot of its kind, and the identity in all others."""
        # What lies inside another slot of the run, as an activation does in its BatchNorm, goes with it.
        slots = outermost(self.slots)
        modules = {slot: _closed(get_slot(model, slot)) for slot in slots}
        home = next(slot for slot, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d))
        like = read(modules[home])
        maps = [read(module, like) for module in modules.values() if not isinstance(module, nn.Identity)]
        moved, _ = move_padding(maps)  # where the gates have it
        return {slot: nn.Identity() for slot in slots} | {home: write(fold(moved), like=modules[home])}


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(repr, values)) or "none"


def _channels(structure: Structure, call: Call) -> int:
    return (call.shape or ())[structure.parts[call].axis or -1]


def _closed(module: nn.Module) -> nn.Module:
    return module.closed() if isinstance(module, Gate) else module
