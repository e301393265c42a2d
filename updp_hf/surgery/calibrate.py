"""Weights for the pruned sides of the gates, from some images: no labels, no gradients."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from updp_hf.core.algebra.least_squares import Moments, fit_linear, fit_scale, statistics_of_fit
from updp_hf.core.gates.contexts import evaluation
from updp_hf.core.gates.gate import Blend, Gate, Landing, Shortcut
from updp_hf.core.plan.plan import Plan
from updp_hf.core.plan.site import Site
from updp_hf.errors import PlanError
from updp_hf.model.layout_updp import ChannelBatchNorm, first_tensor, get_slot
from updp_hf.surgery.find import end_gates, gate_, plan_of, site_gates
from updp_hf.surgery.model_io import check_batches, logits_of, model_inputs

__all__ = ["calibrate_", "calibrated_copy", "correct_head_", "recalibrate_batch_norms_"]

Hook = Callable[[Tensor, Tensor], None]

HEAD_RIDGE = 1e-2
"""Of the change to the last Linear: there is one sample an image, few for so many weights."""
IMAGES, PATCHES = 16, 2**14
"""A convolution is fitted to so many patches of so many images at a time: neighbouring patches are much alike."""


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
        norm = _batch_norm_of(gate.closed())
        _set_norm_(norm, *fit_scale(moments[gate], norm.eps))

    hooks: dict[nn.Module, Hook] = {}
    fits = [fit for site in chosen if (fit := _Fit.of(model, site)) is not None]
    wanted = {} if reference is None else _outputs(reference, [fit.last_slot for fit in fits], images)
    for fit in fits:
        hooks |= fit.hooks(wanted.get(fit.last_slot))
    _run(model, images, hooks)
    for fit in fits:
        fit.write_()


def calibrated_copy(model: nn.Module, plan: Plan, batches: Iterable[Mapping[str, Any] | Tensor]) -> nn.Module:
    """Return a copy of `model` that is gated with `plan` and calibrated, its gates open: see `calibrate_`."""
    gated = copy.deepcopy(model)
    gate_(gated, plan)
    calibrate_(gated, batches)
    return gated


@torch.no_grad()
def recalibrate_batch_norms_(model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor]) -> None:
    """Replace the running statistics of every BatchNorm in `model` by what it sees on `batches`, all weighted alike.

    After some blocks have been replaced, those behind them see other inputs than the checkpoint's statistics describe.
    Batches of a single image are left out, for of one nothing is known of the variance.

    Raises:
        ValueError: there are no batches.
    """
    inputs = [model_inputs(model, batch) for batch in check_batches(batches)]
    images = [batch for batch in inputs if len(next(iter(batch.values()))) > 1]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = {norm: (norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms}
    with evaluation(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
            norm.training = True  # it alone, not what may lie in it
        try:
            for batch in images if norms else ():
                model(**batch)
        finally:
            for norm, (momentum, state) in before.items():
                norm.momentum = momentum
                if not norm.num_batches_tracked:  # it saw nothing
                    norm.load_state_dict(state)


@torch.no_grad()
def correct_head_(model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor], reference: nn.Module) -> None:
    """Change the last Linear of `model` so that its logits come nearest to those of `reference`.

    The change is the ridge regression of what is lacking on the input of the Linear. A model whose logits are not what
    a Linear returns is left as it is.

    Raises:
        ValueError: there are no batches.
    """
    seen: dict[nn.Linear, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        seen[module] = (args[0], output)

    moments: dict[nn.Linear, Moments] = {}
    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with evaluation(model), evaluation(reference):
            for batch in check_batches(batches):
                logits = logits_of(model, model_inputs(model, batch))
                lacking = logits_of(reference, model_inputs(reference, batch)).to(logits.device) - logits
                for head, (x, y) in seen.items():
                    if y is logits:
                        found = Moments.joint(x, lacking)
                        moments[head] = moments[head] + found if head in moments else found
                seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    for head, sums in moments.items():
        weight, bias = fit_linear(sums, HEAD_RIDGE)
        head.weight.add_(weight.to(head.weight.dtype))
        if head.bias is not None:
            head.bias.add_(bias.to(head.bias.dtype))


class _Fit(NamedTuple):
    """One Linear or convolution to be fitted: what it reads, what it is to give, and the sums over both."""

    target: nn.Linear | nn.Conv2d
    norm: nn.BatchNorm1d | nn.BatchNorm2d | None  # behind the target
    leading: list[nn.Module]  # the closed modules that the input of the run passes before the target reads it
    first: nn.Module  # its input is that of the run
    last: Gate  # its output is what the target is to give
    last_slot: str
    moments: list[Moments]  # one for each group of the target

    @classmethod
    def of(cls, model: nn.Module, site: Site) -> "_Fit | None":
        """Return what is to be fitted for `site`, None if its gates leave nothing to fit."""
        found = site_gates(model, site)
        entry = next((gate for gate in found if isinstance(gate, Shortcut)), found[-1])
        target = getattr(entry, "pruned", None)
        if not isinstance(target, nn.Linear | nn.Conv2d):
            return None
        slots = [get_slot(model, slot) for slot in site.run]
        before = slots[: slots.index(entry)]
        leading = [module.closed() if isinstance(module, Gate) else module for module in before]
        norm = _batch_norm_of(found[-1].closed()) if isinstance(found[-1], Landing) else None
        last = site.run[slots.index(found[-1])]
        return cls(target, norm, leading, before[0] if before else entry, found[-1], last, [])

    def hooks(self, wanted: Sequence[Tensor] | None = None) -> dict[nn.Module, Hook]:
        """Return the hooks that sum what `write_` needs; `wanted`, of each batch, stands for what `last` gives."""
        seen: list[Tensor] = []
        others = None if wanted is None else iter(wanted)

        def read(x: Tensor, y: Tensor) -> None:
            x = self.leading[0](x) if isinstance(self.first, Gate) else y
            for module in self.leading[1:]:
                x = module(x)
            seen.append(x)

        def add(x: Tensor, y: Tensor) -> None:
            self._sum(seen.pop() if seen else x, y if others is None else next(others))

        if self.first is self.last:
            return {self.first: add}
        if not self.leading:
            return {self.first: lambda x, y: seen.append(x), self.last: add}
        return {self.first: read, self.last: add}

    def _sum(self, x: Tensor, y: Tensor) -> None:
        if isinstance(self.target, nn.Linear):
            found = [Moments.joint(x, y)]
        else:
            chunks = zip(x.split(IMAGES), y.split(IMAGES), strict=True)
            parts = [_moments_of_patches(self.target, *chunk) for chunk in chunks]
            found = [sum(group[1:], group[0]) for group in zip(*parts, strict=True)]
        self.moments[:] = [a + b for a, b in zip(self.moments, found, strict=True)] if self.moments else found

    def write_(self) -> None:
        """Give the target the weights of least squares."""
        fitted = [fit_linear(moments) for moments in self.moments]
        weights, biases = zip(*fitted, strict=True)
        self.target.weight.copy_(torch.cat(weights).view_as(self.target.weight))
        assert self.target.bias is not None
        self.target.bias.copy_(torch.cat(biases))
        if self.norm is not None:
            groups = [statistics_of_fit(moments, *fit) for moments, fit in zip(self.moments, fitted, strict=True)]
            mean, variance = map(torch.cat, zip(*groups, strict=True))
            _set_norm_(self.norm, mean, variance, torch.sqrt(variance + self.norm.eps), mean)


def _moments_of_patches(conv: nn.Conv2d, x: Tensor, y: Tensor) -> list[Moments]:
    """Sum over the patches of `x` that `conv` sees and the pixels of `y` that it is to give, for each of its groups."""
    assert isinstance(conv.padding, tuple)
    patches = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT  # (batch, pixels, in * kernel)
    step = max(1, patches.shape[0] * patches.shape[1] // PATCHES)
    while math.gcd(step, y.shape[-1]) > 1:  # else some columns would never be sampled
        step += 1
    patches = patches.flatten(0, 1)[::step]
    wanted = y.flatten(2).mT.flatten(0, 1)[::step]
    groups = zip(patches.chunk(conv.groups, 1), wanted.chunk(conv.groups, 1), strict=True)
    return [Moments.joint(*group) for group in groups]


def _is_batch_norm(gate: Gate) -> bool:
    return isinstance(gate, Blend) and isinstance(gate.pruned, nn.BatchNorm2d | ChannelBatchNorm)


def _batch_norm_of(closed: nn.Module) -> nn.BatchNorm1d | nn.BatchNorm2d:
    norm = closed[0] if isinstance(closed, nn.Sequential) else closed
    assert isinstance(norm, nn.BatchNorm2d | ChannelBatchNorm)
    return norm.norm if isinstance(norm, ChannelBatchNorm) else norm


def _summing(moments: dict[nn.Module, Moments], gate: Gate) -> Hook:
    is_image = isinstance(_batch_norm_of(gate.closed()), nn.BatchNorm2d)

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


def _set_norm_(
    norm: nn.BatchNorm1d | nn.BatchNorm2d, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor
) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(weight)
    norm.bias.copy_(bias)
