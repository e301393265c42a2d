"""Chains: calls of affine modules and closable non-linearities, each feeding only the next, and what merging saves.

A chain of many layers is split into the stretches that save most for each non-linearity that they close, so that none
is closed in vain, and a plain network does not become one monstrous kernel.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from updp_hf.core.algebra import affine, modules
from updp_hf.core.algebra.affine import AffineMap
from updp_hf.core.algebra.kernels import can_crop, can_fill, crop_some, largest, move_padding
from updp_hf.core.cost import LatencyTable
from updp_hf.core.graph.calls import Call
from updp_hf.core.graph.roles import Role
from updp_hf.core.graph.structure import Structure
from updp_hf.core.plan.site import outermost

__all__ = [
    "CLOSES_TO_BATCH_NORM",
    "Stretch",
    "chains_in",
    "disjoint",
    "feeds_only",
    "merged_map",
    "positions",
    "stretches_of",
    "where_chains_end",
]

MAX_DENSE = 3
"""Linears or convolutions that one run may have: an inverted residual has three."""

CLOSES_TO_BATCH_NORM = {Role.NORM, Role.RECALIBRATION}
_NON_LINEAR = {Role.ACTIVATION, Role.RECALIBRATION}


class Stretch(NamedTuple):
    """Part of a chain that could be one map, and what that would save."""

    dense: tuple[int, ...]  # positions in the chain
    cropped: tuple[int, ...]
    closed: int  # non-linearities
    merged: AffineMap  # without values
    macs_saved: int
    seconds_saved: float | None

    @property
    def saved(self) -> float:
        """What counts: latency where it was measured, else MACs."""
        return self.macs_saved if self.seconds_saved is None else self.seconds_saved


def merged_map(closed: Sequence[AffineMap]) -> AffineMap:
    """Return the one map of a closed run with the dense maps `closed`."""
    moved, _ = move_padding(closed)
    return affine.fold(moved)


def chains_in(structure: Structure, block: str) -> Iterator[list[Call]]:
    """Yield the longest chains of calls in `block`."""
    calls = {call for call in structure.parts if structure.block_of(call.path) == block}
    linked = {
        call: call.users[0]
        for call in calls
        if call.users and call.users[0] in calls and feeds_only(structure, call, call.users[0])
    }
    followers = set(linked.values())
    for call in structure.parts:
        if call in calls and call not in followers:
            chain = [call]
            while chain[-1] in linked:
                chain.append(linked[chain[-1]])
            yield chain


def feeds_only(structure: Structure, call: Call, following: Call) -> bool:
    """Return whether what `call` returns goes to `following` and nowhere else, along the same axis of channels."""
    if call.is_output or call.users != [following] or following.inputs != [call]:
        return False
    axes = {_axis(structure, call), structure.parts[following].axis}
    return len(axes - {None}) < 2


def _axis(structure: Structure, call: Call) -> int | None:
    """Return the axis of the channels of what `call` returns: an activation leaves them where they are."""
    axis, (source,) = structure.parts[call].axis, call.inputs
    return _axis(structure, source) if axis is None and source in structure.parts else axis


def stretches_of(
    structure: Structure, chain: list[Call], *, crops: bool, latencies: LatencyTable | None = None
) -> list[Stretch]:
    """Return the ways to merge each stretch of `chain`, from the left and the shorter first.

    Args:
        structure: of the model.
        chain: one that `chains_in` has found.
        crops: whether kernels may be cropped to their centres where that makes the merged one cheaper.
        latencies: where latencies are measured, so that they count and not MACs.
    """
    roles = [structure.parts[call].role for call in chain]
    dense = [i for i, role in enumerate(roles) if role is Role.DENSE]
    found: list[Stretch] = []
    for i in range(len(dense)):
        for count in range(2, min(MAX_DENSE, len(dense) - i) + 1):
            chosen = dense[i : i + count]
            closed = sum(role in _NON_LINEAR for role in roles[chosen[0] : chosen[-1]])
            if closed:
                found += _ways(structure, chain, chosen, crops, latencies, closed)
    return found


def disjoint(candidates: list[Stretch]) -> list[Stretch]:
    """Choose what saves most for each non-linearity that closes; where nothing saves any, what comes nearest to it."""
    ranked = sorted(candidates, key=lambda stretch: -stretch.saved / stretch.closed)  # among equals as they came
    chosen: list[Stretch] = []
    for stretch in ranked:
        if stretch.saved > 0 and not any(set(stretch.dense) & set(other.dense) for other in chosen):
            chosen.append(stretch)
    return sorted(chosen, key=lambda stretch: stretch.dense) or ranked[:1]


def where_chains_end(structure: Structure, block: str) -> list[str]:
    """Return, for the Linears and convolutions of `block` from which no run goes on, what stops it."""
    found = []
    for chain in chains_in(structure, block):
        last = chain[-1]
        inside = [user for user in last.users if f"{user.path}.".startswith(f"{block}.")]
        if not inside or all(structure.parts[call].role is not Role.DENSE for call in chain):
            continue
        if len(last.users) > 1:
            found.append(f"{last.path!r} feeds {len(last.users)} operations")
        elif inside[0] not in structure.parts:
            found.append(f"{last.path!r} feeds {inside[0].operations[0].target} in {inside[0].path!r}")
    return found


def positions(call: Call, map: AffineMap) -> int:
    """Return at how many positions of one image `call` returns what `map` computes."""
    return math.prod(call.shape or ()) // map.out_channels


def _ways(
    structure: Structure,
    chain: list[Call],
    dense: list[int],
    crops: bool,
    latencies: LatencyTable | None,
    closed: int,
) -> list[Stretch]:
    """Return the stretch with whole kernels and, where there is something to crop, with cropped ones."""
    maps = [modules.read(structure.modules[chain[i].path], device="meta") for i in dense]
    choices = [[False] * len(maps)]
    if crops:
        kept = largest(maps)
        cropped = [i != kept and can_crop(map) for i, map in enumerate(maps)]
        choices += [cropped] if any(cropped) else []
    calls = chain[dense[0] : dense[-1] + 1]
    pools = any(structure.parts[call].role in CLOSES_TO_BATCH_NORM for call in calls)
    found = []
    for choice in choices:
        closed_maps = crop_some(maps, choice)
        merged = merged_map(closed_maps)
        # What pools positions would see the ring that moved padding leaves.
        is_continuous = not pools or can_fill(closed_maps)
        if modules.is_writable(merged) and is_continuous:
            macs = sum(call.macs for call in calls) - positions(calls[-1], merged) * merged.weight.numel()
            seconds = None if latencies is None else _seconds_saved(structure, calls, merged, latencies)
            places = tuple(i for i, is_cropped in zip(dense, choice, strict=True) if is_cropped)
            found.append(Stretch(tuple(dense), places, closed, merged, macs, seconds))
    return found


def _seconds_saved(structure: Structure, calls: list[Call], merged: AffineMap, latencies: LatencyTable) -> float:
    before = nn.Sequential(*(structure.modules[path] for path in outermost([call.path for call in calls])))
    after = modules.empty(merged).to(next(before.parameters()))
    for parameter in after.parameters():
        nn.init.zeros_(parameter)  # what memory holds by chance may be slow to multiply
    shape = calls[0].inputs[0].shape or ()
    return latencies.of(before, shape) - latencies.of(after, shape)
