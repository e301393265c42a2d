"""What the benchmark of accuracy found, as Markdown: accuracy at one latency, what each part is worth, runtimes."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.benchmarks.accuracy.ablations import ABLATED
from recipes.benchmarks.accuracy.figures import (
    Record,
    accuracy_at,
    ahead,
    finished,
    key_of,
    level_of,
    levels_of,
    over_levels,
    points_of,
    speed_up,
    tuned_baseline,
)
from recipes.benchmarks.accuracy.ways import ABRUPT, DROP, PAPER, SMALLER, TORCH_PRUNING, UPDP, WAYS
from recipes.benchmarks.conditions import write_json
from recipes.benchmarks.text import side_by_side, transposed

__all__ = ["NAMES", "page", "spread_of", "summary", "tables", "write_tables"]

NAMES = {
    UPDP: "updp_hf (default)",
    PAPER: "UPDP (as published)",
    ABRUPT: "at once, without a fit",
    DROP: "blocks dropped",
    TORCH_PRUNING: "Torch-Pruning",
    SMALLER: "narrower, from scratch",
}
"""The ways, for people."""


def write_tables(results: Mapping[str, Any], file: Path) -> None:
    """Write the results to `file`, and the tables beside it."""
    write_json(dict(results), str(file))
    file.with_suffix(".md").write_text(page(results), encoding="utf-8")


def page(results: Mapping[str, Any]) -> str:
    return f"# Accuracy\n\n{tables(results)}\n"


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


def conditions(families: Mapping[str, Sequence[Record]]) -> str:
    first = next(iter(families.values()))[0]["conditions"]
    return ", ".join(f"{name}: {value}" for name, value in first.items() if name != "network")  # its own in each family


def summary(families: Mapping[str, Sequence[Record]]) -> str:
    """Return accuracy at equal latency: a row for each way, a column for each family, means over levels and seeds.

    The last column, if there are several families, is their mean with their standard deviation.
    """
    columns: dict[str, dict[str, str]] = {}
    for family, records in families.items():
        column = columns.setdefault(family, {})
        column["baselines"] = str(len(records))
        column["accuracy, baseline"] = spread_of(record["baseline"]["trained"]["test_accuracy"] for record in records)
        tuned = [tuned_baseline(record) for record in records]
        column["baseline, fine-tuned"] = spread_of(run["test_accuracy"] if run else None for run in tuned)
        speed_ups = [speed_up(record, UPDP, level) for record in records for level in levels_of(record)]
        column["speed-up"] = f"{min(speed_ups):.2f}× to {max(speed_ups):.2f}×"
        for way in WAYS:
            column[NAMES[way]] = spread_of(over_levels(record, way) for record in records)
    mean = dict.fromkeys(next(iter(columns.values())), "")
    for way in WAYS[1:]:
        row, of_families = f"updp_hf ahead of: {NAMES[way]}", []
        for family, records in families.items():
            leads = [ahead(record, way) for record in records]
            columns[family][row] = spread_of(leads, signed=True)
            found = [lead for lead in leads if lead is not None]
            of_families += [statistics.fmean(found)] if found else []
        mean[row] = spread_of(of_families, signed=True)
    return side_by_side({**columns, "mean of families": mean} if len(columns) > 1 else columns)


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
            column[f"time of {NAMES[way]} / updp_hf's"] = spread_of(ratios, form="{:.2f}")
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
            level = ABLATED[family]
            changes = [run["test_accuracy"] - points_of(record, UPDP)[level][1] for record, run in runs]
            row[f"{family}, change"] = spread_of(changes, signed=True)
            measured = [record.get("ablated", {}).get("speed-ups", {}).get(name) for record, _ in runs]
            row[f"{family}, speed-up"] = spread_of(measured, form="{:.2f}×")
    return "### One thing changed\n\n" + transposed(rows) if rows else ""


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
