"""What `benchmark_accuracy.py` found, as Markdown: accuracy at UPDP's latency, what each part is worth, runtimes."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from accuracy_ablations import ABLATED
from accuracy_ways import ABRUPT, DROP, PAPER, SMALLER, TORCH_PRUNING, UPDP, WAYS, Network
from conditions import write_json

from updp_hf.report import side_by_side

__all__ = ["NAMES", "accuracy_at", "gathered", "points_of", "summary", "tables", "write_tables"]

Record = Mapping[str, Any]

NAMES = {
    UPDP: "UPDP",
    PAPER: "UPDP as in the paper",
    ABRUPT: "all at once",
    DROP: "blocks dropped",
    TORCH_PRUNING: "Torch-Pruning",
    SMALLER: "narrower, from scratch",
}
"""The ways, for people."""
TOLERANCE = 1.05
"""Of latencies, which are not measured any better."""


def gathered(folder: Path) -> dict[str, dict[str, dict[str, Record]]]:
    """Return what is known of each baseline, by dataset, family and seed."""
    found: dict[str, dict[str, dict[str, Record]]] = {}
    for file in sorted(folder.glob("*.json")):
        dataset, family, seed = file.stem.split("-")
        found.setdefault(dataset, {}).setdefault(family, {})[seed] = json.loads(file.read_text(encoding="utf-8"))
    return found


def write_tables(results: Mapping[str, Any], file: Path) -> None:
    """Write the results to `file`, and the tables beside it."""
    write_json(dict(results), str(file))
    file.with_suffix(".md").write_text(f"# Accuracy\n\n{tables(results)}\n", encoding="utf-8")


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


def tables(results: Mapping[str, Any]) -> str:
    """Return all tables, those of each dataset under its name."""
    parts = []
    for dataset, families in results.items():
        found = finished(families)
        if not found:
            continue
        parts += [f"## {dataset}", conditions(found), summary(found)]
        for family, records in found.items():
            parts += [
                f"### {family}",
                at_each_level(records),
                costs(records[0]),
                rates(records[0]),
                runtimes(records[0]),
            ]
        parts.append(ablations(found))
    return "\n\n".join(part for part in parts if part)


def finished(families: Mapping[str, Mapping[str, Record]]) -> dict[str, list[Record]]:
    """Return the records that have runs, in the order of their seeds, of each family that has any."""
    found = {
        family: [record for _, record in sorted(seeds.items()) if record.get("runs")]
        for family, seeds in families.items()
    }
    return {family: records for family, records in found.items() if records}


def conditions(families: Mapping[str, Sequence[Record]]) -> str:
    first = next(iter(families.values()))[0]["conditions"]
    return ", ".join(f"{name}: {value}" for name, value in first.items() if name != "network")  # its own in each family


def summary(families: Mapping[str, Sequence[Record]]) -> str:
    """Return accuracy at equal latency: a row for each way, a column for each family, means over levels and seeds.

    The last column is the mean of the families, with their standard deviation.
    """
    columns: dict[str, dict[str, str]] = {}
    for family, records in families.items():
        column = columns.setdefault(family, {})
        column["baselines"] = str(len(records))
        column["accuracy, baseline"] = spread_of(record["baseline"]["trained"]["test_accuracy"] for record in records)
        speed_ups = [speed_up(record, UPDP, level) for record in records for level in levels_of(record)]
        column["speed-up"] = f"{min(speed_ups):.2f}× to {max(speed_ups):.2f}×"
        for way in WAYS:
            column[NAMES[way]] = spread_of(over_levels(record, way) for record in records)
    mean = dict.fromkeys(next(iter(columns.values())), "")
    for way in WAYS[1:]:
        row, of_families = f"UPDP ahead of: {NAMES[way]}", []
        for family, records in families.items():
            leads = [ahead(record, way) for record in records]
            columns[family][row] = spread_of(leads, signed=True)
            found = [lead for lead in leads if lead is not None]
            of_families += [statistics.fmean(found)] if found else []
        mean[row] = spread_of(of_families, signed=True)
    return side_by_side({**columns, "mean of families": mean})


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


def at_each_level(records: Sequence[Record]) -> str:
    """Return accuracy at equal latency, a column for each level, mean and standard deviation over the seeds."""
    columns: dict[str, dict[str, str]] = {}
    for level in levels_of(records[0]):
        network = level_of(records[0], UPDP, level)
        assert network is not None
        column = columns.setdefault(f"P{network['amount']:g}", {})
        column["speed-up"] = spread_of((speed_up(record, UPDP, level) for record in records), form="{:.2f}×")
        for way in WAYS:
            column[NAMES[way]] = spread_of(accuracy_at(record, way, level) for record in records)
        for way in (TORCH_PRUNING, SMALLER):
            pairs = [(level_of(record, way, level), level_of(record, UPDP, level)) for record in records]
            ratios = [other["seconds"] / own["seconds"] for other, own in pairs if other and own]
            column[f"time of {NAMES[way]} / UPDP's"] = spread_of(ratios, form="{:.2f}")
    return side_by_side(columns)


def costs(record: Record) -> str:
    """Return what each network costs, those of the first seed."""
    columns = {}
    for network in record["sizes"]["networks"]:
        first = record["sizes"]["networks"][0]
        columns[key_of(network)] = {
            "parameters": f"{network['parameters'] / 1e3:.0f} k",
            "MACs": f"{network['macs'] / 1e6:.2f} M",
            "speed-up, measured": f"{first['seconds'] / network['seconds']:.2f}×",
        }
    return transposed(columns)


def rates(record: Record) -> str:
    """Return the validation loss at each learning rate, and so which was taken."""
    rows: dict[str, dict[str, str]] = {}
    for name, run in record.get("rates", {}).items():
        key, _, _ = name.rpartition(", ")
        rows.setdefault(key, {})[f"learning rate {run['learning_rate']:.2g}"] = f"{run['validation_loss']:.3f}"
    return "Loss on validation images after fine-tuning:\n\n" + transposed(rows) if rows else ""


def runtimes(record: Record) -> str:
    """Return the speed-up of each network of the first seed in each runtime."""
    rows: dict[str, dict[str, str]] = {}
    for runtime, medians in record.get("runtimes", {}).items():
        for name, seconds in medians.items():
            ratio = medians["baseline"] / seconds
            rows.setdefault(name, {})[runtime] = f"{1e3 * seconds:.1f} ms, {ratio:.2f}×"
    return "Latency and speed-up in each runtime:\n\n" + transposed(rows) if rows else ""


def ablations(families: Mapping[str, Sequence[Record]]) -> str:
    """Return what becomes of accuracy when one thing is changed, in points, mean and spread over the seeds."""
    rows: dict[str, dict[str, str]] = {}
    for family, records in families.items():
        changed = [record for record in records if record.get("ablations")]
        for name in dict.fromkeys(name for record in changed for name in record["ablations"]):
            runs = [(record, record["ablations"][name]) for record in changed if name in record["ablations"]]
            row = rows.setdefault(name, {})
            row[f"{family}, accuracy"] = spread_of(run["test_accuracy"] for _, run in runs)
            shipped = [accuracy_at(record, UPDP, ABLATED[family]) or 0.0 for record, _ in runs]
            changes = [run["test_accuracy"] - before for before, (_, run) in zip(shipped, runs, strict=True)]
            row[f"{family}, change"] = spread_of(changes, signed=True)
            row[f"{family}, speed-up"] = spread_of((run["speed_up"] for _, run in runs), form="{:.2f}×")
    return "### One thing changed\n\n" + transposed(rows) if rows else ""


def transposed(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Return a Markdown table with a row for each name."""
    facts = dict.fromkeys(fact for row in rows.values() for fact in row)
    return side_by_side({fact: {name: row.get(fact, "–") for name, row in rows.items()} for fact in facts})


def spread_of(values: Iterable[float | None], *, form: str = "{:.1%}", signed: bool = False) -> str:
    """Return mean and standard deviation of the values, as people read them, and how many there are if some lack."""
    listed = list(values)
    found = [value for value in listed if value is not None]
    if not found:
        return "–"
    text = form.format(statistics.fmean(found))
    if signed:
        text = f"{100 * statistics.fmean(found):+.1f}"
    if len(found) > 1:
        deviation = statistics.stdev(found)
        text += " ± " + (form.format(deviation) if "%" not in form and not signed else f"{100 * deviation:.1f}")
    return text if len(found) == len(listed) else f"{text} ({len(found)} of {len(listed)})"
