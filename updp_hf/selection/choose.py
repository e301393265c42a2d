"""From a budget to the sites to close: what a choice has to save, and whether the merged model keeps to it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from accelerate import PartialState
from torch import nn
from transformers.utils import logging

from updp_hf.core.cost import count_macs, count_parameters, measure_latency
from updp_hf.core.gates.contexts import evaluation
from updp_hf.core.plan.budget import Budget, Demand
from updp_hf.core.plan.plan import Plan
from updp_hf.core.plan.site import Site
from updp_hf.errors import PlanError
from updp_hf.selection.scores import agreed
from updp_hf.selection.selectors import Selector
from updp_hf.surgery.calibrate import calibrated_copy
from updp_hf.surgery.gate import close_
from updp_hf.surgery.merge import merge
from updp_hf.surgery.model_io import example_inputs_of

__all__ = ["demand_of", "measure_merged", "select"]

logger = logging.get_logger(__name__)

ATTEMPTS = 4
"""How often a choice is made at most, if it is not fast enough."""
ROUNDS = 31
"""How often a merged network and the checkpoint run in turn: what is decided by it should not be noise."""
LEAST = 0.01
"""The least share of the latency that closing is taken to save, and by which more is asked for."""


def select(
    model: nn.Module,
    sites: Sequence[Site],
    demand: Demand,
    selector: Selector,
    *,
    speed_up: float | None = None,
    batch_size: int = 1,
    processes: PartialState | None = None,
) -> tuple[Site, ...]:
    """Return the sites that `selector` chooses, in order of execution.

    If a `speed_up` is asked for, the model with these sites merged is measured, and the choice is made again, asking
    for more, if it falls short.

    Args:
        model: the checkpoint; it is left as it is.
        sites: the candidates, for which `demand` and `selector` were made.
        demand: what a choice has to save.
        selector: which sites to close.
        speed_up: latency before / after that is asked for.
        batch_size: images in the forward of which the latency is measured.
        processes: with several, the main one measures.
    """
    for _ in range(ATTEMPTS):
        choice = selector(demand)
        chosen = tuple(sites[index] for index in choice)
        if speed_up is None or len(choice) == len(sites):
            break
        before, after = agreed(partial(measure_merged, model, chosen, batch_size), processes)
        logger.info("%d of %d sites closed: measured %.2f× as fast.", len(chosen), len(sites), before / after)
        if before / after >= speed_up:
            break
        # These sites save less than was expected of them: ask for as much more, and a little, lest nothing changes.
        lacking = before * (1 - 1 / speed_up) / max(before - after, before * LEAST)
        required = max(demand.required * lacking, sum(demand.savings[index] for index in choice) * (1 + LEAST))
        demand = replace(demand, required=min(required, sum(demand.savings)))
    else:
        logger.warning(f"A speed-up of {speed_up:g}× was asked for, and {before / after:.2f}× was measured at last.")
    return chosen


def demand_of(
    model: nn.Module,
    sites: Sequence[Site],
    budget: Budget,
    *,
    end_activation: str | None = None,
    batch_size: int = 1,
) -> tuple[tuple[Site, ...], Demand]:
    """Return those of `sites` that save what `budget` counts, and what a choice of them has to save.

    Each is taken to save as much whatever else is closed, which is exact but for latency. There the model with all of
    them merged is measured, and what that saves is shared out by their own latencies where those were measured, else
    by their MACs.

    Raises:
        PlanError: even all of them together save too little.
    """
    if budget.num_blocks is not None:
        savings, required = [1.0 for _ in sites], float(budget.num_blocks)
        possible = f"the model has {len(sites)} sites"
    elif budget.speed_up is not None:
        before, after = measure_merged(model, sites, batch_size)
        shares = [s.saving.compute for s in sites]
        savings = [max(before - after, 0.0) * share / sum(shares) for share in shares]
        required = before * (1 - 1 / budget.speed_up)
        best = math.floor(100 * before / after) / 100  # rounded so that it can be asked for, as below
        possible = f"closing all {len(sites)} sites makes the model {best:.2f}× as fast"
    else:
        if budget.macs is not None:
            savings, total = [float(s.saving.macs) for s in sites], count_macs(model, example_inputs_of(model))
        else:
            ends = 0 if end_activation is None else 2  # weight and bias of the BatchNorm that is put behind a block
            savings = [float(s.saving.parameters - ends * s.channels) for s in sites]
            total = count_parameters(model)
        required = total * (1 - (budget.macs or budget.parameters or 0.0))
        useful = [saving for saving in savings if saving > 0]
        left = math.ceil(1000 * (1 - sum(useful) / total)) / 1000
        possible = f"closing all {len(useful)} sites that save any leaves {left:.1%}"
    kept = [index for index, saving in enumerate(savings) if saving > 0]
    demand = Demand(tuple(savings[index] for index in kept), required)
    if not demand.is_met(range(len(kept))):
        raise PlanError(f"The budget is {budget}, but {possible}: ask for no more than that, or choose another form.")
    return tuple(sites[index] for index in kept), demand


def measure_merged(model: nn.Module, sites: Sequence[Site], batch_size: int = 1) -> tuple[float, float]:
    """Return the latency of `model` and that of a copy with `sites` merged, the two in turn: medians in seconds.

    The copy is not trained, and it computes something else than a trained one in the same time.
    """
    # Not calibrated, the values might grow from block to block.
    pruned = calibrated_copy(model, Plan(tuple(sites)), [example_inputs_of(model, 2)])
    close_(pruned)
    models = {"before": model, "after": merge(pruned, tolerance=math.inf)}
    with evaluation(models["before"]), evaluation(models["after"]):
        medians = measure_latency(models, [example_inputs_of(model, batch_size)], rounds=ROUNDS)
    return medians["before"][0], medians["after"][0]
