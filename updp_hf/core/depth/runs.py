"""Runs: affine modules, each feeding only the next, with closable non-linearities between them, and what merging saves.

A chain of many layers is split into the runs that save most for each non-linearity that they close, so that none is
closed in vain, and a plain network does not become one monstrous kernel.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from updp_hf.core.algebra import affine
from updp_hf.core.algebra.affine import AffineMap
from updp_hf.core.algebra.kernels import can_crop, can_fill, crop_some, largest, move_padding
from updp_hf.core.cost import LatencyTable, count_parameters
from updp_hf.core.graph.calls import Call
from updp_hf.core.graph.roles import Role
from updp_hf.core.graph.structure import Structure
from updp_hf.core.plan.site import Form, Site, outermost

__all__ = ["find_runs", "merged_map", "where_chains_end"]

MAX_DENSE = 3
"""Linears or convolutions that one run may have: an inverted residual has three."""

_NON_LINEAR = {Role.ACTIVATION, Role.RECALIBRATION}
_CLOSES_TO_BATCH_NORM = {Role.NORM, Role.RECALIBRATION}


class _Segment(NamedTuple):
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


def find_runs(
    structure: Structure, block: str, form: Form, latencies: LatencyTable | None = None, *, every: bool = False
) -> Iterator[Site]:
    """Yield the runs in `block` that pay, and of a chain without such the one that comes nearest to it.

    Args:
        structure: of the model.
        block: path of the block.
        form: one of those that merge.
        latencies: where latencies are measured, so that they count and not MACs.
        every: yield whatever could be merged, paying or not, overlapping or not.
    """
    for chain in _chains(structure, block):
        candidates = _candidates(structure, chain, form, latencies)
        for segment in candidates if every else _disjoint(candidates):
            yield _site(structure, block, form, chain, segment)


def where_chains_end(structure: Structure, block: str) -> list[str]:
    """Return, for the Linears and convolutions of `block` from which no run goes on, what stops it."""
    found = []
    for chain in _chains(structure, block):
        last = chain[-1]
        inside = [user for user in last.users if f"{user.path}.".startswith(f"{block}.")]
        if not inside or all(structure.parts[call].role is not Role.DENSE for call in chain):
            continue
        if len(last.users) > 1:
            found.append(f"{last.path!r} feeds {len(last.users)} operations")
        elif inside[0] not in structure.parts:
            found.append(f"{last.path!r} feeds {inside[0].operations[0].target} in {inside[0].path!r}")
    return found


def _chains(structure: Structure, block: str) -> Iterator[list[Call]]:
    calls = {call for call in structure.parts if structure.block_of(call.path) == block}
    linked = {call: call.users[0] for call in calls if _feeds_only_the_next(structure, call, calls)}
    followers = set(linked.values())
    for call in structure.parts:
        if call in calls and call not in followers:
            chain = [call]
            while chain[-1] in linked:
                chain.append(linked[chain[-1]])
            yield chain


def _feeds_only_the_next(structure: Structure, call: Call, calls: set[Call]) -> bool:
    if call.is_output or len(call.users) != 1 or call.users[0] not in calls or call.users[0].inputs != [call]:
        return False
    axes = {structure.parts[call].axis, structure.parts[call.users[0]].axis}
    return len(axes - {None}) < 2


def _candidates(structure: Structure, chain: list[Call], form: Form, latencies: LatencyTable | None) -> list[_Segment]:
    """Return, from the left and the shorter first, the ways to merge each stretch of `chain`."""
    roles = [structure.parts[call].role for call in chain]
    dense = [i for i, role in enumerate(roles) if role is Role.DENSE]
    stretches = [dense[i : i + n] for i in range(len(dense)) for n in range(2, min(MAX_DENSE, len(dense) - i) + 1)]
    found = []
    for stretch in stretches:
        closed = sum(role in _NON_LINEAR for role in roles[stretch[0] : stretch[-1]])
        if closed:
            found += _ways(structure, chain, stretch, form, latencies, closed)
    return found


def _disjoint(candidates: list[_Segment]) -> list[_Segment]:
    """Choose what saves most for each non-linearity that closes; where nothing pays, what comes nearest to it."""
    ranked = sorted(candidates, key=lambda segment: -segment.saved / segment.closed)  # among equals as they came
    chosen: list[_Segment] = []
    for segment in ranked:
        if segment.saved > 0 and not any(set(segment.dense) & set(other.dense) for other in chosen):
            chosen.append(segment)
    return sorted(chosen, key=lambda segment: segment.dense) or ranked[:1]


def _ways(
    structure: Structure, chain: list[Call], dense: list[int], form: Form, latencies: LatencyTable | None, closed: int
) -> list[_Segment]:
    """Return the segment with whole kernels and, where there is something to crop, with cropped ones."""
    maps = [affine.read(structure.modules[chain[i].path], device="meta") for i in dense]
    choices = [[False] * len(maps)]
    if form is not Form.MERGE_WHOLE_KERNELS:
        kept = largest(maps)
        cropped = [i != kept and can_crop(map) for i, map in enumerate(maps)]
        choices += [cropped] if any(cropped) else []
    calls = chain[dense[0] : dense[-1] + 1]
    pools = any(structure.parts[call].role in _CLOSES_TO_BATCH_NORM for call in calls)
    found = []
    for choice in choices:
        closed_maps = crop_some(maps, choice)
        merged = merged_map(closed_maps)
        # What pools positions would see the ring that moved padding leaves.
        is_continuous = not pools or can_fill(closed_maps)
        if affine.is_writable(merged) and is_continuous:
            macs = sum(call.macs for call in calls) - _positions(calls[-1], merged) * merged.weight.numel()
            seconds = None if latencies is None else _seconds_saved(structure, calls, merged, latencies)
            positions = tuple(i for i, is_cropped in zip(dense, choice, strict=True) if is_cropped)
            found.append(_Segment(tuple(dense), positions, closed, merged, macs, seconds))
    return found


def _seconds_saved(structure: Structure, calls: list[Call], merged: AffineMap, latencies: LatencyTable) -> float:
    before = nn.Sequential(*(structure.modules[path] for path in outermost([call.path for call in calls])))
    after = affine.empty(merged).to(next(before.parameters()))
    for parameter in after.parameters():
        nn.init.zeros_(parameter)  # what memory holds by chance may be slow to multiply
    shape = calls[0].inputs[0].shape or ()
    return latencies.of(before, shape) - latencies.of(after, shape)


def _site(structure: Structure, block: str, form: Form, chain: list[Call], segment: _Segment) -> Site:
    parts = [structure.parts[call] for call in chain]
    outer = {Role.DIAGONAL} if form is Form.MERGE_KEEP_NORM else {Role.DIAGONAL, Role.NORM}
    begin, end = segment.dense[0], segment.dense[-1] + 1
    # What shifts in front of padding would leak into the border.
    while begin > 0 and parts[begin - 1].role in outer and not any(segment.merged.padding):
        begin -= 1
    while end < len(chain) and parts[end].role in outer and not structure.has_live_children(chain[end]):
        end += 1
    calls = chain[begin:end]
    shared = [call for call in calls if structure.is_shared(call)]
    run = [call for call in calls if call not in shared]
    norms = [call for call in run if structure.parts[call].role in _CLOSES_TO_BATCH_NORM]
    merged = segment.merged
    params = sum(count_parameters(structure.modules[path]) for path in outermost([call.path for call in run]))
    channels, channel_axis = structure.channels_behind(block)
    return Site(
        form=form,
        block=block,
        run=tuple(call.path for call in run),
        activations=tuple(call.path for call in run if structure.parts[call].role is Role.ACTIVATION),
        norms=tuple(call.path for call in norms),
        norm_channels=tuple((call.shape or ())[structure.parts[call].axis or -1] for call in norms),
        shared=tuple(dict.fromkeys(call.path for call in shared)),
        marked=tuple(call.inputs[0].path for call in shared),
        cropped=tuple(chain[i].path for i in segment.cropped),
        channels=channels,
        channel_axis=channel_axis,
        tokens=_positions(chain[segment.dense[-1]], merged),
        params_saved=params - merged.weight.numel() - merged.bias.numel(),
        macs_saved=segment.macs_saved,
        seconds_saved=segment.seconds_saved,
    )


def _positions(call: Call, map: AffineMap) -> int:
    return math.prod(call.shape or ()) // map.out_channels
