"""Runs: affine modules, each feeding only the next, with closable non-linearities between them, and what merging saves.

A chain of many layers is split into the shortest runs that pay, so that no more non-linearities are closed than what
the merge needs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from updp_hf.core import affine
from updp_hf.core.affine import AffineMap
from updp_hf.core.closable import Role
from updp_hf.core.cost import count_parameters
from updp_hf.core.graph import Call
from updp_hf.core.kernels import can_crop, crop, largest, move_padding
from updp_hf.core.sites import Form, Site
from updp_hf.core.structure import Structure

__all__ = ["find_runs", "merged_map"]

MAX_DENSE = 3
"""Linears or convolutions that one run may have: an inverted residual has three."""

_NON_LINEAR = {Role.ACTIVATION, Role.RECALIBRATION}
_CLOSES_TO_BATCH_NORM = {Role.NORM, Role.RECALIBRATION}


class _Segment(NamedTuple):
    """Part of a chain that could be one map, and what that would cost."""

    dense: tuple[int, ...]  # positions in the chain
    cropped: tuple[int, ...]
    merged: AffineMap  # without values
    macs_saved: int


def merged_map(maps: Sequence[AffineMap], cropped: Sequence[bool]) -> AffineMap:
    """Return the one map of a closed run with the dense maps `maps`, those `cropped` reduced to their centres."""
    closed = [crop(map) if is_cropped else map for map, is_cropped in zip(maps, cropped, strict=True)]
    moved, _ = move_padding(closed)
    return affine.fold(moved)


def find_runs(structure: Structure, block: str, form: Form) -> Iterator[Site]:
    """Yield the runs in `block` that pay, and of a chain without such the one that comes nearest to it."""
    for chain in _chains(structure, block):
        for segment in _segments(structure, chain, form):
            yield _site(structure, block, form, chain, segment)


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


def _segments(structure: Structure, chain: list[Call], form: Form) -> Iterator[_Segment]:
    """Choose from the left the shortest segments that pay; where none does, the one that costs least more."""
    roles = [structure.parts[call].role for call in chain]
    dense = [i for i, role in enumerate(roles) if role is Role.DENSE]
    start, dearest = 0, []
    has_found = False
    while start < len(dense) - 1:
        found = None
        for length in range(2, MAX_DENSE + 1):
            inside = dense[start : start + length]
            if len(inside) < length or not _NON_LINEAR & set(roles[inside[0] : inside[-1]]):
                continue
            segment = _cheapest(structure, chain, inside, form)
            if segment is not None and segment.macs_saved > 0:
                found = segment
                break
            dearest += [segment] if segment is not None else []
        if found is not None:
            has_found = True
            yield found
        start += len(found.dense) if found is not None else 1
    if dearest and not has_found:
        yield max(dearest, key=lambda segment: segment.macs_saved)


def _cheapest(structure: Structure, chain: list[Call], dense: list[int], form: Form) -> _Segment | None:
    """Return the cheaper one of the segment with whole kernels and with cropped ones; None if it is not writable."""
    maps = [affine.read(structure.modules[chain[i].path], device="meta") for i in dense]
    choices = [[False] * len(maps)]
    if form is not Form.MERGE_WHOLE_KERNELS:
        kept = largest(maps)
        choices.append([i != kept and can_crop(map) for i, map in enumerate(maps)])
    inside = chain[dense[0] : dense[-1] + 1]
    spent = sum(call.macs for call in inside)
    found = None
    for cropped in choices:
        merged = merged_map(maps, cropped)
        macs_saved = spent - _positions(chain[dense[-1]], merged) * merged.weight.numel()
        if affine.is_writable(merged) and (found is None or macs_saved > found.macs_saved):
            chosen = tuple(i for i, is_cropped in zip(dense, cropped, strict=True) if is_cropped)
            found = _Segment(tuple(dense), chosen, merged, macs_saved)
    return found


def _site(structure: Structure, block: str, form: Form, chain: list[Call], segment: _Segment) -> Site:
    parts = [structure.parts[call] for call in chain]
    outer = {Role.DIAGONAL} if form is Form.MERGE_KEEP_NORM else {Role.DIAGONAL, Role.NORM}
    begin, end = segment.dense[0], segment.dense[-1] + 1
    # What shifts in front of padding would leak into the border.
    while begin > 0 and parts[begin - 1].role in outer and not any(segment.merged.padding):
        begin -= 1
    while end < len(chain) and parts[end].role in outer and not structure.has_live_children(chain[end]):
        end += 1
    run = chain[begin:end]
    norms = [call for call in run if structure.parts[call].role in _CLOSES_TO_BATCH_NORM]
    merged, last = segment.merged, chain[segment.dense[-1]]
    site = Site(
        form=form,
        block=block,
        run=tuple(call.path for call in run),
        activations=tuple(call.path for call in run if structure.parts[call].role is Role.ACTIVATION),
        norms=tuple(call.path for call in norms),
        norm_channels=tuple((call.shape or ())[structure.parts[call].axis or -1] for call in norms),
        cropped=tuple(chain[i].path for i in segment.cropped),
        tokens=_positions(last, merged),
        params_saved=sum(count_parameters(structure.modules[path]) for path in structure.outermost(run))
        - merged.weight.numel()
        - merged.bias.numel(),
        macs_saved=segment.macs_saved,
    )
    channels, axis = structure.channels_behind(run[-1], parts[segment.dense[-1]].axis or -1, block)
    return replace(site, channels=channels, channel_axis=axis)


def _positions(call: Call, map: AffineMap) -> int:
    size = 1
    for length in call.shape or ():
        size *= length
    return size // map.out_channels
