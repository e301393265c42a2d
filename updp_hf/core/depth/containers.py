"""Modules with one tensor in and one of the same shape out, for which something simpler can stand."""

import math
from collections.abc import Callable, Iterator

from updp_hf.core.graph.calls import Call
from updp_hf.core.graph.structure import Structure, has_children

__all__ = ["branches_in", "result_of", "why_other_results"]


def branches_in(structure: Structure, block: str, is_wanted: Callable[[list[Call]], bool]) -> Iterator[str]:
    """Yield the outermost modules in `block` of whose calls `is_wanted` holds."""
    found: list[str] = []
    blocks = structure.blocks()
    for path, module in structure.modules.items():
        if not has_children(module) or structure.block_of(path) != block or path in blocks:
            continue
        if any(path.startswith(f"{outer}.") for outer in found) or any(
            other.startswith(f"{path}.") for other in blocks
        ):
            continue
        calls = structure.graph.within(path)
        if structure.single_source(path, calls) is not None and is_wanted(calls):
            found.append(path)
            yield path


def result_of(structure: Structure, path: str) -> tuple[int, int]:
    """Return the length of the last axis of what `path` returns, and how many such vectors there are for one image."""
    # An operation on windows has a batch of its own, and the example is one image.
    shape = structure.graph.within(path)[-1].shape or (0,)
    return shape[-1], math.prod(shape[:-1])


def why_other_results(structure: Structure, path: str, outputs: int, channels: int | None = None) -> str:
    """Return "" if `path` returns so many outputs, 0 for a tensor, of so many channels, else what it does."""
    if (found := structure.seen[path].outputs) != outputs:
        kinds = [f"a tuple of {count}" if count else "a tensor" for count in (found, outputs)]
        return f"{path!r} returns {kinds[0]} where {kinds[1]} is expected"
    count, _ = result_of(structure, path)
    return "" if channels in (None, count) else f"{path!r} returns {count} channels where {channels} are expected"
