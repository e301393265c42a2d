"""Numbers as people read them, and Markdown tables of them."""

from collections.abc import Mapping
from typing import Any

__all__ = ["NOT_MEASURED", "latency_facts", "numbers", "side_by_side", "speed_ups"]

NOT_MEASURED = "not measured"


def side_by_side(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Return a Markdown table with one column of facts for each name; a fact that one lacks reads "not measured"."""
    names = list(dict.fromkeys(name for facts in columns.values() for name in facts))
    rows = [
        ["", *columns],
        *([name, *(facts.get(name, NOT_MEASURED) for facts in columns.values())] for name in names),
    ]
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = "-|-".join("-" * width for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|-{rule}-|", *(f"| {line} |" for line in lines[1:])])


def latency_facts(seconds: Mapping[str, float]) -> dict[str, str]:
    """Return latencies in seconds, by batch size, as people read them."""
    return {f"latency, batch {size}": f"{seconds[size] * 1e3:.2f} ms" for size in sorted(seconds, key=int)}


def speed_ups(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> dict[str, float]:
    """Return how many times as fast the second is, by batch size, where both were measured."""
    before, after = before or {}, after or {}
    return {size: before[size] / after[size] for size in sorted(before, key=int) if size in after}


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Leave out what is no number: a `compute_metrics` may return a confusion matrix, too."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
