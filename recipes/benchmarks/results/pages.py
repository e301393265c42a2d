"""Every page of results, by its file."""

from pathlib import Path

from recipes.benchmarks.accuracy.tables import page as accuracy_page
from recipes.benchmarks.coverage.tables import markdown as coverage_page
from recipes.benchmarks.latency.tables import page as latency_page
from recipes.benchmarks.results import accuracy, costs, front
from recipes.benchmarks.results.records import CARDS, ROOT, read, training_files
from recipes.benchmarks.selectors.tables import page as selectors_page
from recipes.benchmarks.text import paragraph
from recipes.benchmarks.training.tables import report_of

__all__ = ["pages"]

INTRODUCTION = """
    All figures of this project, each with its conditions. Every table is made from a record in this folder by
    `python -m recipes.benchmarks.results`; none is typed. How a record is made stands in
    [recipes/README.md](../recipes/README.md)."""


def pages() -> dict[Path, str]:
    """Return what each page of results says, by its file."""
    readme = ROOT / "README.md"
    return {
        CARDS / "README.md": results_page(),
        readme: front.replaced(readme.read_text(encoding="utf-8")),
        CARDS / "benchmark_accuracy.md": accuracy_page(read("benchmark_accuracy.json")),
        CARDS / "benchmark_coverage.md": coverage_page(read("benchmark_coverage.json")),
        CARDS / "benchmark_latency.md": latency_page(read("benchmark_latency.json")),
        CARDS / "benchmark_selectors.md": selectors_page(read("benchmark_selectors.json")),
        CARDS / "benchmark_training.md": report_of([CARDS / name for name in training_files()]),
    }


def results_page() -> str:
    """Return the page of all results."""
    sections = [
        accuracy.comparison,
        accuracy.digits_recipe,
        costs.speed,
        costs.selectors,
        costs.training,
        costs.coverage,
    ]
    return (
        "\n\n".join(["# Results", paragraph(INTRODUCTION), *(part for section in sections for part in section())])
        + "\n"
    )
