"""The Pareto front of a model: the choices of sites that no other one beats in both score and latency."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from accelerate import PartialState
from torch import Tensor, nn
from transformers.utils import logging

from updp_hf.core.graph.structure import Structure
from updp_hf.core.kinds import DEFAULT_FORM
from updp_hf.core.plan.budget import Demand
from updp_hf.core.plan.plan import Plan
from updp_hf.core.plan.site import Site, Start
from updp_hf.core.search import Fitness, search
from updp_hf.processes import on_main_process, split_over_processes
from updp_hf.selection.choose import candidates_of
from updp_hf.selection.demand import Measure, measure_merged
from updp_hf.selection.score_history import ScoreHistory
from updp_hf.selection.scores import closeness
from updp_hf.selection.supernet import SupernetTraining
from updp_hf.surgery.calibrate import calibrated_copy
from updp_hf.surgery.model_io import base_model_of, check_batches

__all__ = ["FRONT_NAME", "Front", "Point", "fitted_fitness", "front_of", "pareto_front"]

logger = logging.get_logger(__name__)

FRONT_NAME = "pareto"


@dataclass(frozen=True)
class Point:
    """A choice of sites: what it is worth and what it costs."""

    plan: dict[str, Any]
    score: float  # the higher the better
    latency: float  # median seconds of one forward of the merged network
    speed_up: float  # latency before / after, measured in turn


@dataclass(frozen=True)
class Front:
    """The points that no other one beats in both score and speed-up, the slowest first."""

    points: tuple[Point, ...]
    beaten: tuple[Point, ...]  # the best of the other numbers of sites
    batch_size: int  # of which the latency was measured
    score: str  # what it is

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `pareto.json` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        document = json.dumps(asdict(self), indent=2, sort_keys=True)
        (folder / f"{FRONT_NAME}.json").write_text(document + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote into `folder`."""
        document = json.loads((Path(folder) / f"{FRONT_NAME}.json").read_text(encoding="utf-8"))
        points, beaten = (tuple(Point(**point) for point in document[name]) for name in ("points", "beaten"))
        return cls(points, beaten, document["batch_size"], document["score"])


def pareto_front(
    model: nn.Module,
    images: Iterable[Mapping[str, Any] | Tensor],
    *,
    form: str = DEFAULT_FORM,
    cost: Literal["macs", "latency"] = "macs",
    supernet: SupernetTraining | None = None,
    start: Start = "fit",
    end_activation: str | None = None,
    batch_size: int = 1,
    structure: Structure | None = None,
    processes: PartialState | None = None,
    **settings: Any,
) -> Front:
    """Return the choices of sites that no other one beats in both score and latency. The model is left as it is.

    The score is that of the supernet if one is to be trained, else the negated divergence from the predictions of
    `model` with every closed site fitted by least squares. The arguments are those of `choose`.

    Raises:
        PlanError: the model has no sites.
    """
    images = check_batches(images)
    found = candidates_of(model, form, cost, batch_size=batch_size, structure=structure, processes=processes)
    sites = found.sites
    if supernet is not None:
        fitness: Fitness = supernet.run(Plan(sites, start, end_activation), images, processes).fitness
        score = "supernet: negated cross entropy, nats"
    else:
        fitness = fitted_fitness(model, sites, images, processes)
        score = "fitted: negated divergence from the checkpoint, nats"
    return front_of(
        model,
        sites,
        fitness,
        score=score,
        start=start,
        end_activation=end_activation,
        batch_size=batch_size,
        processes=processes,
        **settings,
    )


def front_of(
    model: nn.Module,
    sites: Sequence[Site],
    fitness: Fitness,
    *,
    score: str = "score",
    start: Start = "fit",
    end_activation: str | None = None,
    batch_size: int = 1,
    processes: PartialState | None = None,
    measure: Measure = measure_merged,
    **settings: Any,
) -> Front:
    """Search for the best choice of every number of `sites`, measure each merged, and return the front.

    Args:
        model: the checkpoint; it is left as it is.
        sites: the candidates, in the order in which `fitness` knows them.
        fitness: scores several choices at once, the higher the better.
        score: what `fitness` measures, for people.
        start: that of the plans, see `Plan`.
        end_activation: that of the plans, see `Plan`; latencies are measured without it.
        batch_size: images in the forward of which the latency is measured.
        processes: with several, the main one measures.
        measure: what measures.
        **settings: those of `search`.
    """
    points = []
    for count in range(1, len(sites) + 1):
        choice = search(fitness, Demand((1.0,) * len(sites), count), **settings)
        (value,) = fitness([choice])
        chosen = tuple(sites[index] for index in choice)
        plan = Plan(chosen, start, end_activation, base_model=base_model_of(model))
        before, after = on_main_process(lambda: measure(model, plan.sites, batch_size), processes)  # noqa: B023
        points.append(Point(plan.to_dict(), value, after, before / after))
        logger.info("%d sites: score %.4g, %.2f× as fast.", count, value, before / after)
    return _front(points, batch_size, score)


def _front(points: Sequence[Point], batch_size: int, score: str) -> Front:
    def is_beaten(point: Point) -> bool:
        own = (point.score, point.speed_up)
        others = [(other.score, other.speed_up) for other in points]
        return any(score >= own[0] and speed_up >= own[1] and (score, speed_up) != own for score, speed_up in others)

    by_speed = sorted(points, key=lambda point: point.speed_up)
    kept = tuple(point for point in by_speed if not is_beaten(point))
    return Front(kept, tuple(point for point in by_speed if is_beaten(point)), batch_size, score)


def fitted_fitness(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Any] | Tensor],
    processes: PartialState | None = None,
) -> Fitness:
    """Return the fitness of a choice without any training: -KL(model ‖ pruned), each site fitted by least squares."""
    images = check_batches(batches)
    gated = calibrated_copy(model, Plan(tuple(sites), start="fit"), images)
    return ScoreHistory(split_over_processes(closeness(gated, images), processes), processes=processes)
