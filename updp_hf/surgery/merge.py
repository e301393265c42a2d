"""From a closed model to the merged one: each site one map, written into a slot of the stock architecture."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from updp_hf.core.algebra import affine
from updp_hf.core.algebra.kernels import move_padding
from updp_hf.core.gates.contexts import evaluation, full_precision
from updp_hf.core.gates.gate import Gate, gates
from updp_hf.core.plan.plan import Plan
from updp_hf.core.plan.site import Form, Site, outermost
from updp_hf.errors import MergeError
from updp_hf.hf_internals import without_autocast
from updp_hf.model.layout_updp import EPS, EndActivation, Mark, Skip, Zero, get_slot, layout_of, set_slot
from updp_hf.model.modeling_updp import UPDPForImageClassification, with_layout
from updp_hf.surgery.find import plan_of
from updp_hf.surgery.model_io import example_inputs_of, logits_of
from updp_hf.surgery.stock import without_blocks

__all__ = ["merge"]

logger = logging.get_logger(__name__)

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of merged and closed logits, relative to the largest logit, by dtype."""


def merge(
    model: nn.Module, *, example_inputs: Mapping[str, Tensor] | None = None, tolerance: float | None = None
) -> nn.Module:
    """Return the merged copy of a closed `model`: each site one map, nothing of ours computed but what is left.

    Args:
        model: a gated model with every λ at 1; it is left as it is.
        example_inputs: images on which merged and closed logits are compared; random ones by default.
        tolerance: largest difference allowed, relative to the largest logit; by default what fits the dtype.

    Returns:
        For a transformers model an `UPDPForImageClassification`, or the stock class where its configuration can express
        the result; for any other module a module of the same class.

    Raises:
        MergeError: a gate is not closed, or the merged logits differ.
        PlanError: the model is not gated.
    """
    plan = plan_of(model)
    _refuse_half_open(model)
    model = without_autocast(model)
    merged = copy.deepcopy(model).eval()
    del merged.updp_plan
    layout: dict[str, dict[str, Any]] = {}
    for site in plan.sites:
        layout |= _merge_site_(merged, site)
    for block in plan.blocks if plan.end_activation is not None else []:
        layout[block] = _merge_end_(merged, block, plan)

    if not plan.sites:
        return merged.train(model.training)
    inputs = example_inputs_of(model, batch_size=2) if example_inputs is None else dict(example_inputs)
    limit = TOLERANCES[next(model.parameters()).dtype] if tolerance is None else tolerance
    drops_only = all(site.form is Form.BLOCK_DROP for site in plan.sites)
    if isinstance(merged, PreTrainedModel) and drops_only:
        stock = without_blocks(merged, plan.blocks)
        if stock is not None and _difference(model, stock, inputs) <= limit:
            return stock.train(model.training)
        logger.info("The stock configuration cannot express the result; the dropped blocks are recorded in a layout.")
    error = _difference(model, merged, inputs)
    _refuse_difference(error, limit)
    if not isinstance(merged, PreTrainedModel):
        return merged.train(model.training)
    if isinstance(merged, UPDPForImageClassification):
        layout = {path.removeprefix("base."): spec for path, spec in layout.items()}
        inside = tuple(f"{path}." for path, spec in layout.items() if spec["kind"] != "end")
        earlier = {path: spec for path, spec in (merged.config.layout or {}).items() if not path.startswith(inside)}
        layout = {**earlier, **layout}
        plan = _after_earlier(plan, merged.config.plan)
        merged = merged.base
    return with_layout(merged, layout, plan=plan.to_dict(), merge_error=error).train(model.training)


def _after_earlier(plan: Plan, earlier: Mapping[str, Any] | None) -> Plan:
    """Return the plan of both prunings of a model that had been pruned before, with the slots of the stock model."""

    def stock(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(path.removeprefix("base.") for path in paths)

    sites = [
        replace(
            site,
            block=site.block.removeprefix("base."),
            container=site.container and site.container.removeprefix("base."),
            run=stock(site.run),
            activations=stock(site.activations),
            norms=stock(site.norms),
            shared=stock(site.shared),
            marked=stock(site.marked),
            cropped=stock(site.cropped),
        )
        for site in plan.sites
    ]
    before = Plan.from_dict(earlier) if earlier else Plan(())
    slots = [slot for site in sites for slot in site.run]
    kept = [site for site in before.sites if not any(_clash(old, new) for old in site.run for new in slots)]
    if any(site.form is Form.BLOCK_DROP for site in (*kept, *sites)):
        plan = replace(plan, end_activation=None)  # nothing is left of those blocks that it could follow
    return replace(plan, sites=(*kept, *sites), base_model=before.base_model, revision=before.revision)


def _clash(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _merge_site_(merged: nn.Module, site: Site) -> dict[str, dict[str, Any]]:
    """Fold one site in place and return its part of the layout."""
    identity: dict[str, Any] = {"kind": "identity"}
    if site.form in (Form.ATTENTION_DROP, Form.BLOCK_DROP):
        drop = Zero if site.form is Form.ATTENTION_DROP else Skip
        *before, last = site.run
        for slot in before:
            set_slot(merged, slot, nn.Identity())
        set_slot(merged, last, drop(site.outputs))
        return {**dict.fromkeys(before, identity), last: {"kind": drop.__name__.lower(), "outputs": site.outputs}}
    # What lies inside another slot of the run, as an activation does in its BatchNorm, goes with it.
    slots = outermost(site.run)
    modules = {slot: _closed(get_slot(merged, slot)) for slot in slots}
    home = next(slot for slot, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d))
    like = affine.read(modules[home])
    maps = [affine.read(module, like) for module in modules.values() if not isinstance(module, nn.Identity)]
    moved, _ = move_padding(maps)  # where the gates have it
    result = affine.write(affine.fold(moved), like=modules[home])
    layout = {slot: {"kind": "mark"} if slot in site.marked else identity for slot in slots}
    for slot in slots:
        set_slot(merged, slot, Mark() if slot in site.marked else nn.Identity())
    set_slot(merged, home, result)
    return {**layout, home: layout_of(result), **{slot: {"kind": "unless_marked"} for slot in site.shared}}


def _closed(module: nn.Module) -> nn.Module:
    return module.closed() if isinstance(module, Gate) else module


def _merge_end_(merged: nn.Module, block: str, plan: Plan) -> dict[str, Any]:
    wrapper = get_slot(merged, block)
    assert isinstance(wrapper, EndActivation)
    assert isinstance(wrapper.end, Gate)
    wrapper.end = wrapper.end.closed()
    site = next(site for site in plan.sites if site.block == block)
    spec = {"kind": "end", "channels": site.channels, "channel_axis": site.channel_axis, "eps": EPS}
    return {**spec, "activation": plan.end_activation}


@torch.no_grad()
def _difference(closed: nn.Module, merged: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Return the largest difference of the logits, relative to the largest logit."""
    with evaluation(closed), evaluation(merged), full_precision():
        expected, found = (logits_of(model, inputs).double() for model in (closed, merged))
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found - expected).abs().max() / scale)


def _refuse_difference(error: float, limit: float) -> None:
    if not error <= limit:
        raise MergeError(
            f"Merged and closed logits differ by {error:.1e} of the largest logit, expected at most {limit:.0e}: merge "
            "in float32 or float64, and report this model if it still differs."
        )
    logger.info("Merged: logits differ by %.1e of the largest one.", error)


def _refuse_half_open(model: nn.Module) -> None:
    open_ = {path: float(gate.lam) for path, gate in gates(model) if float(gate.lam) != 1.0}
    if open_:
        path, value = next(iter(open_.items()))
        raise MergeError(
            f"{len(open_)} gates are not closed ({path!r} has λ = {value:g}), but only a closed model can be merged: "
            "train until the ramp has ended, or load a checkpoint from after it."
        )
