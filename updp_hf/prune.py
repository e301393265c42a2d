"""Pruning without training: for people who have a checkpoint and some images."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from updp_hf.core.graph.structure import Structure
from updp_hf.core.kinds import DEFAULT_FORM
from updp_hf.core.plan.budget import Budget
from updp_hf.core.plan.site import Site
from updp_hf.selection.choose import choose
from updp_hf.selection.scores import divergence, log_probabilities
from updp_hf.surgery.calibrate import calibrate_
from updp_hf.surgery.corrections import correct_head_, recalibrate_batch_norms_
from updp_hf.surgery.gate import insert_gates_, site_gates
from updp_hf.surgery.merge import merge
from updp_hf.surgery.model_io import check_batches, model_inputs

__all__ = ["prune"]

logger = logging.get_logger(__name__)

HELD_OUT = 0.25
"""Share of the images that are not fitted to: they tell whether a correction helps."""


def prune(
    model: nn.Module,
    calibration_batches: Iterable[Mapping[str, Any] | Tensor],
    budget: Budget,
    *,
    form: str = DEFAULT_FORM,
    selector: str = "greedy",
    batch_size: int = 1,
    seed: int = 0,
    structure: Structure | None = None,
) -> nn.Module:
    """Return a merged copy of `model` with some runs replaced by what fits them best. Nothing is trained.

    The sites are fitted and closed in order of execution, each to what it does behind those before it. Then some
    corrections in closed form are tried, and kept if they bring the predictions on held-out images nearer to those of
    `model`: a second fit, to what the open network did; the statistics of the BatchNorms that are left; the last
    Linear. The idea is ours; UPDP trains.

    Args:
        model: the checkpoint; it is left as it is.
        calibration_batches: some hundred images of the task, preprocessed: tensors of shape `(batch, channels, height,
            width)` or mappings that hold them under the model's input name. `labels` in these are of use to the
            selector `taylor` only.
        budget: how much to prune.
        form: what closing leaves behind. `branch-fit` closes gated FFNs, too.
        selector: which sites to close, one of `sensitivity`, `greedy`, `taylor`, `uniform`, `last` and `random`.
        batch_size: images in the forward of which a speed-up is measured.
        seed: of the selector `random`.
        structure: what `read` returned for the model, if that was called before.

    Raises:
        PlanError: the model has no sites, or the budget cannot be met.
        ValueError: there are no calibration batches, or no such selector.

    Example:
        >>> merged = prune(model, [processor(images, return_tensors="pt")], Budget(num_blocks=4))
        >>> merged.save_pretrained("vit-p4")
    """
    batches = check_batches(calibration_batches)
    options: dict[str, Any] = {"form": form, "selector": selector, "batch_size": batch_size, "seed": seed}
    plan = choose(model, budget, batches, structure=structure, **options).plan
    fitted, held_out = _split(model, batches)
    gated = copy.deepcopy(model)
    insert_gates_(gated, plan)
    for site in plan.sites:
        _fit_(gated, site, fitted)
        logger.info("Closed %s.", site)
    expected = log_probabilities(model, held_out)

    def if_nearer(pruned: nn.Module, correct_: Callable[[nn.Module], None], name: str) -> nn.Module:
        """Return a copy of `pruned` that has been corrected, or `pruned` itself if that predicts more as `model`."""
        tried = copy.deepcopy(pruned)
        correct_(tried)
        before, after = (divergence(log_probabilities(other, held_out), expected) for other in (pruned, tried))
        logger.info("%s: %.3g nats away from the checkpoint, %.3g before.", name, after, before)
        return tried if after < before else pruned

    gated = if_nearer(gated, lambda tried: _refit_(tried, plan.sites, fitted, model), "Second fit")
    merged = merge(gated)
    merged = if_nearer(merged, lambda tried: recalibrate_batch_norms_(tried, fitted), "BatchNorms")
    return if_nearer(merged, lambda tried: correct_head_(tried, fitted, model), "Head")


def _fit_(gated: nn.Module, site: Site, images: list[Any], reference: nn.Module | None = None) -> None:
    """Fit one site behind all others as they are, and close it."""
    gates = site_gates(gated, site)
    for gate in gates:
        gate.set_lambda_(0.0)
    calibrate_(gated, images, [site], reference=reference)
    for gate in gates:
        gate.set_lambda_(1.0)


def _refit_(gated: nn.Module, sites: Iterable[Site], images: list[Any], reference: nn.Module) -> None:
    for site in sites:
        _fit_(gated, site, images, reference)


def _split(model: nn.Module, batches: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return the images to fit to and those held out, of each batch the last; the same ones if there are too few."""
    images = [next(iter(model_inputs(model, batch).values())) for batch in batches]
    kept = [len(batch) - round(HELD_OUT * len(batch)) for batch in images]
    held_out = [batch[count:] for batch, count in zip(images, kept, strict=True) if count < len(batch)]
    if not held_out:
        return images, images
    return [batch[:count] for batch, count in zip(images, kept, strict=True)], held_out
