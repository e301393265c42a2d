"""Put gates into a model and turn them."""

import copy
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from transformers.utils import logging

from updp_hf.core.gates.gate import Blend, Gate, gates, is_gated, set_lambda_
from updp_hf.core.graph.calls import check_unwrapped
from updp_hf.core.graph.structure import Structure
from updp_hf.core.plan.plan import Plan
from updp_hf.core.plan.site import Site
from updp_hf.errors import PlanError
from updp_hf.model.layout_updp import get_slot, set_slot
from updp_hf.model.modules_updp import EPS, EndActivation, batch_norm_and_activation
from updp_hf.surgery.find import read

__all__ = [
    "close_",
    "close_only_",
    "end_gates",
    "gate_",
    "insert_gates_",
    "plan_of",
    "site_gates",
    "without_gates",
]

logger = logging.get_logger(__name__)


def gate_(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    structure: Structure | None = None,
) -> None:
    """Put a gate into every slot of `model` that `plan` closes. All stand at λ = 0: the function does not change.

    The pruned sides hold no calibrated weights yet; see `calibrate_`. Gate before the optimizer is built and before the
    model is wrapped. Gating again with the same plan changes nothing.

    Args:
        model: the checkpoint.
        plan: what to close.
        example_inputs: keyword arguments of one forward on one image; made from the configuration by default.
        structure: what `read` returned for the model, if that was called before.

    Raises:
        PlanError: a site of the plan does not fit the model, or the model is gated with another plan.
        UPDPError: the model is wrapped.
    """
    check_unwrapped(model)
    if is_gated(model):
        if plan_of(model).digest() != plan.digest():
            raise PlanError("The model is already gated with another plan: gate a fresh copy of the checkpoint.")
        return
    plan.check(read(model, example_inputs) if structure is None else structure)
    insert_gates_(model, plan)
    for site in plan.sites:
        if not site.saves_compute:
            logger.warning("Closing %s makes the model more expensive by %d MACs.", site, -site.saving.macs)


def insert_gates_(model: nn.Module, plan: Plan) -> None:
    """Do what `gate_` does for a plan that is known to fit: its sites were found in a model of this structure.

    Raises:
        PlanError: a block ends with an activation from an earlier pruning, and the plan puts another one there.
    """
    ended = [block for block in plan.blocks if isinstance(get_slot(model, block), EndActivation)]
    if plan.end_activation is not None and ended:
        raise PlanError(
            f"{ended[0]!r} ends with an activation from an earlier pruning already: plan this one without "
            "end_activation, or for other blocks."
        )
    device = next(model.parameters()).device  # an activation's gate cannot tell it from its own parameters
    for site in plan.sites:
        for slot, gate in site.gates(model, plan.start).items():
            set_slot(model, slot, gate.to(device))
    for block in plan.blocks if plan.end_activation is not None else ():
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
    return [gate for slot in site.slots if isinstance(gate := get_slot(model, slot), Gate)]


def end_gates(model: nn.Module, sites: Iterable[Site]) -> list[Gate]:
    """Return the gates of the activations behind the blocks of `sites`, if the plan puts any there."""
    wrappers = [get_slot(model, block) for block in dict.fromkeys(site.block for site in sites)]
    return [w.end for w in wrappers if isinstance(w, EndActivation) and isinstance(w.end, Gate)]


def close_(model: nn.Module) -> None:
    """Set λ = 1 in every gate of `model`.

    A running average of a model that is being pruned (`timm.utils.ModelEmaV3`, `torch.optim.swa_utils.AveragedModel`)
    averages λ as well, or leaves it where it was: close the average before it is evaluated or merged.
    """
    set_lambda_(model, 1.0)


def close_only_(model: nn.Module, choice: Iterable[int]) -> None:
    """Close the sites of the plan that have the indices in `choice`, and open all others."""
    plan = plan_of(model)
    closed = [plan.sites[index] for index in choice]
    set_lambda_(model, 0.0)
    for gate in {*(g for site in closed for g in site_gates(model, site)), *end_gates(model, closed)}:
        gate.set_lambda_(1.0)


def _append_end_(model: nn.Module, block: str, plan: Plan) -> None:
    site = next(site for site in plan.sites if site.block == block)
    stock = get_slot(model, block)
    like = next(stock.parameters())
    end = batch_norm_and_activation(site.channels, EPS, site.channel_axis, plan.end_activation or "")
    set_slot(model, block, EndActivation(stock, Blend(nn.Identity(), end.to(like.device, like.dtype)).to(like.device)))
