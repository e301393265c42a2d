"""Pictures: opaque, so that they read on a light page and on a dark one."""

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from updp_hf.core.kinds import kind_of_form
from updp_hf.core.schedule import ramp
from updp_hf.reporting.report import Report, numbers

if TYPE_CHECKING:
    from updp_hf.selection.pareto import Front

__all__ = ["Fate", "fates_of", "plot_before_after", "plot_blocks", "plot_front", "plot_schedule"]

PAPER, INK, FAINT = "#ffffff", "#24292f", "#8c959f"
BEFORE, AFTER = "#8c959f", "#0969da"
ROW = 16
"""Blocks in one row of the picture of a network."""


class Fate(StrEnum):
    """What pruning made of a block."""

    KEPT = "kept"
    MERGED = "merged"
    WITHOUT_ATTENTION = "without attention"
    DROPPED = "dropped"


_LOOKS: dict[Fate, dict[str, Any]] = {
    Fate.KEPT: {"facecolor": "#d0d7de", "edgecolor": INK, "linewidth": 0.8},
    Fate.MERGED: {"facecolor": AFTER, "edgecolor": INK, "linewidth": 0.8},
    Fate.WITHOUT_ATTENTION: {"facecolor": "#b6e3ff", "edgecolor": INK, "linewidth": 0.8},
    Fate.DROPPED: {"facecolor": PAPER, "edgecolor": INK, "linewidth": 0.8, "linestyle": "--"},
}


def fates_of(report: Report) -> dict[str, Fate]:
    """Return what became of each block of the unpruned network, in order of execution.

    A block of which some part was merged counts as merged.
    """
    fates = dict.fromkeys(report.blocks, Fate.KEPT)
    for site in report.plan.get("sites", []):
        if fates.get(site["block"]) is not Fate.MERGED:
            fates[site["block"]] = Fate(kind_of_form(site["form"]).outcome)
    return fates


def plot_blocks(report: Report, file: Path) -> None:
    """Draw the blocks of the network in order of execution, and what became of each."""
    fates = fates_of(report)
    columns, rows = min(ROW, len(fates)), math.ceil(len(fates) / ROW)
    figure = Figure(figsize=(0.55 * max(columns, 8) + 0.4, 0.85 * rows + 0.7), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    for index, (name, fate) in enumerate(fates.items()):
        row, column = divmod(index, ROW)
        x, y = column, -1.55 * row
        axes.add_patch(FancyBboxPatch((x, y), 0.72, 0.72, boxstyle="round,pad=0.05", **_LOOKS[fate]))
        ink = PAPER if fate is Fate.MERGED else INK
        axes.text(x + 0.36, y + 0.36, str(index), ha="center", va="center", color=ink, fontsize=10)
        axes.text(x + 0.36, y - 0.12, _short(name), ha="center", va="top", color=INK, fontsize=6.5)
        if column:
            axes.annotate(
                "", (x - 0.05, y + 0.36), (x - 0.23, y + 0.36), arrowprops={"arrowstyle": "-", "color": FAINT}
            )
    counts = {fate: sum(other is fate for other in fates.values()) for fate in Fate}
    for fate, count in counts.items():
        if count:
            axes.add_patch(FancyBboxPatch((0, 99), 0, 0, label=f"{count} {fate}", **_LOOKS[fate]))
    axes.set_xlim(-0.3, max(columns, 8) + 0.05)
    axes.set_ylim(-1.55 * (rows - 1) - 0.6, 0.95)
    axes.set_axis_off()
    figure.legend(loc="outside lower center", ncols=len(Fate), frameon=False, labelcolor=INK, fontsize=9)
    figure.savefig(file, dpi=150)


def _short(block: str) -> str:
    """Return the numbers in the path of a block, which tell its stage and its place there."""
    numbers = [name for name in block.split(".") if name[-1].isdigit()]
    return ".".join(numbers) or block.rpartition(".")[2]


def plot_before_after(report: Report, file: Path) -> None:
    """Draw accuracy, MACs, parameters and latency of the model before and after, each beside the other."""
    before, after = report.before, report.after
    panels: dict[str, tuple[Sequence[float | None], str]] = {
        "accuracy, %": ([_percent(report.metrics_before), _percent(report.metrics_after)], "{:.1f}"),
        "MACs per image, M": ([before.macs / 1e6, after.macs / 1e6], "{:,.1f}"),
        "parameters, M": ([before.parameters / 1e6, after.parameters / 1e6], "{:.2f}"),
    }
    sizes = sorted(set(before.latency or {}) & set(after.latency or {}), key=int)
    for size in sizes:
        panels[f"latency, batch {size}, ms"] = (
            [1e3 * (cost.latency or {})[size] for cost in (before, after)],
            "{:.2f}",
        )
    if not sizes:
        panels["latency, ms"] = ([None, None], "")
    figure = Figure(figsize=(1.75 * len(panels), 2.5), layout="constrained", facecolor=PAPER)
    for axes, (title, (values, form)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        _bars(axes, title, values, form)
    figure.savefig(file, dpi=150)


def _percent(metrics: Mapping[str, Any]) -> float | None:
    accuracy = numbers(metrics).get("accuracy")
    return None if accuracy is None else 100 * accuracy


def _bars(axes: Axes, title: str, values: Sequence[float | None], form: str) -> None:
    _plain(axes)
    axes.set_title(title, fontsize=9, color=INK)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xticks([0, 1], ["before", "after"], fontsize=8, color=INK)
    axes.set_xlim(-0.6, 1.6)
    axes.set_ylim(0, 1.18 * max([value for value in values if value], default=1.0))
    for place, (value, colour) in enumerate(zip(values, (BEFORE, AFTER), strict=True)):
        if value is not None:
            axes.bar(place, value, width=0.7, color=colour)
        text = "not\nmeasured" if value is None else form.format(value)
        axes.annotate(
            text, (place, value or 0.0), (0, 3), textcoords="offset points", ha="center", fontsize=8, color=INK
        )


def plot_schedule(report: Report, file: Path) -> None:
    """Draw λ over the steps of training, and the accuracy at each evaluation."""
    training = report.training
    shape = ramp(training["ramp"], training["ramp_start"], training["ramp_end"])
    steps = training["steps"]
    figure = Figure(figsize=(6, 2.4), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    _plain(axes)
    axes.plot(range(steps + 1), [shape(step / steps) for step in range(steps + 1)], color=INK, lw=1.5)
    axes.set_ylim(-0.04, 1.06)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.set_ylabel("λ", fontsize=10, color=INK, rotation=0)
    evaluations = [(e["step"], 100 * e["accuracy"]) for e in map(numbers, report.history) if "accuracy" in e]
    if evaluations:
        twin = axes.twinx()
        _plain(twin)
        twin.spines["right"].set_visible(True)
        twin.plot(*zip(*evaluations, strict=True), "o-", color=AFTER, lw=1, ms=4)
        twin.set_ylabel("held-out accuracy, %", fontsize=9, color=AFTER)
    figure.savefig(file, dpi=150)


def plot_front(front: "Front", file: Path) -> None:
    """Draw the score of each point of `front` against its measured speed-up."""
    figure = Figure(figsize=(6, 4), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    axes.plot([p.speed_up for p in front.points], [p.score for p in front.points], "o-", label="front")
    axes.plot([p.speed_up for p in front.beaten], [p.score for p in front.beaten], "o", color="silver", label="beaten")
    for point in (*front.points, *front.beaten):
        label = f"P{len(point.plan['sites'])}"
        axes.annotate(label, (point.speed_up, point.score), textcoords="offset points", xytext=(4, 4))
    axes.set_xlabel(f"speed-up, measured at batch size {front.batch_size}")
    axes.set_ylabel(front.score)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


def _plain(axes: Axes) -> None:
    axes.set_facecolor(PAPER)
    axes.tick_params(colors=INK, labelsize=8, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
