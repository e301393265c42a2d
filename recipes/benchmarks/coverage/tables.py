"""The page of the benchmark of coverage."""

import collections
from collections.abc import Callable, Iterable
from typing import Any

from recipes.benchmarks.coverage.causes import anonymous
from recipes.benchmarks.coverage.row import Row
from recipes.benchmarks.text import grid


def markdown(document: dict[str, Any]) -> str:
    """Return the tables of what was measured."""
    rows = [Row(**row) for row in document["rows"].values()]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    intro = f"""# Coverage

Written by `python -m recipes.benchmarks.coverage`: one small model of each module of timm, and every image classifier
of transformers. Random weights, seed {document["seed"]}, at most {document["time_limit"]:g} s each. {versions}.

*Sites* are those of the form `merge`, *saving* those whose closing saves multiply-accumulates. *Form* and *closed*
tell what was closed: all of these, or where none does, those of the first other form that has any. *Gated* and *merged*
are the largest differences of logits and pruned blocks from the checkpoint and from the closed model in float64 and
float32. *Loads* means the same logits to the bit after `save_pretrained` and `from_pretrained`."""
    parts = {
        "Why blocks have no site": refusals(rows),
        "Where models fail": failures(rows),
        "Models": models(rows),
    }
    return "\n\n".join([intro, totals(rows), *(f"## {title}\n\n{table}" for title, table in parts.items())]) + "\n"


def totals(rows: list[Row]) -> str:
    counts: dict[str, Callable[[Row], Any]] = {
        "models": lambda row: True,
        "exported": lambda row: row.exported,
        "with sites": lambda row: row.sites,
        "with sites that save compute": lambda row: row.cheap,
        "… gated, merged and loaded": lambda row: row.cheap and row.reloaded,
        "another form saves compute": lambda row: row.closed and not row.cheap,
        "… gated, merged and loaded, other form": lambda row: row.closed and not row.cheap and row.reloaded,
    }
    libraries = ("timm", "transformers")
    return grid(
        ["", *libraries],
        [
            [
                name,
                *(str(sum(bool(test(row)) for row in rows if row.name.startswith(library))) for library in libraries),
            ]
            for name, test in counts.items()
        ],
    )


def refusals(rows: list[Row]) -> str:
    blocks: collections.Counter[str] = collections.Counter()
    for row in rows:
        blocks.update(row.refusals)
    found = by_cause((cause, row) for row in rows for cause in row.refusals)
    return grid(
        ["cause", "models", "blocks", "such as"],
        [[cause, str(len(where)), str(blocks[cause]), ", ".join(where[:3])] for cause, where in found],
    )


def failures(rows: list[Row]) -> str:
    found = by_cause((anonymous(row.failure), row) for row in rows if row.failure)
    return grid(
        ["cause", "models", "such as"], [[cause, str(len(where)), ", ".join(where[:3])] for cause, where in found]
    )


def by_cause(pairs: Iterable[tuple[str, Row]]) -> list[tuple[str, list[str]]]:
    """Group the names of models by cause, the commonest first."""
    found: dict[str, list[str]] = {}
    for cause, row in pairs:
        found.setdefault(cause, []).append(row.name.partition("/")[2])
    return sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))


def models(rows: list[Row]) -> str:
    header = "name, model, pixels, exported, sites, saving, form, closed, gated, merged, loads, MACs, seconds, why not"
    return grid(
        header.split(", "),
        [
            [
                row.name,
                row.model,
                str(row.image_size or ""),
                yes_no(row.exported),
                str(row.sites),
                str(row.cheap),
                row.form,
                str(row.closed or ""),
                "" if row.gate_error is None else f"{row.gate_error:.0e}",
                " ".join(f"{error:.0e}" for error in row.merge_errors.values()),
                yes_no(row.reloaded),
                f"{row.macs_after / row.macs_before:.2f}×" if row.macs_after else "",
                f"{row.seconds:.0f}",
                row.failure or row.why_not,
            ]
            for row in rows
        ],
    )


def yes_no(value: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[value]
