"""Weights for the pruned sides of the gates, from some images: no labels, no gradients."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from updp_hf.core.fit import Moments, fit_linear, fit_scale
from updp_hf.core.gate import Gate
from updp_hf.core.modes import evaluation
from updp_hf.core.plan import Plan
from updp_hf.core.sites import Form, Site
from updp_hf.inputs import check_batches, model_inputs
from updp_hf.layout_updp import ChannelBatchNorm, EndActivation, first_tensor, get_slot
from updp_hf.surgery import plan_of

__all__ = ["calibrate_"]

Hook = Callable[[Tensor, Tensor], None]


@torch.no_grad()
def calibrate_(model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor], sites: Sequence[Site] = ()) -> None:
    """Give the pruned sides of a gated `model` the weights that bring them nearest to what the open gates compute.

    Each BatchNorm takes its statistics from the input of the norm that it replaces, and the scale and shift that bring
    it nearest to that norm's output, so that the blend starts smoothly. Each fitted Linear is the ridge regression of
    its branch. Sites that are closed already are passed closed, so that sites calibrated and closed one after another
    correct each other.

    Args:
        model: a gated model; `sites` stand at λ = 0.
        batches: images `(batch, channels, height, width)`, or mappings with them under the model's input name.
        sites: which sites of the plan; all of them by default.

    Raises:
        PlanError: the model is not gated.
        ValueError: there are no batches.
    """
    plan = plan_of(model)
    images = check_batches(batches)
    chosen = sites or plan.sites
    moments: dict[nn.Module, Moments] = {}

    closed_norms: list[Gate] = [gate for site in chosen for gate in _norm_gates(model, plan, site)]
    closed_norms += _end_gates(model, plan, chosen)
    _run(model, images, {gate: _summing(moments, gate, Moments.per_channel) for gate in closed_norms})
    for gate in closed_norms:
        _set_norm_(_batch_norm_of(gate), moments[gate])

    hooks: dict[nn.Module, Hook] = {}
    fitted: list[Gate] = []
    for site in chosen:
        branch = _fit_gate(model, plan, site)
        if branch is not None:
            leading = _norm_gates(model, plan, site) if site.run[0] in site.norms else []
            hooks |= _regression_hooks(moments, branch, next(iter(leading), None))
            fitted.append(branch)
    _run(model, images, hooks)
    for gate in fitted:
        assert isinstance(gate.pruned, nn.Linear)
        weight, bias = fit_linear(moments[gate])
        gate.pruned.weight.copy_(weight)
        gate.pruned.bias.copy_(bias)


def _norm_gates(model: nn.Module, plan: Plan, site: Site) -> list[Gate]:
    slots = [slot for slot in plan.gate_slots(site) if slot in site.norms]
    return [gate for slot in slots if isinstance(gate := get_slot(model, slot), Gate)]


def _end_gates(model: nn.Module, plan: Plan, sites: Sequence[Site]) -> list[Gate]:
    if plan.end_activation is None:
        return []
    wrappers = [get_slot(model, block) for block in dict.fromkeys(site.block for site in sites)]
    return [w.end for w in wrappers if isinstance(w, EndActivation) and isinstance(w.end, Gate)]


def _batch_norm_of(gate: Gate) -> nn.BatchNorm1d:
    norm = gate.pruned[0] if isinstance(gate.pruned, nn.Sequential) else gate.pruned
    assert isinstance(norm, ChannelBatchNorm)
    return norm.norm


def _fit_gate(model: nn.Module, plan: Plan, site: Site) -> Gate | None:
    """Return the gate whose pruned side is fitted, None if the site's form leaves nothing to fit."""
    if site.form in (Form.ATTENTION_DROP, Form.BLOCK_DROP) or site.container not in plan.gate_slots(site):
        return None
    gate = get_slot(model, site.container or "")
    return gate if isinstance(gate, Gate) else None


def _summing(moments: dict[nn.Module, Moments], key: nn.Module, of: Callable[[Tensor, Tensor], Moments]) -> Hook:
    def hook(x: Tensor, y: Tensor) -> None:
        batch = of(x, y)
        moments[key] = moments[key] + batch if key in moments else batch

    return hook


def _regression_hooks(moments: dict[nn.Module, Moments], gate: Gate, norm: Gate | None) -> dict[nn.Module, Hook]:
    """Regress the output of `gate` on its input, which is the closed norm's output where a norm closes in front."""
    add = _summing(moments, gate, Moments.joint)
    if norm is None:
        return {gate: add}
    seen: list[Tensor] = []
    return {norm: lambda x, y: seen.append(norm.pruned(x)), gate: lambda x, y: add(seen.pop(), y)}


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


def _set_norm_(norm: nn.BatchNorm1d, moments: Moments) -> None:
    mean, variance, weight, bias = fit_scale(moments, norm.eps)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    for tensor, value in zip(
        (norm.running_mean, norm.running_var, norm.weight, norm.bias), (mean, variance, weight, bias), strict=True
    ):
        tensor.copy_(value)
