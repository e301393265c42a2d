"""Write the measured tables of the README from the files that runs left in `model_cards/`."""

import json
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path

from benchmark_gates import table as gates_table

from updp_hf.report import Report, side_by_side

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"

ROWS: list[tuple[str, str, Callable[[Report], float]]] = [
    ("accuracy, baseline", "{:.2%}", lambda report: report.metrics_before["accuracy"]),
    ("accuracy, pruned with UPDP", "{:.2%}", lambda report: report.metrics_after["accuracy"]),
    ("accuracy, pruned without training", "{:.2%}", lambda report: report.metrics_without_training["accuracy"]),
    ("parameters, pruned / baseline", "{:.2f}", lambda report: report.after.parameters / report.before.parameters),
    ("MACs, pruned / baseline", "{:.2f}", lambda report: report.after.macs / report.before.macs),
    ("speed-up, batch 1", "{:.2f}×", lambda report: speed_up(report, "1")),
    ("speed-up, batch 256", "{:.2f}×", lambda report: speed_up(report, "256")),
    ("merge error, relative", "{:.0e}", lambda report: report.merge_error),
]


def speed_up(report: Report, batch_size: str) -> float:
    return report.before.latency[batch_size] / report.after.latency[batch_size]


def digits_table(reports: list[Report]) -> str:
    """Return one column for each run of the digits recipe, and their mean."""
    values = {f"seed {report.seed}": [fact(report) for _, _, fact in ROWS] for report in reports}
    values["mean"] = [statistics.fmean(column) for column in zip(*values.values(), strict=True)]
    return side_by_side(
        {
            name: {row: form.format(value) for (row, form, _), value in zip(ROWS, column, strict=True)}
            for name, column in values.items()
        }
    )


def measured_section() -> str:
    """Return what stands between the marks of the README."""
    files = sorted((ROOT / "model_cards" / "digits_vit").glob("seed-*.json"))
    reports = [Report.from_dict(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    gates = json.loads((ROOT / "model_cards" / "benchmark_gates.json").read_text(encoding="utf-8"))
    first = reports[0]
    conditions, arguments = first.latency_conditions, gates["arguments"]
    digits = f"""
        **Digits**: `accelerate launch recipes/digits.py --seed N`, a ViT of 8 blocks of which
        {len(first.plan["sites"])} FFNs are closed. Accuracy on 450 held-out images. Latency: {conditions["statistic"]};
        {conditions["device"]}, {conditions["dtype"]}, {conditions["mode"]}, {conditions["threads"]} thread,
        torch {first.versions["torch"]}, transformers {first.versions["transformers"]}. A small network on small images:
        it shows that the whole way works, and promises nothing for yours."""
    training = f"""
        **What gates cost while training**: `python recipes/benchmark_gates.py`, a DeiT-S-shaped network with all its
        FFNs gated. {gates["device"]}, {"bfloat16 autocast" if arguments["bf16"] else "float32"}, {gates["threads"]}
        threads, batch {arguments["batch_size"]}, {arguments["image_size"]} pixels; medians of {arguments["rounds"]}
        steps in turn, ratios within each turn. At λ = 0.5 both sides of each gate are computed, at λ = 1 the pruned
        one. Memory is the peak of a process of its own for each, Python and libraries included."""
    parts = [paragraph(digits), digits_table(reports), paragraph(training), gates_table(gates)]
    return "\n" + "\n\n".join(parts) + "\n\n"


def paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), width=120, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(before + BEGIN + measured_section() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
