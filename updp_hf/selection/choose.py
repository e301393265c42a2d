"""From a budget to a plan: the candidates of a model, what a choice has to save, and the selector's choice."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from accelerate import PartialState
from torch import Tensor, nn
from transformers.utils import logging

from updp_hf.core.cost import LatencyTable
from updp_hf.core.graph.structure import Structure
from updp_hf.core.kinds import DEFAULT_FORM
from updp_hf.core.plan.budget import Budget, Demand
from updp_hf.core.plan.plan import Plan
from updp_hf.core.plan.site import Site, Start
from updp_hf.errors import UPDPError
from updp_hf.processes import on_main_process
from updp_hf.selection.demand import Measure, demand_of, measure_merged
from updp_hf.selection.selectors import Selector, fittest, selector_by_name
from updp_hf.selection.supernet import SUPERNET, SupernetTraining
from updp_hf.surgery.find import find_sites, read, require_sites
from updp_hf.surgery.model_io import base_model_of, check_batches

__all__ = ["Candidates", "Selection", "candidates_of", "choose", "select"]

logger = logging.get_logger(__name__)

ATTEMPTS = 4
"""How often a choice is made at most, if it is not fast enough."""
LEAST = 0.01
"""The least share of the latency that closing is taken to save, and by which more is asked for."""


@dataclass(frozen=True)
class Candidates:
    """The sites of a model that can be chosen, in order of execution."""

    sites: tuple[Site, ...]
    reasons: Mapping[str, str]
    """By block, why it has no candidate."""
    macs: int
    """Multiply-accumulates of the model."""
    latencies: LatencyTable | None
    """What was measured of the modules, if sites are to save latency and not MACs."""


@dataclass(frozen=True)
class Selection:
    """What was chosen, and how."""

    plan: Plan
    selector: str
    budget: Budget
    candidates: tuple[Site, ...]
    """The sites among which was chosen."""
    reasons: Mapping[str, str]
    """By block, why it has no candidate."""
    seconds: float
    speed_up: float | None = None
    """Latency before / after with the choice merged, where the budget asks for a speed-up."""
    latencies: LatencyTable | None = None
    supernet: nn.Module | None = None
    """The supernet, where one was trained."""


def choose(
    model: nn.Module,
    budget: Budget,
    images: Iterable[Mapping[str, Any] | Tensor],
    *,
    form: str = DEFAULT_FORM,
    cost: Literal["macs", "latency"] = "macs",
    selector: str = "greedy",
    supernet: SupernetTraining | None = None,
    start: Start = "fit",
    end_activation: str | None = None,
    batch_size: int = 1,
    seed: int = 0,
    structure: Structure | None = None,
    processes: PartialState | None = None,
    **settings: Any,
) -> Selection:
    """Choose which sites of `model` to close, so that it keeps to the budget. The model is left as it is.

    Args:
        model: the checkpoint.
        budget: how much to prune.
        images: batches to fit to and to score by.
        form: what closing leaves of a block.
        cost: what a candidate has to save.
        selector: one of `SELECTORS`, or `supernet`.
        supernet: how a supernet is trained, for the selector of that name.
        start: that of the plan, see `Plan`.
        end_activation: that of the plan, see `Plan`.
        batch_size: images in the forward of which latency is measured.
        seed: of what is drawn.
        structure: what `read` returned for the model, if that was called before.
        processes: those that share the work; all get the main one's plan.
        **settings: those of `search` in a supernet.

    Raises:
        PlanError: the model has no sites, or the budget cannot be met.
        ValueError: there are no images, or no such selector.
    """
    begin = time.perf_counter()
    images = check_batches(images)
    if budget.speed_up is not None:
        cost = "latency"
    options: dict[str, Any] = {"batch_size": batch_size, "processes": processes}
    found = candidates_of(model, form, cost, structure=structure, **options)
    required = partial(demand_of, end_activation=end_activation, batch_size=batch_size, macs=found.macs)
    sites, demand = on_main_process(lambda: required(model, found.sites, budget), processes)
    trained = None
    if selector == SUPERNET:
        if supernet is None:
            raise UPDPError("The selector is 'supernet', but how one is trained was not given: pass `supernet`.")
        trained = supernet.run(Plan(sites, start, end_activation), images, processes)
        selects = fittest(trained.fitness, **{"seed": seed, **settings})
    else:
        selects = selector_by_name(selector, model, sites, images, seed=seed, processes=processes)
    chosen, speed_up = select(model, sites, demand, selects, speed_up=budget.speed_up, **options)
    plan = Plan(chosen, start, end_activation, base_model=base_model_of(model))
    return Selection(
        plan=on_main_process(lambda: plan, processes),
        selector=selector,
        budget=budget,
        candidates=sites,
        reasons=found.reasons,
        seconds=time.perf_counter() - begin,
        speed_up=speed_up,
        latencies=found.latencies,
        supernet=None if trained is None else trained.network,
    )


def candidates_of(
    model: nn.Module,
    form: str,
    cost: Literal["macs", "latency"] = "macs",
    *,
    batch_size: int = 1,
    structure: Structure | None = None,
    processes: PartialState | None = None,
) -> Candidates:
    """Return the sites of `model` of one form that make it cheaper, those that the main process finds.

    Raises:
        PlanError: there are none.
    """

    def find() -> Candidates:
        latencies = LatencyTable(batch_size) if cost == "latency" else None
        known = read(model) if structure is None else structure
        sites = require_sites(model, form, latencies=latencies, structure=known)
        found = find_sites(model, [form], latencies=latencies, structure=known)
        reasons = {none.block: none.reason for none in found.unsupported}
        reasons |= {site.block: f"{site} would save no {cost}" for site in found.sites if not site.saves_compute}
        for site in sites:
            reasons.pop(site.block, None)
        return Candidates(sites, reasons, known.macs[""], latencies)

    return on_main_process(find, processes)


def select(
    model: nn.Module,
    sites: Sequence[Site],
    demand: Demand,
    selector: Selector,
    *,
    speed_up: float | None = None,
    batch_size: int = 1,
    processes: PartialState | None = None,
    measure: Measure = measure_merged,
) -> tuple[tuple[Site, ...], float | None]:
    """Return the sites that `selector` chooses, in order of execution, and the speed-up measured, if one is asked for.

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
        measure: what measures.
    """
    measured = None
    for _ in range(ATTEMPTS):
        choice = selector(demand)
        chosen = tuple(sites[index] for index in choice)
        if speed_up is None or len(choice) == len(sites):
            measured = None
            break
        before, after = on_main_process(partial(measure, model, chosen, batch_size), processes)
        logger.info("%d of %d sites closed: measured %.2f× as fast.", len(chosen), len(sites), before / after)
        measured = before / after
        if measured >= speed_up:
            break
        # These sites save less than was expected of them: ask for as much more, and a little, lest nothing changes.
        lacking = before * (1 - 1 / speed_up) / max(before - after, before * LEAST)
        required = max(demand.required * lacking, sum(demand.savings[index] for index in choice) * (1 + LEAST))
        demand = replace(demand, required=min(required, sum(demand.savings)))
    else:
        logger.warning(f"A speed-up of {speed_up:g}× was asked for, and {measured:.2f}× was measured at last.")
    return chosen, measured
