"""The way from a model to its merged copy, loaded again, with the largest differences on it."""

import collections
import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
)

from recipes.benchmarks.coverage.building import build_small
from recipes.benchmarks.coverage.causes import cause_of
from recipes.benchmarks.coverage.inputs import converted
from recipes.benchmarks.coverage.row import Row
from recipes.benchmarks.coverage.weights import randomise_, settle_
from updp_hf import Form, Plan, UPDPForImageClassification, close_, find_sites, gate_, merge
from updp_hf.core.cost import count_macs
from updp_hf.core.graph.structure import Structure
from updp_hf.core.plan.site import Site
from updp_hf.model.layout_updp import get_slot
from updp_hf.surgery.find import read
from updp_hf.surgery.merge import TOLERANCES
from updp_hf.surgery.model_io import logits_of


@torch.no_grad()
def measure(row: Row, seed: int, report: Callable[[str], None]) -> None:
    """Fill in the row, telling `report` what is done next."""
    model, inputs = build_small(row, seed)
    one = converted(inputs, torch.float64, batch_size=1)

    report("find")
    structure = read(model, one)
    sites = choose_sites(row, model, structure)
    if not sites:
        return
    plan = Plan(tuple(sites), start="inherit")
    row.form, row.closed, row.macs_before = str(sites[0].form), len(sites), count_macs(model, one)

    report("gate")
    expected = logits_of(model, inputs)
    gate_(model, plan, structure=structure)
    row.gate_error = difference(expected, logits_of(model, inputs))

    report("close")
    close_(model)
    randomise_(model, seed + 1)
    settle_(model, inputs)

    for dtype in (torch.float64, torch.float32):
        report(f"merge in {str(dtype).removeprefix('torch.')}")
        closed = model.to(dtype).train().eval()  # Levit's cache keeps its dtype until the mode changes
        images = converted(inputs, dtype)
        merged = merge(closed, example_inputs=images)
        error = largest_difference(closed, merged, images, plan.blocks)
        row.merge_errors[str(dtype).removeprefix("torch.")] = error
        if not error <= TOLERANCES[dtype]:
            raise ValueError(f"blocks of the merged and the closed model differ by {error:.0e}")

    report("count")
    row.macs_after = count_macs(merged, converted(one, torch.float32))
    report("reload")
    row.reloaded = loads_identically(merged, images)


def choose_sites(row: Row, model: PreTrainedModel, structure: Structure) -> list[Site]:
    """Return the sites that save compute, of the form `merge` or else of the first that has any."""
    found = find_sites(model, [Form.MERGE], structure=structure)
    row.exported = True
    cheap = [site for site in found.sites if site.saves_compute]
    row.sites, row.cheap = len(found.sites), len(cheap)
    row.refusals = dict(collections.Counter(cause_of(none.reason) for none in found.unsupported))
    if cheap:
        return cheap
    if found.sites:
        row.why_not = "closing any of the sites saves nothing"
    else:
        row.why_not = found.unsupported[0].reason if found.unsupported else "no blocks to look into"
    others = [site for site in find_sites(model, list(Form), structure=structure).sites if site.saves_compute]
    form = next((form for form in Form if any(site.form == form for site in others)), None)
    return [site for site in others if site.form == form]


def largest_difference(
    closed: PreTrainedModel, merged: PreTrainedModel, inputs: dict[str, Tensor], blocks: list[str]
) -> float:
    """Return the largest difference of the logits and of what the pruned blocks return."""
    places = blocks if isinstance(merged, UPDPForImageClassification) else []  # a stock model has lost dropped blocks
    expected, found = (observe(model, inputs, places) for model in (closed, merged))
    return max(difference(value, found[place]) for place, value in expected.items())


def observe(model: PreTrainedModel, inputs: dict[str, Tensor], blocks: list[str]) -> dict[str, Tensor]:
    """Return the logits and the outputs of `blocks`, paths of the stock architecture."""
    seen: dict[str, Tensor] = {}
    root = model.base if isinstance(model, UPDPForImageClassification) else model

    def keep(path: str, output: Any) -> None:
        seen[path] = output if isinstance(output, Tensor) else output[0]

    handles = [
        get_slot(root, path).register_forward_hook(lambda module, args, output, path=path: keep(path, output))
        for path in blocks
    ]
    seen["logits"] = logits_of(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def difference(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference, relative to how much the images differ: a constant would agree with anything."""
    spread = (expected - expected.mean(0)).abs().max()
    return float((found - expected).abs().max() / spread)


def loads_identically(merged: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
    """Save and load the model; return whether every weight was found and the logits are the same to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        loaded, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        # Weights in a mapped file are not aligned in memory, which moves the last bit; a copy's are.
        loaded = copy.deepcopy(loaded)
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    return not wrong and torch.equal(logits_of(loaded, inputs), logits_of(merged, inputs))
