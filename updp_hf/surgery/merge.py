"""From a closed model to the merged one: each site one map, written into a slot of the stock architecture."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from updp_hf.core.gates.contexts import evaluation, full_precision
from updp_hf.core.gates.gate import Gate, gates
from updp_hf.core.plan.plan import Plan
from updp_hf.errors import MergeError
from updp_hf.model.configuration_updp import UPDPConfig
from updp_hf.model.layout_updp import get_slot, layout_of, set_slot
from updp_hf.model.modeling_updp import UPDPForImageClassification, with_layout
from updp_hf.model.modules_updp import EPS, EndActivation
from updp_hf.surgery.gate import plan_of
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
    _check_closed(model)
    model = _without_autocast(model)
    merged = copy.deepcopy(model).eval()
    del merged.updp_plan
    layout: dict[str, dict[str, Any]] = {}
    for site in plan.sites:
        for slot, module in site.merged(merged).items():
            set_slot(merged, slot, module)
            layout[slot] = layout_of(module)
    for block in plan.blocks if plan.end_activation is not None else []:
        layout[block] = _merge_end_(merged, block, plan)

    if not plan.sites:
        return merged.train(model.training)
    inputs = example_inputs_of(model, batch_size=2) if example_inputs is None else dict(example_inputs)
    limit = TOLERANCES[next(model.parameters()).dtype] if tolerance is None else tolerance
    if isinstance(merged, PreTrainedModel) and all(site.drops_block for site in plan.sites):
        stock = without_blocks(merged, plan.blocks)
        if stock is not None and _difference(model, stock, inputs) <= limit:
            return stock.train(model.training)
        logger.info("The stock configuration cannot express the result; the dropped blocks are recorded in a layout.")
    error = _difference(model, merged, inputs)
    _check_difference(error, limit)
    if not isinstance(merged, PreTrainedModel):
        return merged.train(model.training)
    if isinstance(merged, UPDPForImageClassification):
        plan, layout = _after_earlier(plan, layout, merged.config)
        merged = merged.base
    return with_layout(merged, layout, plan=plan.to_dict(), merge_error=error).train(model.training)


def _after_earlier(
    plan: Plan, layout: Mapping[str, dict[str, Any]], config: UPDPConfig
) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """Return plan and layout of both prunings of a model that had been pruned before, by the stock model's paths."""
    layout = {path.removeprefix("base."): spec for path, spec in layout.items()}
    inside = tuple(f"{path}." for path, spec in layout.items() if spec["kind"] != "end")
    earlier = {path: spec for path, spec in (config.layout or {}).items() if not path.startswith(inside)}
    plan = Plan.from_dict(_by_stock_paths(plan.to_dict()))
    before = Plan.from_dict(config.plan) if config.plan else Plan(())
    slots = [slot for site in plan.sites for slot in site.slots]
    kept = [site for site in before.sites if not any(_clash(old, new) for old in site.slots for new in slots)]
    sites = (*kept, *plan.sites)
    # Nothing is left of a dropped block that an activation could follow.
    end = None if any(site.drops_block for site in sites) else plan.end_activation
    both = replace(plan, sites=sites, end_activation=end, base_model=before.base_model, revision=before.revision)
    return both, {**earlier, **layout}


def _by_stock_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _by_stock_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_by_stock_paths(inner) for inner in value]
    return value.removeprefix("base.") if isinstance(value, str) else value


def _clash(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _without_autocast(model: nn.Module) -> nn.Module:
    """Return the model without the autocast that accelerate wraps around `forward` to train in bf16 or fp16."""
    if "_original_forward" not in model.__dict__:
        return model
    bare = copy.deepcopy(model)
    del bare._original_forward, bare.forward
    return bare


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


def _check_difference(error: float, limit: float) -> None:
    if not error <= limit:
        raise MergeError(
            f"Merged and closed logits differ by {error:.1e} of the largest logit, expected at most {limit:.0e}: merge "
            "in float32 or float64, and report this model if it still differs."
        )
    logger.info("Merged: logits differ by %.1e of the largest one.", error)


def _check_closed(model: nn.Module) -> None:
    open_ = {path: float(gate.lam) for path, gate in gates(model) if float(gate.lam) != 1.0}
    if open_:
        path, value = next(iter(open_.items()))
        raise MergeError(
            f"{len(open_)} gates are not closed ({path!r} has λ = {value:g}), but only a closed model can be merged: "
            "train until the ramp has ended, or load a checkpoint from after it."
        )
