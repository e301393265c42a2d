"""What a choice of sites has to save to keep to a budget, and how fast a model with a choice merged is."""

import math
from collections.abc import Callable, Sequence

from torch import nn

from updp_hf.core.cost import count_macs, count_parameters, measure_latency
from updp_hf.core.gates.contexts import evaluation
from updp_hf.core.plan.budget import Budget, Demand
from updp_hf.core.plan.plan import Plan
from updp_hf.core.plan.site import Site
from updp_hf.errors import PlanError
from updp_hf.surgery.calibrate import calibrated_copy
from updp_hf.surgery.gate import close_
from updp_hf.surgery.merge import merge
from updp_hf.surgery.model_io import example_inputs_of

__all__ = ["Measure", "demand_of", "measure_merged"]

Measure = Callable[[nn.Module, Sequence[Site], int], tuple[float, float]]
"""From a model, some of its sites and a batch size to the latency of the model and of the one with them merged."""

ROUNDS = 31
"""How often a merged network and the checkpoint run in turn: what is decided by it should not be noise."""


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


def demand_of(
    model: nn.Module,
    sites: Sequence[Site],
    budget: Budget,
    *,
    end_activation: str | None = None,
    batch_size: int = 1,
    macs: int | None = None,
    measure: Measure = measure_merged,
) -> tuple[tuple[Site, ...], Demand]:
    """Return those of `sites` that save what `budget` counts, and what a choice of them has to save.

    Each is taken to save as much whatever else is closed, which is exact but for latency. There the model with all of
    them merged is measured, and what that saves is shared out by their own latencies where those were measured, else
    by their MACs.

    Args:
        model: the checkpoint.
        sites: the candidates.
        budget: how much is to be saved.
        end_activation: that of the plan, whose parameters count.
        batch_size: images in the forward of which latency is measured.
        macs: those of the model, if they have been counted.
        measure: what measures latency.

    Raises:
        PlanError: even all of them together save too little.
    """
    if budget.num_blocks is not None:
        savings, required = [1.0 for _ in sites], float(budget.num_blocks)
        possible = f"the model has {len(sites)} sites"
    elif budget.speed_up is not None:
        before, after = measure(model, sites, batch_size)
        shares = [s.saving.compute for s in sites]
        savings = [max(before - after, 0.0) * share / sum(shares) for share in shares]
        required = before * (1 - 1 / budget.speed_up)
        best = math.floor(100 * before / after) / 100  # rounded so that it can be asked for, as below
        possible = f"closing all {len(sites)} sites makes the model {best:.2f}× as fast"
    else:
        if budget.macs is not None:
            savings, total = [float(s.saving.macs) for s in sites], macs or count_macs(model, example_inputs_of(model))
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
