"""Find, gate, merge: what changes the structure of a model. No model class is named here."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from updp_hf.core import affine
from updp_hf.core.closable import close_activation, close_norm, is_registered
from updp_hf.core.cost import count_parameters, macs_by_module
from updp_hf.core.gate import Gate, gates
from updp_hf.core.graph import stock_modules, trace
from updp_hf.core.modes import evaluation, open_gates
from updp_hf.core.plan import Plan, PlanError
from updp_hf.core.sites import Form, Refusal, Site, Structure
from updp_hf.inputs import example_inputs_of, logits_of
from updp_hf.layout_updp import EndActivation, Skip, Zero, batch_norm_and_activation, get_slot, set_slot
from updp_hf.modeling_updp import UPDPForImageClassification, with_layout
from updp_hf.stock import without_blocks

__all__ = [
    "FoundSites",
    "MergeError",
    "find_sites",
    "gate_",
    "merge",
    "plan_of",
    "require_sites",
    "set_lambdas_",
    "site_gates",
]

logger = logging.get_logger(__name__)

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of merged and closed logits, relative to the largest logit, by dtype."""
END_EPS = 1e-5


class MergeError(ValueError):
    """The model is not in a state to be merged, or the merged model does not compute what the closed one does."""


class FoundSites(NamedTuple):
    """The sites of a model in order of execution, and the blocks that have none, with the reason."""

    sites: tuple[Site, ...]
    refused: tuple[Refusal, ...]


def find_sites(
    model: nn.Module,
    forms: Iterable[Form | str] = (Form.FFN,),
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
) -> FoundSites:
    """Find what can be closed in `model`, gated or not.

    Args:
        model: any module that `torch.export` understands.
        forms: what closing may leave behind. Sites of different forms overlap; a plan takes one of each place.
        example_inputs: keyword arguments of one forward on one image; made from the configuration by default.

    Raises:
        ExportError: the model cannot be exported.
        ValueError: the model is wrapped, or no example input can be made for it.
    """
    _refuse_wrapped(model)
    inputs = example_inputs_of(model) if example_inputs is None else dict(example_inputs)
    structure = Structure(model, trace(model, inputs, is_registered))
    found = [result for form in forms for result in structure.find(Form(form))]
    sites = [result for result in found if isinstance(result, Site)]
    costed = _with_costs(model, inputs, structure, sites) if sites else []
    order = {call.path: index for index, call in reversed(list(enumerate(structure.graph.calls)))}
    costed.sort(key=lambda site: order.get(site.run[0], order.get(structure.calls_within(site.run[0])[0].path, 0)))
    return FoundSites(tuple(costed), tuple(result for result in found if isinstance(result, Refusal)))


def require_sites(
    model: nn.Module, form: Form | str, example_inputs: Mapping[str, Tensor] | None = None
) -> tuple[Site, ...]:
    """Return the sites of `model` of one form.

    Raises:
        PlanError: there are none; the message tells what was looked for and where the search stopped.
    """
    found = find_sites(model, [form], example_inputs=example_inputs)
    if not found.sites:
        where = [f"{refusal.block}: {refusal.reason}" for refusal in found.refused[:3]]
        raise PlanError(
            f"{type(model).__name__} has no site of the form {str(form)!r}. "
            + ("; ".join(where) if where else "No repeated blocks with Linear layers were found")
            + ". Try another form, or name a non-linearity of your own with `register_closable`."
        )
    return found.sites


def gate_(model: nn.Module, plan: Plan, *, example_inputs: Mapping[str, Tensor] | None = None) -> None:
    """Put a gate into every slot of `model` that `plan` closes. All stand at λ = 0: the function does not change.

    The pruned sides hold no calibrated weights yet; see `calibrate_`. Gate before the optimizer is built and before the
    model is wrapped. Gating again with the same plan changes nothing.

    Raises:
        PlanError: the model has no such sites, or is gated with another plan.
        ValueError: the model is wrapped.
    """
    _refuse_wrapped(model)
    if any(True for _ in gates(model)):
        if plan_of(model).digest() != plan.digest():
            raise PlanError("The model is already gated with another plan: gate a fresh copy of the checkpoint.")
        return
    plan.check(find_sites(model, {site.form for site in plan.sites}, example_inputs=example_inputs).sites)
    ended = [block for block in plan.blocks if isinstance(get_slot(model, block), EndActivation)]
    if plan.end_activation is not None and ended:
        raise PlanError(
            f"{ended[0]!r} ends with an activation from an earlier pruning already: plan this one without "
            "end_activation, or for other blocks."
        )
    device = next(model.parameters()).device  # an activation's gate cannot tell it from its own parameters
    for site in plan.sites:
        for slot in plan.gate_slots(site):
            original = get_slot(model, slot)
            set_slot(model, slot, Gate(original, _pruned_side(site, slot, original)).to(device))
    if plan.end_activation is not None:
        for block in plan.blocks:
            _append_end_(model, block, plan)
    model.updp_plan = plan  # type: ignore[assignment]


def plan_of(model: nn.Module) -> Plan:
    """Return the plan that `gate_` followed.

    Raises:
        PlanError: the model is not gated.
    """
    plan = getattr(model, "updp_plan", None)
    if not isinstance(plan, Plan):
        raise PlanError(f"{type(model).__name__} has no gates: call `gate_(model, plan)` first.")
    return plan


def site_gates(model: nn.Module, site: Site) -> list[Gate]:
    """Return the gates of one site of the plan that `model` is gated with."""
    return [gate for slot in plan_of(model).gate_slots(site) if isinstance(gate := get_slot(model, slot), Gate)]


def set_lambdas_(model: nn.Module, lambdas: Mapping[str, float]) -> None:
    """Set λ by the path of the gate, as a policy gives it."""
    for path, value in lambdas.items():
        gate = model.get_submodule(path)
        assert isinstance(gate, Gate)
        gate.set_lambda_(value)


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
    model = _without_autocast(model)
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
    if not isinstance(merged, PreTrainedModel):
        error = _difference(model, merged, inputs)
        _refuse_difference(error, limit)
        return merged.train(model.training)
    if all(site.form is Form.BLOCK_DROP for site in plan.sites) and plan.end_activation is None:
        stock = without_blocks(merged, plan.blocks)
        if stock is not None and _difference(model, stock, inputs) <= limit:
            return stock.train(model.training)
        logger.info("The stock configuration cannot express the result; the dropped blocks are recorded in a layout.")
    error = _difference(model, merged, inputs)
    _refuse_difference(error, limit)
    if isinstance(merged, UPDPForImageClassification):
        layout = {path.removeprefix("base."): spec for path, spec in layout.items()}
        inside = tuple(f"{path}." for path, spec in layout.items() if spec["kind"] != "end")
        earlier = {path: spec for path, spec in (merged.config.layout or {}).items() if not path.startswith(inside)}
        layout = {**earlier, **layout}
        merged = merged.base
    return with_layout(merged, layout, plan=plan.to_dict(), merge_error=error).train(model.training)


def _without_autocast(model: nn.Module) -> nn.Module:
    """Return a copy without the autocast that accelerate wraps around `forward` to train in bf16 or fp16."""
    bare = copy.deepcopy(model)
    if bare.__dict__.pop("_original_forward", None) is not None:
        del bare.forward
    return bare


def _pruned_side(site: Site, slot: str, original: nn.Module) -> nn.Module:
    if slot in site.norms:
        return close_norm(original)
    if slot in site.activations:
        return close_activation(original)
    if site.form is Form.ATTENTION_DROP:
        return Zero(site.outputs)
    if site.form is Form.BLOCK_DROP:
        return Skip(site.outputs)
    # Zeros, not random numbers: gating is not to draw from the generator that orders the training data.
    linear = nn.utils.skip_init(nn.Linear, site.channels, site.channels)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _append_end_(model: nn.Module, block: str, plan: Plan) -> None:
    channels = next(site.channels for site in plan.sites if site.block == block)
    stock = get_slot(model, block)
    like = next(stock.parameters())
    end = batch_norm_and_activation(channels, END_EPS, plan.end_activation or "").to(like.device, like.dtype)
    set_slot(model, block, EndActivation(stock, Gate(nn.Identity(), end).to(like.device)))


def _merge_site_(merged: nn.Module, site: Site) -> dict[str, dict[str, Any]]:
    """Fold one site in place and return its part of the layout."""
    identity: dict[str, Any] = {"kind": "identity"}
    if site.form in (Form.ATTENTION_DROP, Form.BLOCK_DROP):
        drop = Zero if site.form is Form.ATTENTION_DROP else Skip
        layout = dict.fromkeys(site.run[:-1], identity)
        layout[site.run[-1]] = {"kind": drop.__name__.lower(), "outputs": site.outputs}
        for slot in site.run[:-1]:
            set_slot(merged, slot, nn.Identity())
        set_slot(merged, site.run[-1], drop(site.outputs))
        return layout
    # A fitted Linear stands in the slot of the whole container, else the run's own slots are read one by one.
    slots = list(site.run)
    if isinstance(get_slot(merged, site.container or site.run[0]), Gate) and site.container:
        inside = [slot for slot in slots if slot.startswith(f"{site.container}.")] or [site.container]
        slots[slots.index(inside[0]) : slots.index(inside[-1]) + 1] = [site.container]
    modules = {slot: _closed(get_slot(merged, slot)) for slot in slots}
    home = next(slot for slot, module in modules.items() if isinstance(module, nn.Linear))
    maps = [affine.read(module) for module in modules.values() if not isinstance(module, nn.Identity)]
    linear = affine.write(affine.fold(maps), like=modules[home])
    for slot in slots:
        set_slot(merged, slot, linear if slot == home else nn.Identity())
    return {slot: _linear_spec(linear) if slot == home else identity for slot in slots}


def _closed(module: nn.Module) -> nn.Module:
    return module.pruned if isinstance(module, Gate) else module


def _linear_spec(linear: nn.Module) -> dict[str, Any]:
    assert isinstance(linear, nn.Linear)
    return {
        "kind": "linear",
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
    }


def _merge_end_(merged: nn.Module, block: str, plan: Plan) -> dict[str, Any]:
    wrapper = get_slot(merged, block)
    assert isinstance(wrapper, EndActivation)
    assert isinstance(wrapper.end, Gate)
    wrapper.end = wrapper.end.pruned
    channels = next(site.channels for site in plan.sites if site.block == block)
    return {"kind": "end", "channels": channels, "eps": END_EPS, "activation": plan.end_activation}


@torch.no_grad()
def _difference(closed: nn.Module, merged: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Return the largest difference of the logits, relative to the largest logit."""
    with evaluation(closed), evaluation(merged):
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


def _refuse_wrapped(model: nn.Module) -> None:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch._dynamo.eval_frame.OptimizedModule)
    if isinstance(model, wrappers):
        raise ValueError(
            f"The model is wrapped in {type(model).__name__}, but its structure can be changed only before that: pass "
            "the model itself, and wrap or compile it afterwards."
        )


def _with_costs(model: nn.Module, inputs: Mapping[str, Tensor], structure: Structure, sites: list[Site]) -> list[Site]:
    """Measure on one forward what each site costs now, and how many values a dropped module returns."""
    outputs: dict[str, int] = {}
    handles = [
        get_slot(model, path).register_forward_hook(
            lambda module, args, output, path=path: outputs.update(
                {path: 0 if isinstance(output, Tensor) else len(output)}
            )
        )
        for path in {site.container for site in sites if site.container}
    ]
    try:
        with open_gates(model):
            macs = macs_by_module(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    stock = {stock: real for real, (stock, _) in stock_modules(model).items()}
    return [_with_cost(site, structure, {path: macs.get(stock[path], 0) for path in stock}, outputs) for site in sites]


def _with_cost(site: Site, structure: Structure, macs: Mapping[str, int], outputs: Mapping[str, int]) -> Site:
    params = sum(count_parameters(structure.modules[path]) for path in site.run)
    spent = sum(macs[path] for path in site.run)
    if site.form not in (Form.ATTENTION_DROP, Form.BLOCK_DROP):
        first = next((m for path in site.run if isinstance(m := structure.modules[path], nn.Linear)), None)
        width = first.in_features if first is not None else site.channels
        params -= (width + 1) * site.channels
        spent -= site.tokens * width * site.channels
    return replace(site, params_saved=params, macs_saved=spent, outputs=outputs.get(site.container or "", 0))
