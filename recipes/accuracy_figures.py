"""What the records of the accuracy benchmark say: accuracies at UPDP's latency, and how far it is ahead."""

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from accuracy_ablations import ABLATED, ABLATION_SEEDS
from accuracy_nets import FAMILIES
from accuracy_ways import ABRUPT, DROP, UPDP, Network

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


def missing(families: Mapping[str, Sequence[Record]]) -> list[str]:
    """Return what there is to run yet: families, and what is run beside the comparison itself."""
    ablated = [record for family in ABLATED for record in families.get(family, ())[: len(ABLATION_SEEDS)]]
    first = [records[0] for records in families.values()]
    stages = (("ablations", "ablations", ablated), ("other runtimes", "runtimes", first))
    lacking = [name for name, stage, records in stages if not all(stage in record for record in records)]
    return [*(family for family in FAMILIES if family not in families), *lacking]


def points_of(record: Record, way: str) -> dict[float, tuple[float, float]]:
    """Return latency in seconds and held-out accuracy of the networks of one way, by level, that of the baseline at 0.

    Dropped blocks are told by their number.
    """
    baseline, *networks = record["sizes"]["networks"]
    points = {0.0: (baseline["seconds"], record["baseline"]["trained"]["test_accuracy"])}
    for network in networks:
        run = record.get("runs", {}).get(key_of(network))
        if network["way"] == way and run:
            points[network["amount" if way == DROP else "level"]] = (network["seconds"], run["test_accuracy"])
    return points


def key_of(network: Mapping[str, Any]) -> str:
    return Network.of(network).key


def level_of(record: Record, way: str, level: int) -> Mapping[str, Any] | None:
    """Return the network of one way at one level, None if there is none."""
    return next((n for n in record["sizes"]["networks"] if (n["way"], n["level"]) == (way, level)), None)


def levels_of(record: Record) -> list[int]:
    return sorted({network["level"] for network in record["sizes"]["networks"] if network["way"] == UPDP})


def accuracy_at(record: Record, way: str, level: int) -> float | None:
    """Return the held-out accuracy of `way` at the latency of UPDP's `level`, None if it is not reached or not run.

    Nothing can be brought to a latency exactly, blocks and channels come in steps: that of a rival is on the straight
    line between those of its networks, the baseline included, that are next to that latency on both sides. One that
    takes up to `TOLERANCE` longer than UPDP counts as reaching it.
    """
    points = points_of(record, way)
    if way in (UPDP, ABRUPT) or len(points) == 1:  # one network, or nothing run
        return points[level][1] if level in points else None
    aim = level_of(record, UPDP, level)
    assert aim is not None
    found = sorted(points.values())
    if found[0][0] / TOLERANCE <= aim["seconds"] < found[0][0]:
        return found[0][1]
    for (fast, low), (slow, high) in pairwise(found):
        if fast <= aim["seconds"] <= slow:
            return low + (high - low) * (aim["seconds"] - fast) / (slow - fast)
    return None


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
