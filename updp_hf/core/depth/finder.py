"""From the structure of a model to its sites, and the reason where there is none."""

from collections.abc import Callable, Iterable, Iterator

from updp_hf.core.cost import LatencyTable
from updp_hf.core.depth.branches import find_blocks, find_branches
from updp_hf.core.depth.runs import find_runs, where_chains_end
from updp_hf.core.graph.structure import Structure
from updp_hf.core.plan.site import Form, Refusal, Site

__all__ = ["find"]

_RUN = "two Linears or convolutions with only closable non-linearities between them, each feeding only the next"
_LOOKED_FOR = {
    Form.MERGE: _RUN,
    Form.MERGE_KEEP_NORM: _RUN,
    Form.MERGE_WHOLE_KERNELS: _RUN,
    Form.BRANCH_FIT: "a module that maps each token by itself, one tensor in and one of the same shape out",
    Form.ATTENTION_DROP: "a module with attention in it, one tensor in and one of the same shape out",
    Form.BLOCK_DROP: "one tensor into the block and one of the same shape out",
}


def find(
    structure: Structure, form: Form, latencies: LatencyTable | None = None, *, every: bool = False
) -> Iterator[Site | Refusal]:
    """Yield, block by block, the sites of `form` or the reason why there is none: see `find_runs`."""
    finder: Callable[[str], Iterable[Site]] = {
        Form.BRANCH_FIT: lambda block: find_branches(structure, block, form),
        Form.ATTENTION_DROP: lambda block: find_branches(structure, block, form),
        Form.BLOCK_DROP: lambda block: find_blocks(structure, block),
    }.get(form, lambda block: find_runs(structure, block, form, latencies, every=every))
    found = {block: list(finder(block)) for block in structure.blocks()}
    if form is Form.BLOCK_DROP:
        # A block goes with the block around it.
        whole = [block for block, sites in found.items() if sites]
        found = {b: sites for b, sites in found.items() if not any(b.startswith(f"{outer}.") for outer in whole)}
    for block, sites in found.items():
        if sites:
            yield from sites
        else:
            reasons = structure.reasons.get(block, []) or (where_chains_end(structure, block) if form.merges else [])
            yield Refusal(form, block, "; ".join([f"looked for {_LOOKED_FOR[form]}", *reasons[:3]]))
