"""Which sites to close: a selector is made for some candidates, and takes what a choice of them has to save."""

import copy
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from accelerate import PartialState
from torch import Tensor, nn
from transformers.utils import logging

from updp_hf.core.gates.contexts import evaluation
from updp_hf.core.plan.budget import Choice, Demand
from updp_hf.core.plan.plan import Plan
from updp_hf.core.plan.site import Site
from updp_hf.core.search import Fitness, search
from updp_hf.errors import UPDPError
from updp_hf.model.layout_updp import get_slot
from updp_hf.selection.scores import closeness, spread
from updp_hf.surgery.calibrate import calibrate_, calibrated_copy
from updp_hf.surgery.gate import close_only_, insert_gates_
from updp_hf.surgery.model_io import check_batches, logits_of, model_inputs

__all__ = [
    "SELECTORS",
    "Selector",
    "fittest",
    "greedy",
    "last",
    "least",
    "selector_by_name",
    "sensitivities",
    "shuffled",
    "taylor_importances",
    "uniform",
]

logger = logging.get_logger(__name__)

Selector = Callable[[Demand], Choice]

SELECTORS = ("sensitivity", "greedy", "taylor", "uniform", "last", "random")
"""Those that need no training, by name."""


def selector_by_name(
    name: str,
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    seed: int = 0,
    processes: PartialState | None = None,
) -> Selector:
    """Return the selector `name` of `SELECTORS` for the candidates `sites` of `model`.

    Raises:
        ValueError: there is no such selector, or there are no batches.
    """
    images = check_batches(batches)
    makers: dict[str, Callable[[], Selector]] = {
        "sensitivity": lambda: least(sensitivities(model, sites, images, processes=processes)),
        "greedy": lambda: greedy(model, sites, images, processes=processes),
        "taylor": lambda: least(taylor_importances(model, sites, images)),
        "uniform": lambda: uniform,
        "last": lambda: last,
        "random": lambda: shuffled(seed),
    }
    if name not in makers:
        raise UPDPError(f"The selector is {name!r}, expected one of {list(SELECTORS)}.")
    return makers[name]()


def last(demand: Demand) -> Choice:
    """Choose the last sites."""
    return demand.take(reversed(range(len(demand.savings))))


def uniform(demand: Demand) -> Choice:
    """Choose as few sites as are needed if they are spread evenly over the depth, the last one among them."""
    total = len(demand.savings)
    spreads = (tuple((i + 1) * total // count - 1 for i in range(count)) for count in range(1, total + 1))
    return next((choice for choice in spreads if demand.is_met(choice)), None) or demand.take(range(total))


def shuffled(seed: int) -> Selector:
    """Return the selector that draws sites at random: what every other one has to beat."""
    return lambda demand: demand.draw(random.Random(seed))


def least(harms: Sequence[float]) -> Selector:
    """Return the selector of the sites that do least harm for what they save."""
    return lambda demand: demand.take(sorted(range(len(harms)), key=lambda i: (harms[i] / demand.savings[i], i)))


def fittest(fitness: Fitness, **settings: Any) -> Selector:
    """Return the selector that searches for the choice of the highest fitness; `settings` are those of `search`."""
    return lambda demand: search(fitness, demand, **settings)


def taylor_importances(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Mapping[str, Any] | Tensor]
) -> list[float]:
    """Return for each site the sum of |gradient · weight| over its parameters, of the mean loss on `batches`.

    The first-order estimate of what removing a weight does to the loss (Molchanov et al., arXiv 1906.10771). Where a
    batch has no `labels`, the model's own predictions are taken for them.
    """
    images = check_batches(batches)
    network = copy.deepcopy(model).requires_grad_(True)
    count = 0
    with evaluation(network):
        for batch in images:
            logits = logits_of(network, model_inputs(network, batch)).float()
            labels = batch.get("labels") if isinstance(batch, Mapping) else None
            labels = logits.argmax(-1) if labels is None else labels.to(logits.device)
            F.cross_entropy(logits, labels, reduction="sum").backward()
            count += len(logits)
    found = []
    for site in sites:
        parameters = dict.fromkeys(p for slot in site.slots for p in get_slot(network, slot).parameters())
        products = [(p.detach() * p.grad).abs().sum() for p in parameters if p.grad is not None]
        found.append(float(sum(products, torch.zeros(()))) / count)
    return found


def sensitivities(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    start: Literal["inherit", "fit"] = "fit",
    processes: PartialState | None = None,
) -> list[float]:
    """Return for each site the mean divergence KL(model ‖ model with that site closed) of the predictions, in nats.

    Sites are closed as calibration leaves them: with `fit`, what can be fitted is fitted by least squares first. With
    `inherit`, networks with BatchNorms are judged by statistics that do not hold behind a closed site.
    """
    images = check_batches(batches)
    gated = calibrated_copy(model, Plan(tuple(sites), start=start), images)
    fitness = spread(closeness(gated, images), processes)
    harms = [-score for score in fitness([(index,) for index in range(len(sites))])]
    for site, harm in zip(sites, harms, strict=True):
        logger.info("Closing %s alone moves the predictions by %.3g nats.", site, harm)
    return harms


def greedy(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    processes: PartialState | None = None,
) -> Selector:
    """Return the selector that closes one site after another, each time the one that does least harm for what it saves.

    Before each step all sites that are still open are fitted by least squares to what they do behind the closed ones,
    and closed ones that lie behind a new one are fitted again. The harm is the divergence of the predictions from those
    of `model`. Ours; removing blocks one by one by what that does to the predictions is SLEB's (arXiv 2402.09025).
    """
    images = check_batches(batches)

    def select(demand: Demand) -> Choice:
        gated = copy.deepcopy(model)
        insert_gates_(gated, Plan(tuple(sites), start="fit"))
        fitness = spread(closeness(gated, images), processes)
        chosen: list[int] = []
        harm = 0.0
        while not demand.is_met(chosen):
            rest = [i for i in range(len(sites)) if i not in chosen]
            close_only_(gated, chosen)
            calibrate_(gated, images, [sites[i] for i in rest])
            harms = [-score for score in fitness([(*chosen, i) for i in rest])]
            harm, best = _cheapest(harms, harm, rest, demand)
            logger.info("Closed %s: predictions %.3g nats away.", sites[best], harm)
            chosen.append(best)
            for index in sorted(i for i in chosen if i > best):
                close_only_(gated, [i for i in chosen if i != index])
                calibrate_(gated, images, [sites[index]])
        return demand.take(chosen)

    return select


def _cheapest(harms: Sequence[float], before: float, rest: Sequence[int], demand: Demand) -> tuple[float, int]:
    """Return the harm and the index of the site that adds least harm for what it saves; of equal ones the first."""
    added = {index: (harm - before) / demand.savings[index] for harm, index in zip(harms, rest, strict=True)}
    best = min(rest, key=lambda index: (added[index], index))
    return harms[list(rest).index(best)], best
