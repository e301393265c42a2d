"""The sections on speed, on what pruning costs, on selectors, and on coverage."""

from recipes.benchmarks.coverage.row import Row
from recipes.benchmarks.coverage.tables import totals
from recipes.benchmarks.latency.tables import summary
from recipes.benchmarks.results.records import read, training_files
from recipes.benchmarks.selectors.tables import facts, finished, selectors_of, verdict
from recipes.benchmarks.text import paragraph, side_by_side
from recipes.benchmarks.training.tables import conditions_text, gated_text, loader_part, table

__all__ = ["coverage", "selectors", "speed", "training"]


def speed() -> list[str]:
    """Return how much faster merged networks of real size are."""
    results = read("benchmark_latency.json")
    arguments, versions = results["arguments"], results["versions"]
    text = f"""
        `python -m recipes.benchmarks.latency`: networks of timm at 224×224 with random weights, every site merged that
        saves compute, form `{arguments["form"]}`. {results["device"]}, {arguments["dtype"]}, {results["threads"]}
        threads, medians of {arguments["rounds"]} rounds in turn, torch {versions["torch"]}, timm {versions["timm"]}.
        What accuracy is left at that point is another question: nobody prunes every block. All levels, beside the
        roofline of this machine: [benchmark_latency.md](benchmark_latency.md)."""
    return ["## Speed at real size", paragraph(text), summary(results)]


def selectors() -> list[str]:
    """Return which selector chooses best."""
    results = read("benchmark_selectors.json")
    rows: dict[str, dict[str, str]] = {}
    for name, network in results["networks"].items():
        runs = finished(network)
        for selector in selectors_of(runs):
            found = dict(facts(selector, runs))
            row = rows.setdefault(selector, {})
            row |= {f"{name}, τ": found["τ, loss"].split(" ")[0], f"{name}, loss": found["loss of its plan"]}
            row[f"{name}, images"] = found["images"]
    everywhere = {selector: row for selector, row in rows.items() if len(row) == 3 * len(results["networks"])}
    text = f"""
        `python -m recipes.benchmarks.selectors --model MODEL`: small networks on digits that were made hard. τ is
        Kendall's rank correlation of a selector's scores of random plans with their held-out loss after fine-tuning;
        loss is that of the plan it chose; images is what choosing took, a backward counted twice. {verdict(results)}
        Hence the default. Conditions, spreads, ranks and the other supernets:
        [benchmark_selectors.md](benchmark_selectors.md)."""
    first = next(iter(everywhere.values()))
    columns = {fact: {selector: row[fact] for selector, row in everywhere.items()} for fact in first}
    return ["## Which selector chooses best", paragraph(text), side_by_side(columns)]


def training() -> list[str]:
    """Return what pruning adds to training, on every device that it was measured on."""
    return ["## What pruning costs while training", *(text for file in training_files() for text in _on_device(file))]


def _on_device(name: str) -> list[str]:
    results = read(name)
    text = f"""
        `python -m recipes.benchmarks.training`: networks of these shapes with random weights, steps of the Trainers
        themselves, the callback and the optimizer included. {conditions_text(results)}; ratios within each round. The
        teacher is the unpruned checkpoint, for a supernet its own open setting. More:
        [benchmark_training.md](benchmark_training.md)."""
    networks = [f"{gated_text(name, network)}\n\n{table(network)}" for name, network in results["networks"].items()]
    return [paragraph(text), *networks, *map(paragraph, loader_part(results))]


def coverage() -> list[str]:
    """Return in how many architectures sites are found, merged and loaded."""
    document = read("benchmark_coverage.json")
    versions = document["versions"]
    text = f"""
        `python -m recipes.benchmarks.coverage` tries one small model of each module of timm {versions["timm"]} and
        every image classifier of transformers {versions["transformers"]}: sites found, gated, closed, merged in float64
        and float32, saved, loaded; with updp-hf {versions["updp-hf"]}. What became of each, and why not:
        [benchmark_coverage.md](benchmark_coverage.md)."""
    return ["## Coverage", paragraph(text), totals([Row(**row) for row in document["rows"].values()])]
