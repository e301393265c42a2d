"""Weights for the pruned sides of the gates, from some images: no labels, no gradients."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from updp_hf.core.algebra.least_squares import Moments, fit_scale
from updp_hf.core.gates.contexts import evaluation
from updp_hf.core.gates.gate import Blend, Gate
from updp_hf.core.plan.plan import Plan
from updp_hf.core.plan.site import Site
from updp_hf.errors import PlanError
from updp_hf.model.layout_updp import get_slot
from updp_hf.model.modules_updp import ChannelBatchNorm, first_tensor
from updp_hf.surgery.fitting import Fit, Hook, batch_norm_of, set_norm_
from updp_hf.surgery.gate import end_gates, insert_gates_, plan_of, site_gates
from updp_hf.surgery.model_io import check_batches, model_inputs

__all__ = ["calibrate_", "calibrated_copy"]


@torch.no_grad()
def calibrate_(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    sites: Sequence[Site] | None = None,
    *,
    reference: nn.Module | None = None,
) -> None:
    """Give the pruned sides of a gated `model` the weights that bring them nearest to what the open gates compute.

    Each BatchNorm takes its statistics from the input of the norm that it replaces, and the scale and shift that bring
    it nearest to that norm's output, so that the blend starts smoothly. Each fitted map is the ridge regression of its
    branch, and the BatchNorm behind it leaves it as it is until it is trained. Sites that are closed already are passed
    closed, so that sites calibrated and closed one after another correct each other.

    Args:
        model: a gated model; `sites` stand at λ = 0.
        batches: images `(batch, channels, height, width)`, or mappings with them under the model's input name.
        sites: which sites of the plan; all of them by default.
        reference: the model without gates, if what is fitted is to give what the sites give there, behind blocks that
            are open, and not what they give here: it then makes up for what closed sites before it have changed.

    Raises:
        PlanError: the model is not gated, or a site is not one of its plan.
        ValueError: there are no batches.
    """
    plan = plan_of(model)
    images = check_batches(batches)
    chosen = plan.sites if sites is None else sites
    other = next((site for site in chosen if site not in plan.sites), None)
    if other is not None:
        raise PlanError(f"{other} is to be calibrated, but the model is gated at {', '.join(map(str, plan.sites))}.")
    moments: dict[nn.Module, Moments] = {}

    closed_norms = [gate for site in chosen for gate in site_gates(model, site) if _is_batch_norm(gate)]
    closed_norms += end_gates(model, chosen)
    _run(model, images, {gate: _summing(moments, gate) for gate in closed_norms})
    for gate in closed_norms:
        norm = batch_norm_of(gate.closed())
        set_norm_(norm, *fit_scale(moments[gate], norm.eps))

    hooks: dict[nn.Module, Hook] = {}
    fits = [fit for site in chosen if (fit := Fit.of(model, site)) is not None]
    wanted = {} if reference is None else _outputs(reference, [fit.last_slot for fit in fits], images)
    for fit in fits:
        hooks |= fit.hooks(wanted.get(fit.last_slot))
    _run(model, images, hooks)
    for fit in fits:
        fit.write_()


def calibrated_copy(model: nn.Module, plan: Plan, batches: Iterable[Mapping[str, Any] | Tensor]) -> nn.Module:
    """Return a copy of `model` that is gated with `plan` and calibrated, its gates open: see `calibrate_`."""
    gated = copy.deepcopy(model)
    insert_gates_(gated, plan)
    calibrate_(gated, batches)
    return gated


def _is_batch_norm(gate: Gate) -> bool:
    return isinstance(gate, Blend) and isinstance(gate.pruned, nn.BatchNorm2d | ChannelBatchNorm)


def _summing(moments: dict[nn.Module, Moments], gate: Gate) -> Hook:
    is_image = isinstance(batch_norm_of(gate.closed()), nn.BatchNorm2d)

    def hook(x: Tensor, y: Tensor) -> None:
        batch = Moments.per_channel(*(t.movedim(1, -1) if is_image else t for t in (x, y)))
        moments[gate] = moments[gate] + batch if gate in moments else batch

    return hook


def _outputs(model: nn.Module, slots: Sequence[str], images: list[Any]) -> dict[str, list[Tensor]]:
    """Return what each of `slots` gives for each batch of images."""
    found: dict[str, list[Tensor]] = {slot: [] for slot in slots}

    def keep(slot: str) -> Hook:
        return lambda x, y: found[slot].append(y)

    _run(model, images, {get_slot(model, slot): keep(slot) for slot in slots})
    return found


def _run(model: nn.Module, images: list[Any], hooks: Mapping[nn.Module, Hook]) -> None:
    """Run `model` over the images with a hook on the input and output of each of some modules."""
    if not hooks:
        return

    def attach(module: nn.Module, hook: Hook) -> Any:
        def forward_hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hook(first_tensor(args, kwargs), output if isinstance(output, Tensor) else output[0])

        return module.register_forward_hook(forward_hook, with_kwargs=True)

    handles = [attach(module, hook) for module, hook in hooks.items()]
    try:
        with evaluation(model):
            for batch in images:
                model(**model_inputs(model, batch))
    finally:
        for handle in handles:
            handle.remove()
