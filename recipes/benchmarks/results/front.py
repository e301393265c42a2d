"""The small tables of the README of the repository, each between its marks."""

import statistics
from collections.abc import Callable, Iterable, Sequence

from recipes.benchmarks.accuracy.figures import (
    Record,
    ahead,
    level_of,
    levels_of,
    over_levels,
    points_of,
    speed_up,
    tuned_baseline,
)
from recipes.benchmarks.accuracy.tables import NAMES, spread_of
from recipes.benchmarks.accuracy.ways import DROP, PAPER, SMALLER, TORCH_PRUNING, UPDP
from recipes.benchmarks.latency.tables import summary_rows
from recipes.benchmarks.results.records import compared, read
from recipes.benchmarks.text import side_by_side, transposed

__all__ = ["TABLES", "replaced"]

LEVEL = 2
"""The level in the table at the top: two thirds of the sites."""
RIVALS = (PAPER, DROP, TORCH_PRUNING, SMALLER)
SPEEDS = (
    "all sites merged",
    "MACs, before / after",
    "speed-up, eager, batch 1",
    "speed-up, compiled, batch 16",
    "speed-up, ONNX Runtime, batch 16",
    "6 sites merged, eager, batch 16",
)


def top() -> str:
    """Return what pruning two thirds of the blocks makes of each family on the digits, means over the baselines."""
    rows = {}
    for family, records in compared("digits").items():
        pruned, sites = (level_of(records[0], UPDP, level) for level in (LEVEL, levels_of(records[0])[-1]))
        assert pruned is not None
        assert sites is not None
        before = statistics.fmean(_tuned(record) for record in records)
        after = statistics.fmean(points_of(record, UPDP)[LEVEL][1] for record in records)
        faster = statistics.fmean(speed_up(record, UPDP, LEVEL) for record in records)
        rows[family] = {
            "blocks pruned": f"{pruned['amount']:g} of {sites['amount']:g}",
            "accuracy before → after": f"{before:.1%} → {after:.1%}",
            "speed-up": f"{faster:.2f}×",
        }
    return transposed(rows)


def _tuned(record: Record) -> float:
    """Return the accuracy of the baseline, fine-tuned for as many steps as the pruned network."""
    run = tuned_baseline(record)
    assert run is not None
    return float(run["test_accuracy"])


def accuracy() -> str:
    """Return accuracy at equal latency on the digits, and how far updp_hf is ahead on both datasets."""
    columns: dict[str, dict[str, str]] = {}
    for family, records in compared("digits").items():
        columns[family] = {"baseline, fine-tuned": spread_of(_tuned(record) for record in records)}
        columns[family] |= {NAMES[way]: spread_of(over_levels(r, way) for r in records) for way in (UPDP, *RIVALS)}
    for dataset in ("digits", "glyphs"):
        leads = {NAMES[way]: spread_of(_leads(way, compared(dataset).values()), signed=True) for way in RIVALS}
        columns[f"updp_hf ahead, {dataset}"] = {"baseline, fine-tuned": "", NAMES[UPDP]: "", **leads}
    return side_by_side(columns)


def _leads(way: str, families: Iterable[Sequence[Record]]) -> list[float]:
    """Return how far updp_hf is ahead of `way` in each family that has both, mean over its baselines."""
    found = [[lead for record in records if (lead := ahead(record, way)) is not None] for records in families]
    return [statistics.fmean(leads) for leads in found if leads]


def speed() -> str:
    """Return the speed-ups of networks of real size."""
    columns = summary_rows(read("benchmark_latency.json"))
    return side_by_side({name: {row: rows[row] for row in SPEEDS} for name, rows in columns.items()})


TABLES: dict[str, Callable[[], str]] = {"top": top, "accuracy": accuracy, "speed": speed}
"""By the name in the marks: a table stands between `<!-- table: NAME -->` and `<!-- table: end -->`."""


def replaced(text: str) -> str:
    """Return `text` with every table that has marks in it as the records say.

    Raises:
        ValueError: a mark is not closed.
    """
    for name, table in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- table: end -->"
        if begin not in text:
            continue
        before, _, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not closed:
            raise ValueError(f"`{begin.strip()}` is not followed by `{end}`: put it behind the table.")
        text = f"{before}{begin}\n{table()}\n\n{end}{after}"
    return text
