"""Pruning without training: for people who have a checkpoint and some images."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from updp_hf.calibration import calibrate_, recalibrate_batch_norms_
from updp_hf.core.plan import Plan
from updp_hf.core.sites import Form
from updp_hf.inputs import base_model_of, check_batches
from updp_hf.merging import merge
from updp_hf.selection import Selector, least_damage
from updp_hf.surgery import gate_, require_sites, site_gates

__all__ = ["prune"]

logger = logging.get_logger(__name__)


def prune(
    model: nn.Module,
    calibration_batches: Iterable[Mapping[str, Any] | Tensor],
    num_blocks: int,
    *,
    form: Form | str = Form.MERGE_KEEP_NORM,
    selector: Selector | None = None,
) -> nn.Module:
    """Return a merged copy of `model` with `num_blocks` runs replaced by what fits them best. Nothing is trained.

    The sites are fitted and closed in order of execution, so that each one corrects for those before it. Then all
    BatchNorms that are left take their statistics from the images. The idea is ours; UPDP trains.

    Args:
        model: the checkpoint; it is left as it is.
        calibration_batches: some hundred images of the task, preprocessed, without labels: tensors of shape
            `(batch, channels, height, width)` or mappings that hold them under the model's input name.
        num_blocks: how many sites to close.
        form: what closing leaves behind. `branch-fit` closes gated FFNs, too.
        selector: which sites to close; by default those that do least damage when closed alone.

    Raises:
        PlanError: the model has fewer sites than `num_blocks`.
        ValueError: there are no calibration batches.

    Example:
        >>> merged = prune(model, [processor(images, return_tensors="pt")], num_blocks=4)
        >>> merged.save_pretrained("vit-p4")
    """
    images = check_batches(calibration_batches)
    sites = require_sites(model, form)
    chosen = (selector or least_damage(model, images))(sites, num_blocks)
    gated = copy.deepcopy(model)
    gate_(gated, Plan(chosen, start="fit", base_model=base_model_of(model)))
    for site in chosen:
        calibrate_(gated, images, [site])
        for gate in site_gates(gated, site):
            gate.set_lambda_(1.0)
        logger.info("Closed %s.", site)
    merged = merge(gated)
    recalibrate_batch_norms_(merged, images)
    return merged
