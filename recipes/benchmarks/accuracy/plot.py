"""Accuracy against measured speed-up, a picture for each dataset with a panel for each family."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.benchmarks.accuracy.figures import Record, finished, points_of
from recipes.benchmarks.accuracy.tables import NAMES
from recipes.benchmarks.accuracy.ways import ABRUPT, DROP, PAPER, SMALLER, TORCH_PRUNING, UPDP

__all__ = ["plot"]

INK = "#24292f"
LOOKS: dict[str, dict[str, Any]] = {
    UPDP: {"color": "#0969da", "marker": "o", "linewidth": 2},
    PAPER: {"color": "#54aeff", "marker": "o", "linestyle": "--"},
    ABRUPT: {"color": "#bf3989", "marker": "v"},
    DROP: {"color": "#8c959f", "marker": "s"},
    TORCH_PRUNING: {"color": "#bc4c00", "marker": "^"},
    SMALLER: {"color": "#1a7f37", "marker": "D"},
}


def plot(results: Mapping[str, Mapping[str, Mapping[str, Record]]], folder: Path, stem: str) -> None:
    """Draw a picture of each dataset of which something is finished: `STEM_DATASET.png` in `folder`."""
    for dataset, families in results.items():
        found = finished(families)
        if found:
            _draw(found, folder / f"{stem}_{dataset}.png")


def _draw(families: Mapping[str, Sequence[Record]], file: Path) -> None:
    figure = Figure(figsize=(3.4 * len(families), 3.6), layout="constrained", facecolor="#ffffff")
    panels = figure.subplots(1, len(families), squeeze=False)[0]
    for axes, (family, records) in zip(panels, families.items(), strict=True):
        for way in LOOKS:
            _curve(axes, records, way)
        axes.set_title(family, color=INK)
        axes.set_xlabel("speed-up, measured")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out accuracy, %")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)


def _curve(axes: Axes, records: Sequence[Record], way: str) -> None:
    """Draw the networks of one way that all baselines have, mean and standard deviation, joined to the baseline."""
    by_level: dict[float, list[tuple[float, float]]] = {}
    for record in records:
        points = points_of(record, way)
        for level, (seconds, accuracy) in points.items():
            by_level.setdefault(level, []).append((points[0][0] / seconds, 100 * accuracy))
    columns = [list(zip(*pairs, strict=True)) for pairs in by_level.values() if len(pairs) == len(records)]
    if len(columns) < 2:
        return
    columns.sort(key=lambda column: statistics.fmean(column[0]))  # in the order in which they lie beside each other
    x, y = ([statistics.fmean(column[axis]) for column in columns] for axis in (0, 1))
    spread = [statistics.stdev(column[1]) if len(column[1]) > 1 else 0.0 for column in columns]
    axes.errorbar(x, y, yerr=spread, label=NAMES[way], markersize=5, capsize=2, **LOOKS[way])
