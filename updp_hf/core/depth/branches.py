"""Branches and whole blocks: modules with one tensor in and one of the same shape out."""

import math
from collections.abc import Iterator

import torch

from updp_hf.core.graph.calls import Call
from updp_hf.core.graph.roles import is_pointwise
from updp_hf.core.graph.structure import Structure, has_children
from updp_hf.core.plan.site import Form, Site

__all__ = ["find_blocks", "find_branches"]

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


def find_branches(structure: Structure, block: str, form: Form) -> Iterator[Site]:
    """Yield the outermost branches in `block` with attention in them, or those that map each token by itself."""
    found: list[str] = []
    blocks = structure.blocks()
    for path, module in structure.modules.items():
        is_inside = structure.block_of(path) == block and not any(path.startswith(f"{outer}.") for outer in found)
        holds_blocks = any(other.startswith(f"{path}.") for other in blocks)
        if not is_inside or path in blocks or holds_blocks or not has_children(module):
            continue
        calls = structure.graph.within(path)
        source = structure.single_source(path, calls)
        is_wanted = _is_attention if form is Form.ATTENTION_DROP else _is_per_token
        if source is None or not is_wanted(calls):
            continue
        found.append(path)
        leads = structure.is_norm(source) and all(user in calls for user in source.users)
        run = (source.path, path) if leads and form is Form.ATTENTION_DROP else (path,)
        yield _site(form, block, run, calls[-1])


def find_blocks(structure: Structure, block: str) -> Iterator[Site]:
    """Yield `block` itself, if it can be the identity."""
    calls = structure.graph.within(block)
    if structure.single_source(block, calls) is not None:
        yield _site(Form.BLOCK_DROP, block, (block,), calls[-1])


def _site(form: Form, block: str, run: tuple[str, ...], result: Call) -> Site:
    shape = result.shape or (0,)
    # An operation on windows has a batch of its own, and the example is one image.
    return Site(form, block, run, container=run[-1], channels=shape[-1], tokens=math.prod(shape[:-1]))


def _is_attention(calls: list[Call]) -> bool:
    return any(target in _MIXING for call in calls for target in call.targets)


def _is_per_token(calls: list[Call]) -> bool:
    nodes = [node for call in calls for node in call.operations]
    return sum(node.target is torch.ops.aten.linear.default for node in nodes) > 1 and all(
        node.target in _PER_TOKEN
        or is_pointwise(node.target)
        or getattr(node.target, "__name__", "") == "getitem"
        or (node.target in _SPLITS and node.args[2:3] == (-1,))
        for node in nodes
    )
