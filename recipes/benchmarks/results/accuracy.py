"""The section on accuracy: the comparison with what one would do instead, and the digits recipe."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recipes.benchmarks.accuracy.figures import Record, missing
from recipes.benchmarks.accuracy.images import DIGITS_COPIES
from recipes.benchmarks.accuracy.tables import NAMES, summary
from recipes.benchmarks.accuracy.ways import ABRUPT, PAPER, SMALLER
from recipes.benchmarks.results.records import compared, digits_reports, read
from recipes.benchmarks.text import paragraph, side_by_side
from updp_hf import UPDPTrainingArguments
from updp_hf.reporting.report import Report

__all__ = ["comparison", "conditions_of", "digits_recipe"]

KINDS = {
    "digits": f"noisy images of scikit-learn's digits, each distorted {DIGITS_COPIES} times",
    "glyphs": "distorted characters in many fonts; the held-out ones are in other fonts",
}
"""What the images of the accuracy benchmark are."""

ROWS: list[tuple[str, Callable[[Report], str]]] = [
    ("blocks pruned", lambda report: str(len(report.plan["sites"]))),
    ("accuracy, baseline", lambda report: f"{report.metrics_before['accuracy']:.1%}"),
    ("accuracy, pruned and fine-tuned", lambda report: f"{report.metrics_after['accuracy']:.1%}"),
    ("accuracy, pruned without training", lambda report: f"{report.metrics_without_training['accuracy']:.1%}"),
    ("parameters, pruned / baseline", lambda report: f"{report.after.parameters / report.before.parameters:.2f}"),
    ("MACs, pruned / baseline", lambda report: f"{report.after.macs / report.before.macs:.2f}"),
    ("speed-up, batch 1", lambda report: _speed_up(report, "1")),
    ("speed-up, batch 256", lambda report: _speed_up(report, "256")),
    ("merge error, relative", lambda report: f"{report.merge_error:.0e}"),
]


def _speed_up(report: Report, batch_size: str) -> str:
    return f"{report.before.latency[batch_size] / report.after.latency[batch_size]:.2f}×"


def comparison() -> list[str]:
    """Return the tables of the benchmark of accuracy, one for each dataset, with their conditions."""
    records = read("benchmark_accuracy.json")
    known = conditions_of(compared(next(iter(records))))
    text = f"""
        `python -m recipes.benchmarks.accuracy`: *updp_hf (default)* closes a third of the sites, two thirds, and all of
        them. Every other way is brought to the same latency, measured: {known["device"]}, float32, eager,
        {known["threads"]} thread, batch {known["batch_size_of_latency"]}, torch {known["versions"]["torch"]}. All are
        fine-tuned for as many steps, with the best of several learning rates. *{NAMES[PAPER]}* is the nearest that this
        package comes to the paper: the checkpoint's weights, norms that become BatchNorms, a ramp over half of the
        training; its blocks are chosen as ours, and no activation follows them. *{NAMES[ABRUPT]}* removes all
        non-linearities before training and keeps the checkpoint's weights. *{NAMES[SMALLER]}* trains as long as
        baseline and fine-tuning together, with the baseline's learning rate. The defaults of updp_hf were chosen on the
        digits."""
    means = """
        Accuracy on held-out images, mean over the levels, ± standard deviation over the baselines, each of another
        seed. – is a level that is not reached in that time; (1 of 2) counts the baselines that reach all levels. Ahead
        are points of accuracy over the levels that both reach, ± in the last column over the families. Every level,
        what it costs, and what each part is worth: [benchmark_accuracy.md](benchmark_accuracy.md)."""
    parts = ["## Accuracy at equal latency", paragraph(text), paragraph(means)]
    for dataset in records:
        parts += _of_dataset(dataset, compared(dataset), missing(records[dataset]))
    return parts


def _of_dataset(dataset: str, found: Mapping[str, Sequence[Record]], lacking: Sequence[str]) -> list[str]:
    known = conditions_of(found)
    text = f"""
        **{dataset.capitalize()}** (`--dataset {dataset}`): {known["train_images"]:,} {KINDS[dataset]},
        {known["test_images"]:,} held out; epochs of fine-tuning: {known["epochs"]:g}.
        {f"Not run: {', '.join(lacking)}." if lacking else ""}"""
    return [
        paragraph(text),
        summary(found),
        f"![Accuracy against speed-up, {dataset}](benchmark_accuracy_{dataset}.png)",
    ]


def conditions_of(families: Mapping[str, Sequence[Record]]) -> Mapping[str, Any]:
    """Return under what conditions the baselines of a dataset were compared, the same for all."""
    first: Mapping[str, Any] = next(iter(families.values()))[0]["conditions"]
    return first


def digits_recipe() -> list[str]:
    """Return what the digits recipe made of each of its networks."""
    reports = digits_reports()
    first = next(iter(reports.values()))
    conditions, plan = first.latency_conditions, first.plan
    options = {"form": plan["sites"][0]["form"], "start": plan["start"], "ramp_end": first.training.ramp_end}
    asked = "".join(f" --{k} {v}" for k, v in options.items() if v != getattr(UPDPTrainingArguments, k))
    cards = ", ".join(f"[{name}](digits_{name}/README.md)" for name in reports)
    text = f"""
        `accelerate launch recipes/digits.py --model MODEL{asked}`: small networks trained from scratch, half of their
        blocks pruned. One run each, seed {first.seed}. Accuracy on {first.evaluated_on.images} held-out images.
        Latency: {conditions.statistic}; {conditions.device}, {conditions.dtype}, {conditions.mode},
        {conditions.threads} thread, torch {first.versions["torch"]}, transformers {first.versions["transformers"]}.
        The images are small and easy: it shows that the whole way works, and promises nothing for yours. Their cards:
        {cards}."""
    table = {name: {row: fact(report) for row, fact in ROWS} for name, report in reports.items()}
    return ["## The whole way, on digits", paragraph(text), side_by_side(table)]
