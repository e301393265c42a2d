"""Write the measured tables of the README from the files that runs left in `model_cards/`."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accuracy_figures import Record, missing
from accuracy_figures import finished as fine_tuned
from accuracy_images import DIGITS_COPIES
from accuracy_plot import plot
from accuracy_tables import summary as accuracies
from benchmark_coverage import Row, totals
from benchmark_latency import summary
from selectors_table import facts as facts_of_selector
from selectors_table import finished, paragraph, selectors_of, verdict
from training_tables import conditions_text, gated_text, loader_part, table

from updp_hf import UPDPTrainingArguments
from updp_hf.reporting.report import Report, side_by_side

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "model_cards"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"

KINDS = {
    "digits": f"noisy images of scikit-learn's digits, each distorted {DIGITS_COPIES} times",
    "glyphs": "distorted characters in many fonts, others in those held out",
}
"""What the images of the accuracy benchmark are."""

ROWS: list[tuple[str, Callable[[Report], str]]] = [
    ("blocks pruned", lambda report: str(len(report.plan["sites"]))),
    ("accuracy, baseline", lambda report: f"{report.metrics_before['accuracy']:.1%}"),
    ("accuracy, pruned with UPDP", lambda report: f"{report.metrics_after['accuracy']:.1%}"),
    ("accuracy, pruned without training", lambda report: f"{report.metrics_without_training['accuracy']:.1%}"),
    ("parameters, pruned / baseline", lambda report: f"{report.after.parameters / report.before.parameters:.2f}"),
    ("MACs, pruned / baseline", lambda report: f"{report.after.macs / report.before.macs:.2f}"),
    ("speed-up, batch 1", lambda report: speed_up(report, "1")),
    ("speed-up, batch 256", lambda report: speed_up(report, "256")),
    ("merge error, relative", lambda report: f"{report.merge_error:.0e}"),
]


def speed_up(report: Report, batch_size: str) -> str:
    return f"{report.before.latency[batch_size] / report.after.latency[batch_size]:.2f}×"


def digits_reports() -> dict[str, Report]:
    """Return the reports of the digits recipe by model."""
    folders = sorted(folder for folder in CARDS.glob("digits_*") if folder.is_dir())
    reports = {folder.name.removeprefix("digits_"): Report.load(folder) for folder in folders}
    if len({str([report.latency_conditions, report.versions, report.seed]) for report in reports.values()}) > 1:
        raise ValueError("The reports in `model_cards/` were measured under different conditions: measure them again.")
    return reports


def measured_section() -> str:
    """Return what stands between the marks of the README."""
    return (
        "\n"
        + "\n\n".join(
            [
                *accuracy_part(),
                *digits_part(),
                *selectors_part(),
                *latency_part(),
                *(text for file in training_files() for text in training_part(file)),
                *coverage_part(),
            ]
        )
        + "\n\n"
    )


def accuracy_part() -> list[str]:
    records = read("benchmark_accuracy.json")
    results = {dataset: fine_tuned(families) for dataset, families in records.items()}
    known = conditions_of(next(iter(results.values())))
    text = f"""
        **Is it better than what you would do instead?** `python recipes/benchmark_accuracy.py`: UPDP with its defaults
        at three levels, a third of the sites, two thirds, all, and other ways to the same latency, measured:
        {known["device"]}, float32, eager, {known["threads"]} thread, batch {known["batch_size_of_latency"]}, torch
        {known["versions"]["torch"]}. All are fine-tuned for as many steps, with the best of several learning rates.
        Closest to the paper is UPDP with the checkpoint's weights, norms that become BatchNorms and a ramp over half of
        the training, its blocks chosen as ours; at once are all non-linearities removed before training, the
        checkpoint's weights kept; narrower networks are trained as long as baseline and fine-tuning together, with the
        baseline's learning rate. The defaults were chosen on the digits, by what each part is worth there."""
    means = """
        Accuracy on held-out images, mean over the levels, ± standard deviation over the baselines, each of another
        seed; – is a level that is not reached in that time, (1 of 2) are the baselines that reach all levels. Ahead are
        points of accuracy, over the levels that both reach, ± in the last column over the families. Every level, what
        it costs, and what each part of UPDP is worth are in
        [model_cards/benchmark_accuracy.md](model_cards/benchmark_accuracy.md)."""
    parts = [paragraph(text), paragraph(means)]
    for dataset, found in results.items():
        known = conditions_of(found)
        lacking = ", ".join(missing(records[dataset]))
        text = f"""
            **{dataset.capitalize()}** (`--dataset {dataset}`): {known["train_images"]:,} {KINDS[dataset]},
            {known["test_images"]:,} held out; epochs of fine-tuning: {known["epochs"]:g}.
            {f"Not run: {lacking}." if lacking else ""}"""
        picture = f"![Accuracy against speed-up, {dataset}](model_cards/benchmark_accuracy_{dataset}.png)"
        parts += [paragraph(text), accuracies(found), picture]
    return parts


def conditions_of(families: Mapping[str, Sequence[Record]]) -> Mapping[str, Any]:
    """Return under what conditions the baselines of a dataset were compared, the same for all."""
    first: Mapping[str, Any] = next(iter(families.values()))[0]["conditions"]
    return first


def digits_part() -> list[str]:
    reports = digits_reports()
    first = next(iter(reports.values()))
    conditions, plan = first.latency_conditions, first.plan
    options = {"form": plan["sites"][0]["form"], "start": plan["start"], "ramp_end": first.training["ramp_end"]}
    asked = "".join(f" --{k} {v}" for k, v in options.items() if v != getattr(UPDPTrainingArguments, k))
    cards = ", ".join(f"[{name}](model_cards/digits_{name}/README.md)" for name in reports)
    text = f"""
        **The whole way, on digits**: `accelerate launch recipes/digits.py --model MODEL{asked}`, small networks trained
        from scratch, half of their blocks pruned. One run each, seed {first.seed}. Accuracy on
        {first.evaluated_on["images"]} held-out images. Latency:
        {conditions["statistic"]}; {conditions["device"]}, {conditions["dtype"]}, {conditions["mode"]},
        {conditions["threads"]} thread, torch {first.versions["torch"]}, transformers {first.versions["transformers"]}.
        Small images: it shows that the whole way works, and promises nothing for
        yours. Their cards: {cards}."""
    table = {name: {row: fact(report) for row, fact in ROWS} for name, report in reports.items()}
    return [paragraph(text), side_by_side(table)]


def selectors_part() -> list[str]:
    results = read("benchmark_selectors.json")
    rows: dict[str, dict[str, str]] = {}
    for name, network in results["networks"].items():
        runs = finished(network)
        for selector in selectors_of(runs):
            found = dict(facts_of_selector(selector, runs))
            row = rows.setdefault(selector, {})
            row |= {f"{name}, τ": found["τ, loss"].split(" ")[0], f"{name}, loss": found["loss of its plan"]}
            row[f"{name}, images"] = found["images"]
    everywhere = {selector: row for selector, row in rows.items() if len(row) == 3 * len(results["networks"])}
    text = f"""
        **Which selector chooses best**: `python recipes/benchmark_selectors.py --model MODEL`, small networks on digits
        that were made hard. τ is Kendall's rank correlation of a selector's score of random plans with their held-out
        loss after fine-tuning, loss is that of the plan it chose, images is what choosing took, a backward counted
        twice. {verdict(results)} Hence the default. Conditions, spreads, ranks and the other supernets are in
        [recipes/benchmark_selectors.md](recipes/benchmark_selectors.md)."""
    first = next(iter(everywhere.values()))
    columns = {fact: {selector: row[fact] for selector, row in everywhere.items()} for fact in first}
    return [paragraph(text), side_by_side(columns)]


def latency_part() -> list[str]:
    results = read("benchmark_latency.json")
    arguments, versions = results["arguments"], results["versions"]
    text = f"""
        **Speed at real size**: `python recipes/benchmark_latency.py`, networks of timm at 224×224 with random weights,
        every site merged that pays, form `{arguments["form"]}`.
        {results["device"]}, {arguments["dtype"]}, {results["threads"]} threads, medians of
        {arguments["rounds"]} rounds in turn, torch {versions["torch"]}, timm {versions["timm"]}. What accuracy is left
        at that point is another question: nobody prunes every block. All levels, beside the roofline of this machine,
        are in [recipes/benchmark_latency.md](recipes/benchmark_latency.md)."""
    return [paragraph(text), summary(results)]


def training_files() -> list[str]:
    """Return the files that `benchmark_training.py` left, one for each device that it ran on."""
    return sorted(file.name for file in CARDS.glob("benchmark_training_*.json"))


def training_part(name: str) -> list[str]:
    results = read(name)
    text = f"""
        **What pruning costs while training**: `python recipes/benchmark_training.py`, networks of these shapes with
        random weights, steps of the Trainers themselves, the callback and the optimizer included.
        {conditions_text(results)}; ratios within each round. The teacher is the unpruned checkpoint, for a supernet its
        own open setting. More is in [recipes/benchmark_training.md](recipes/benchmark_training.md)."""
    networks = [f"{gated_text(name, network)}\n\n{table(network)}" for name, network in results["networks"].items()]
    return [paragraph(text), *networks, *map(paragraph, loader_part(results))]


def coverage_part() -> list[str]:
    document = read("benchmark_coverage.json")
    versions = document["versions"]
    text = f"""
        `python recipes/benchmark_coverage.py` tries one small model of each module of timm {versions["timm"]} and every
        image classifier of transformers {versions["transformers"]}: sites found, gated, closed, merged in float64 and
        float32, saved, loaded. What became of each, and why not, is in
        [recipes/benchmark_coverage.md](recipes/benchmark_coverage.md)."""
    return ["### Coverage", paragraph(text), totals([Row(**row) for row in document["rows"].values()])]


def read(name: str) -> dict[str, Any]:
    """Return the JSON file `name` that a run left."""
    document: dict[str, Any] = json.loads((CARDS / name).read_text(encoding="utf-8"))
    return document


def main() -> None:
    plot(read("benchmark_accuracy.json"), CARDS, "benchmark_accuracy")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(before + BEGIN + measured_section() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
