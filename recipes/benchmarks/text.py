"""Paragraphs and tables of Markdown."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from updp_hf.reporting.tables import side_by_side

__all__ = ["grid", "paragraph", "side_by_side", "transposed"]


def paragraph(text: str) -> str:
    """Return `text` in lines of at most 120 characters."""
    return textwrap.fill(" ".join(text.split()), width=120, break_long_words=False, break_on_hyphens=False)


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns are as narrow as their cells, for long ones."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in line)} |" for line in lines)


def transposed(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Return a table with a row for each name."""
    facts = dict.fromkeys(fact for row in rows.values() for fact in row)
    return side_by_side({fact: {name: row.get(fact, "–") for name, row in rows.items()} for fact in facts})
