"""Pictures. matplotlib is an extra, imported where it is needed."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from updp_hf.pareto import Front

__all__ = ["plot_front"]


def plot_front(front: "Front", file: Path) -> None:
    """Draw the score of each point of `front` against its measured speed-up.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture needs matplotlib: `pip install 'updp-hf[plots]'`.") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
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
