"""What the records of the accuracy benchmark say: accuracies at UPDP's latency, and how far it is ahead."""

import json
import statistics
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from recipes.benchmarks.accuracy.ablations import ABLATED, ABLATION_SEEDS, ablations_of
from recipes.benchmarks.accuracy.nets import FAMILIES
from recipes.benchmarks.accuracy.ways import DROP, UPDP, Network
from recipes.benchmarks.latency.modes import COMPILED, EAGER, ONNX

__all__ = [
    "Record",
    "accuracy_at",
    "ahead",
    "finished",
    "gathered",
    "key_of",
    "level_of",
    "levels_of",
    "missing",
    "over_levels",
    "points_of",
    "speed_up",
    "tuned_baseline",
]

Record = Mapping[str, Any]

TOLERANCE = 1.05
"""Of latencies, which are not measured any better."""


def gathered(folder: Path) -> dict[str, dict[str, dict[str, Record]]]:
    """Return what is known of each baseline, by dataset, family and seed."""
    found: dict[str, dict[str, dict[str, Record]]] = {}
    for file in sorted(folder.glob("*.json")):
        dataset, family, seed = file.stem.split("-")
        found.setdefault(dataset, {}).setdefault(family, {})[seed] = json.loads(file.read_text(encoding="utf-8"))
    return found


def finished(families: Mapping[str, Mapping[str, Record]]) -> dict[str, list[Record]]:
    """Return the records that have runs, in the order of their seeds, of each family that has any."""
    found = {
        family: [record for _, record in sorted(seeds.items()) if record.get("runs")]
        for family, seeds in families.items()
    }
    return {family: records for family, records in found.items() if records}


def missing(families: Mapping[str, Mapping[str, Record]]) -> list[str]:
    """Return what there is to run yet: families, and what is run beside the comparison itself."""
    ran = finished(families)
    expected = {family: set(ablations_of(level)) for family, level in ABLATED.items() if family in ran}
    modes = {EAGER, COMPILED, ONNX}
    lacking = [family for family in FAMILIES if family not in ran]
    if any(
        names - set(families[family].get(str(seed), {}).get("ablations", ()))
        for family, names in expected.items()
        for seed in ABLATION_SEEDS
    ):
        lacking.append("ablations")
    if any(modes - set(families[family].get("0", {}).get("runtimes", ())) for family in ran):
        lacking.append("other runtimes")
    return lacking


def points_of(record: Record, way: str) -> dict[float, tuple[float, float]]:
    """Return latency in seconds and held-out accuracy of the networks of one way, by level, that of the baseline at 0.

    Dropped blocks are told by their number. The baseline is fine-tuned as long as all others, where that was run.
    """
    baseline, *networks = record["sizes"]["networks"]
    known = tuned_baseline(record) or record["baseline"]["trained"]
    points = {0.0: (baseline["seconds"], known["test_accuracy"])}
    for network in networks:
        run = record.get("runs", {}).get(key_of(network))
        if network["way"] == way and run:
            points[network["amount" if way == DROP else "level"]] = (network["seconds"], run["test_accuracy"])
    return points


def tuned_baseline(record: Record) -> Mapping[str, Any] | None:
    """Return the run in which the baseline was fine-tuned as long as the others, None if it was not."""
    found: Mapping[str, Any] | None = record.get("runs", {}).get(key_of(record["sizes"]["networks"][0]))
    return found


def key_of(network: Mapping[str, Any]) -> str:
    return Network.of(network).key


def level_of(record: Record, way: str, level: int) -> Mapping[str, Any] | None:
    """Return the network of one way at one level, None if there is none."""
    return next((n for n in record["sizes"]["networks"] if (n["way"], n["level"]) == (way, level)), None)


def levels_of(record: Record) -> list[int]:
    return sorted({network["level"] for network in record["sizes"]["networks"] if network["way"] == UPDP})


def accuracy_at(record: Record, way: str, level: int) -> float | None:
    """Return the held-out accuracy of `way` in the time of UPDP's `level`, None if that is not reached or not run.

    That is the accuracy of the best of its networks, the baseline included, that take no longer. Nothing can be brought
    to a latency exactly, blocks and channels come in steps: so what is on the straight line between the networks next
    to that latency on both sides counts, too, and one that takes up to `TOLERANCE` longer if none is faster.
    """
    points = points_of(record, way)
    network = level_of(record, UPDP, level)
    if len(points) == 1 or network is None:  # nothing run
        return None
    aim = network["seconds"]
    found = sorted(points.values())
    if aim < found[0][0]:
        return found[0][1] if found[0][0] <= TOLERANCE * aim else None
    reached = [accuracy for seconds, accuracy in found if seconds <= aim]
    for (fast, low), (slow, high) in pairwise(found):
        if fast <= aim < slow:
            reached.append(low + (high - low) * (aim - fast) / (slow - fast))
    return max(reached)


def over_levels(record: Record, way: str) -> float | None:
    found = [accuracy_at(record, way, level) for level in levels_of(record)]
    return None if None in found else statistics.fmean(value for value in found if value is not None)


def ahead(record: Record, way: str) -> float | None:
    """Return how far UPDP is ahead of `way`, mean over the levels at which both were run."""
    pairs = [(accuracy_at(record, UPDP, level), accuracy_at(record, way, level)) for level in levels_of(record)]
    gains = [own - other for own, other in pairs if own is not None and other is not None]
    return statistics.fmean(gains) if gains else None


def speed_up(record: Record, way: str, level: int) -> float:
    network = level_of(record, way, level)
    assert network is not None
    return float(record["sizes"]["networks"][0]["seconds"] / network["seconds"])
