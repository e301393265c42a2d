"""The records that runs left in `model_cards/`."""

import json
from pathlib import Path
from typing import Any

from recipes.benchmarks.accuracy.figures import Record, finished
from updp_hf.reporting.report import Report

__all__ = ["CARDS", "ROOT", "compared", "digits_reports", "read", "training_files"]

ROOT = Path(__file__).parents[3]
CARDS = ROOT / "model_cards"


def read(name: str) -> dict[str, Any]:
    """Return the JSON file `name` that a run left."""
    document: dict[str, Any] = json.loads((CARDS / name).read_text(encoding="utf-8"))
    return document


def compared(dataset: str) -> dict[str, list[Record]]:
    """Return what the benchmark of accuracy found on a dataset, by family."""
    return finished(read("benchmark_accuracy.json")[dataset])


def training_files() -> list[str]:
    """Return the files that the benchmark of training left, one for each device that it ran on."""
    return sorted(file.name for file in CARDS.glob("benchmark_training_*.json"))


def digits_reports() -> dict[str, Report]:
    """Return the reports of the digits recipe by model.

    Raises:
        ValueError: they cannot be compared.
    """
    folders = sorted(folder for folder in CARDS.glob("digits_*") if folder.is_dir())
    reports = {folder.name.removeprefix("digits_"): Report.load(folder) for folder in folders}
    if len({str([report.latency_conditions, report.versions, report.seed]) for report in reports.values()}) > 1:
        raise ValueError("The reports in `model_cards/` were measured under different conditions: measure them again.")
    return reports
