"""Find and gate: where a model can be closed, and gates put there. No model class is named here."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from updp_hf.core.cost import LatencyTable, count_parameters, macs_by_module
from updp_hf.core.depth.finder import find
from updp_hf.core.gates.building import build_gates
from updp_hf.core.gates.contexts import open_gates
from updp_hf.core.gates.gate import Blend, Gate, gates, is_gated
from updp_hf.core.graph.calls import stock_modules, trace
from updp_hf.core.graph.roles import is_registered
from updp_hf.core.graph.structure import Structure
from updp_hf.core.plan.plan import Plan
from updp_hf.core.plan.site import DEFAULT_FORM, Form, Refusal, Site
from updp_hf.errors import PlanError, UPDPError
from updp_hf.model.layout_updp import (
    EPS,
    EndActivation,
    batch_norm_and_activation,
    get_slot,
    let_marked_pass_,
    set_slot,
)
from updp_hf.surgery.model_io import example_inputs_of

__all__ = [
    "FoundSites",
    "blocks_of",
    "close_",
    "close_only_",
    "end_gates",
    "find_sites",
    "gate_",
    "plan_of",
    "require_sites",
    "set_lambdas_",
    "site_gates",
    "without_gates",
]

logger = logging.get_logger(__name__)


class FoundSites(NamedTuple):
    """The sites of a model in order of execution, and the blocks that have none, with the reason."""

    sites: tuple[Site, ...]
    refused: tuple[Refusal, ...]


def find_sites(
    model: nn.Module,
    forms: Iterable[Form | str] = (DEFAULT_FORM,),
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    latencies: LatencyTable | None = None,
) -> FoundSites:
    """Find what can be closed in `model`, gated or not, and what that saves.

    A chain of layers is split into runs that pay, by their MACs or, if `latencies` is given, by their latency on the
    model's device. `Site.pays` tells those that make the model cheaper.

    Args:
        model: any module that `torch.export` understands.
        forms: what closing may leave behind. Sites of different forms overlap; a plan takes one of each place.
        example_inputs: keyword arguments of one forward on one image; made from the configuration by default.
        latencies: what has been measured so far, maybe nothing; what is measured now is added to it.

    Raises:
        ExportError: the model cannot be exported.
        ValueError: the model is wrapped, or no example input can be made for it.
    """
    return _find(model, forms, example_inputs, latencies)


def _find(
    model: nn.Module,
    forms: Iterable[Form | str],
    example_inputs: Mapping[str, Tensor] | None,
    latencies: LatencyTable | None = None,
    *,
    every: bool = False,
) -> FoundSites:
    _refuse_wrapped(model)
    inputs = example_inputs_of(model) if example_inputs is None else dict(example_inputs)
    structure = Structure(model, trace(model, inputs, is_registered))
    found = [result for form in forms for result in find(structure, Form(form), latencies, every=every)]
    refused = [result for result in found if isinstance(result, Refusal)]
    sites = [result for result in found if isinstance(result, Site) and result.form.merges]
    contained = [result for result in found if isinstance(result, Site) and not result.form.merges]
    for site in _with_costs(model, inputs, structure, contained) if contained else []:
        if site.container is None:
            called = f"{site.run[-1]!r} is called with or returns more than one tensor"
            refused.append(Refusal(site.form, site.block, f"{called}, so nothing simple can stand in its place"))
        else:
            sites.append(site)
    order = {call.path: index for index, call in reversed(list(enumerate(structure.graph.calls)))}
    sites.sort(key=lambda site: order.get(site.run[0], order.get(structure.graph.within(site.run[0])[0].path, 0)))
    return FoundSites(tuple(sites), tuple(refused))


def blocks_of(model: nn.Module, example_inputs: Mapping[str, Tensor] | None = None) -> list[str]:
    """Return the blocks of `model`, pruned or not, in order of execution; of nested ones the innermost.

    Raises:
        ExportError: the model cannot be exported.
        ValueError: no example input can be made for it.
    """
    inputs = example_inputs_of(model) if example_inputs is None else dict(example_inputs)
    blocks = Structure(model, trace(model, inputs, is_registered)).blocks()
    return [block for block in blocks if not any(other.startswith(f"{block}.") for other in blocks)]


def require_sites(
    model: nn.Module,
    form: Form | str,
    example_inputs: Mapping[str, Tensor] | None = None,
    latencies: LatencyTable | None = None,
) -> tuple[Site, ...]:
    """Return the sites of `model` of one form that pay: closing them makes the model cheaper.

    Raises:
        PlanError: there are none; the message tells what was looked for and where the search stopped.
    """
    found = find_sites(model, [form], example_inputs=example_inputs, latencies=latencies)
    sites = tuple(site for site in found.sites if site.pays)
    if not sites:
        where = [f"{refusal.block}: {refusal.reason}" for refusal in found.refused[:3]]
        dearer = [f"{site.block}: closing it would be dearer ({-site.macs_saved:+,} MACs)" for site in found.sites[:3]]
        raise PlanError(
            f"{type(model).__name__} has no site of the form {str(form)!r} that pays. "
            + ("; ".join(dearer + where) or "No repeated blocks with Linears or convolutions were found")
            + ". Try another form, or name a non-linearity of your own with `register_closable`."
        )
    return sites


def gate_(model: nn.Module, plan: Plan, *, example_inputs: Mapping[str, Tensor] | None = None) -> None:
    """Put a gate into every slot of `model` that `plan` closes. All stand at λ = 0: the function does not change.

    The pruned sides hold no calibrated weights yet; see `calibrate_`. Gate before the optimizer is built and before the
    model is wrapped. Gating again with the same plan changes nothing.

    Raises:
        PlanError: the model has no such sites, or is gated with another plan.
        ValueError: the model is wrapped.
    """
    _refuse_wrapped(model)
    if is_gated(model):
        if plan_of(model).digest() != plan.digest():
            raise PlanError("The model is already gated with another plan: gate a fresh copy of the checkpoint.")
        return
    plan.check(_find(model, {site.form for site in plan.sites}, example_inputs, every=True).sites)
    ended = [block for block in plan.blocks if isinstance(get_slot(model, block), EndActivation)]
    if plan.end_activation is not None and ended:
        raise PlanError(
            f"{ended[0]!r} ends with an activation from an earlier pruning already: plan this one without "
            "end_activation, or for other blocks."
        )
    device = next(model.parameters()).device  # an activation's gate cannot tell it from its own parameters
    for site in plan.sites:
        if not site.pays:
            logger.warning("Closing %s makes the model dearer by %d MACs.", site, -site.macs_saved)
        for slot, gate in build_gates(model, site, plan.start).items():
            set_slot(model, slot, gate.to(device))
        for slot in site.shared:
            let_marked_pass_(model, slot)
    if plan.end_activation is not None:
        for block in plan.blocks:
            _append_end_(model, block, plan)
    model.updp_plan = plan  # type: ignore[assignment]


def without_gates(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with the original in every slot that holds a gate."""
    stock = copy.deepcopy(model)
    stock.__dict__.pop("updp_plan", None)
    for path, gate in reversed(list(gates(stock))):
        stock.set_submodule(path, gate.original)
    return stock


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
    return [gate for slot in site.run if isinstance(gate := get_slot(model, slot), Gate)]


def end_gates(model: nn.Module, sites: Iterable[Site]) -> list[Gate]:
    """Return the gates of the activations behind the blocks of `sites`, if the plan puts any there."""
    wrappers = [get_slot(model, block) for block in dict.fromkeys(site.block for site in sites)]
    return [w.end for w in wrappers if isinstance(w, EndActivation) and isinstance(w.end, Gate)]


def set_lambdas_(model: nn.Module, lambdas: Mapping[str, float]) -> None:
    """Set λ by the path of the gate, as a policy gives it."""
    for path, value in lambdas.items():
        gate = model.get_submodule(path)
        assert isinstance(gate, Gate)
        gate.set_lambda_(value)


def close_(model: nn.Module) -> None:
    """Set λ = 1 in every gate of `model`.

    A running average of a model that is being pruned (`timm.utils.ModelEmaV3`, `torch.optim.swa_utils.AveragedModel`)
    averages λ as well, or leaves it where it was: close the average before it is evaluated or merged.
    """
    for _, gate in gates(model):
        gate.set_lambda_(1.0)


def close_only_(model: nn.Module, choice: Iterable[int]) -> None:
    """Close the sites of the plan that have the indices in `choice`, and open all others."""
    plan = plan_of(model)
    closed = [plan.sites[index] for index in choice]
    for gate in {*(g for site in plan.sites for g in site_gates(model, site)), *end_gates(model, plan.sites)}:
        gate.set_lambda_(0.0)
    for gate in {*(g for site in closed for g in site_gates(model, site)), *end_gates(model, closed)}:
        gate.set_lambda_(1.0)


def _append_end_(model: nn.Module, block: str, plan: Plan) -> None:
    site = next(site for site in plan.sites if site.block == block)
    stock = get_slot(model, block)
    like = next(stock.parameters())
    end = batch_norm_and_activation(site.channels, EPS, site.channel_axis, plan.end_activation or "")
    set_slot(model, block, EndActivation(stock, Blend(nn.Identity(), end.to(like.device, like.dtype)).to(like.device)))


def _refuse_wrapped(model: nn.Module) -> None:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch._dynamo.eval_frame.OptimizedModule)
    if isinstance(model, wrappers):
        raise UPDPError(
            f"The model is wrapped in {type(model).__name__}, but its structure can be changed only before that: pass "
            "the model itself, and wrap or compile it afterwards."
        )


class _Observed(NamedTuple):
    """How a module was called in one forward."""

    outputs: int  # length of the tuple that it returned, 0 for a tensor
    is_plain: bool  # called with one tensor and nothing else, and returning one: a Linear can stand in its place
    is_droppable: bool  # returning tensors only: None can stand for all but the first


def _with_costs(model: nn.Module, inputs: Mapping[str, Tensor], structure: Structure, sites: list[Site]) -> list[Site]:
    """Measure on one forward what each site costs now, and how its container is called."""
    observed: dict[str, _Observed] = {}

    def observe(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            is_tensor = isinstance(output, Tensor)
            observed[path] = _Observed(
                outputs=0 if is_tensor else len(output),
                is_plain=is_tensor and len(args) == 1 and not kwargs,
                is_droppable=is_tensor or all(value is None or isinstance(value, Tensor) for value in output),
            )

        return get_slot(model, path).register_forward_hook(hook, with_kwargs=True)

    handles = [observe(path) for path in {site.container for site in sites if site.container}]
    try:
        with open_gates(model):
            macs = macs_by_module(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    macs = {path: macs.get(real, 0) for real, (path, _) in stock_modules(model).items()}
    return [_with_cost(site, structure, macs, observed) for site in sites]


def _with_cost(site: Site, structure: Structure, macs: Mapping[str, int], observed: Mapping[str, _Observed]) -> Site:
    params = sum(count_parameters(structure.modules[path]) for path in site.run)
    spent = sum(macs[path] for path in site.run)
    seen = observed[site.run[-1]]
    if site.form is Form.BRANCH_FIT:
        params -= (site.channels + 1) * site.channels
        spent -= site.tokens * site.channels * site.channels
        stands = seen.is_plain
    else:
        stands = seen.is_droppable
    container = site.container if stands else None
    outputs = 0 if site.form is Form.BRANCH_FIT else seen.outputs
    return replace(site, params_saved=params, macs_saved=spent, container=container, outputs=outputs)
