"""The tables of the benchmark of training, from the files that its runs left."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.benchmarks.text import side_by_side

__all__ = ["conditions_text", "gated_text", "loader_part", "report_of", "table", "tables"]

Facts = dict[str, Any]


def report_of(files: Sequence[Path]) -> str:
    """Return the Markdown page of all runs."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    parts = [f"## {run['device']}\n\n{tables(run)}" for run in runs]
    return "\n\n".join(["# What pruning costs while training", *parts]) + "\n"


def tables(results: Facts) -> str:
    """Return the tables of one run, its loader and its conditions."""
    parts = [f"{gated_text(name, network)}\n\n{table(network)}" for name, network in results["networks"].items()]
    text = conditions_text(results)
    other = {name: results[name] for name in ("arguments", "tf32", "versions")}
    return "\n\n".join([*parts, *loader_part(results), f"{text}; {other}"])


def conditions_text(results: Facts) -> str:
    """Return in a few words where and on what a run was made."""
    arguments, versions = results["arguments"], results["versions"]
    words = [
        results["device"],
        "bfloat16 autocast" if arguments["bf16"] else "float32",
        "compiled" if arguments["compile"] else "eager",
        f"{results['threads']} threads",
        f"form {arguments['form']}",
        f"batch {arguments['batch_size']}",
        f"{arguments['image_size']} pixels",
        f"medians of {arguments['rounds']} rounds in turn",
        *(f"{name} {versions[name]}" for name in ("torch", "transformers")),
    ]
    return ", ".join(words)


def table(network: Facts) -> str:
    """Return the Markdown table of one network: a column for each way to train, ratios to the plain one beside it."""
    columns: dict[str, dict[str, str]] = {}
    for has_teacher in (False, True):
        variants = {v["kind"]: v for v in network["variants"] if v["has_teacher"] is has_teacher}
        for kind, variant in variants.items():
            columns.setdefault(kind, {})
            columns[kind] |= _rows(variant, variants["plain"], network["settings"] if kind == "supernet" else 1)
    return side_by_side(columns)


def _rows(variant: Facts, plain: Facts, settings: int) -> dict[str, str]:
    peak = variant["peak_bytes"]
    step = f"{1e3 * variant['step_seconds']:.0f} ms"
    if variant["has_teacher"]:
        ratios = {
            "time / plain with a teacher": _ratio(variant["time_ratio_alike"], settings),
            "time / plain without": _ratio(variant["time_ratio"], settings),
        }
        rows = {"step, with a teacher": step, **ratios}
    else:
        rows = {"step": step, "time / plain": _ratio(variant["time_ratio"], settings)}
    if peak is None:
        return rows
    peak_ratio = f"{peak / plain['peak_bytes']:.2f}×"
    names = ("peak memory, with a teacher", "memory / plain with a teacher")
    name, ratio_name = names if variant["has_teacher"] else ("peak memory", "memory / plain")
    return rows | {name: f"{peak / 2**20:.0f} MiB", ratio_name: peak_ratio}


def _ratio(ratio: float, settings: int) -> str:
    return f"{ratio:.2f}×" + (f", {ratio / settings:.2f}× a setting" if settings > 1 else "")


def gated_text(name: str, network: Facts) -> str:
    """Return what of a network was gated."""
    sites, gated, settings = network["sites"], network["gated_sites"], network["settings"]
    return f"**{name}**, {gated} of {sites} sites gated, in the supernet all, with {settings} settings a step:"


def loader_part(results: Facts) -> list[str]:
    """Return how the loader compares with the steps, if it was measured."""
    loaded = results["loaded_images_per_second"]
    if loaded is None:
        return []
    size, workers = results["arguments"]["batch_size"], results["arguments"]["workers"]
    steps = []
    for name, network in results["networks"].items():
        fastest = min(network["variants"], key=lambda variant: variant["step_seconds"])
        steps.append(f"{name} {size / fastest['step_seconds']:.0f} ({fastest['kind']})")
    return [
        f"Input pipeline alone, {workers} processes: {loaded:.0f} images/s. The fastest step takes, in images/s: "
        + ", ".join(steps)
        + "."
    ]
