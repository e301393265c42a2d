"""Which sites to close: every selector takes candidates and a count, and returns that many in order of execution."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.utils import logging

from updp_hf.calibration import calibrate_
from updp_hf.core.modes import evaluation
from updp_hf.core.plan import Plan, PlanError
from updp_hf.core.sites import Site
from updp_hf.inputs import check_batches, logits_of, model_inputs
from updp_hf.surgery import gate_, site_gates

__all__ = ["Selector", "damages", "last", "least_damage", "uniform"]

logger = logging.get_logger(__name__)

Selector = Callable[[Sequence[Site], int], tuple[Site, ...]]


def last(sites: Sequence[Site], count: int) -> tuple[Site, ...]:
    """Choose the last `count` sites.

    Raises:
        PlanError: there are fewer.
    """
    _refuse_too_many(sites, count)
    return tuple(sites[len(sites) - count :])


def uniform(sites: Sequence[Site], count: int) -> tuple[Site, ...]:
    """Choose `count` sites spread evenly over the depth, the last one among them.

    Raises:
        PlanError: there are fewer.
    """
    _refuse_too_many(sites, count)
    return tuple(sites[(i + 1) * len(sites) // count - 1] for i in range(count))


def least_damage(model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor]) -> Selector:
    """Return the selector that closes what hurts least.

    Each site is closed alone, at its best fit, and the divergence of the predictions from those of `model` is measured
    on `batches`. No labels are needed.
    """
    images = check_batches(batches)

    def select(sites: Sequence[Site], count: int) -> tuple[Site, ...]:
        _refuse_too_many(sites, count)
        damage = damages(model, sites, images)
        for site, value in zip(sites, damage, strict=True):
            logger.info("Closing %s alone moves the predictions by %.3g nats.", site, value)
        chosen = sorted(range(len(sites)), key=lambda i: damage[i])[:count]
        return tuple(sites[i] for i in sorted(chosen))

    return select


@torch.no_grad()
def damages(model: nn.Module, sites: Sequence[Site], batches: Iterable[Mapping[str, Any] | Tensor]) -> list[float]:
    """Return for each site the mean divergence KL(model ‖ model with that site closed) of the predictions, in nats.

    A site that can be fitted is fitted by least squares on `batches` before it is closed; another closes as it is.
    """
    images = check_batches(batches)
    gated = copy.deepcopy(model)
    gate_(gated, Plan(tuple(sites), start="fit"))
    calibrate_(gated, images)
    found = []
    with evaluation(gated):
        batches_in = [model_inputs(gated, batch) for batch in images]
        expected = [F.log_softmax(logits_of(gated, batch).float(), -1) for batch in batches_in]
        for site in sites:
            gates = site_gates(gated, site)
            for gate in gates:
                gate.set_lambda_(1.0)
            closed = [F.log_softmax(logits_of(gated, batch).float(), -1) for batch in batches_in]
            total = sum(
                F.kl_div(c, e, reduction="sum", log_target=True).item() for c, e in zip(closed, expected, strict=True)
            )
            found.append(total / sum(len(e) for e in expected))
            for gate in gates:
                gate.set_lambda_(0.0)
    return found


def _refuse_too_many(sites: Sequence[Site], count: int) -> None:
    if not 1 <= count <= len(sites):
        raise PlanError(
            f"{count} blocks are to be pruned, but the model has {len(sites)} sites: choose a number from 1 to "
            f"{len(sites)}, or another form."
            if sites
            else "The model has no site of this form, so nothing can be pruned: `find_sites` tells why, block by block."
        )
