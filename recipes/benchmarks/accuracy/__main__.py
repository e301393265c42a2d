"""Does UPDP keep accuracy where simpler ways to the same latency lose it? Four families, three levels, three seeds.

    python -m recipes.benchmarks.accuracy
    python -m recipes.benchmarks.accuracy --families vit resnet --stages baselines
    python -m recipes.benchmarks.accuracy --quick

Small networks on scikit-learn's digits, made hard, or on glyphs. Each baseline loses depth by UPDP as shipped, at three
levels; the rivals are brought to the same latency, measured here, and fine-tuned on the same images for as many steps,
with a learning rate chosen in the same way; networks from scratch keep the baseline's. What is done is kept in
`folder`, a file for each baseline: the same command goes on where it was interrupted, and several may run side by side
with other families or seeds. The stages `sizes` and `runtimes` measure latencies and want an idle machine. Tables and
pictures are made of what there is then: with `--output model_cards/benchmark_accuracy.json` those of
the results.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
from transformers.utils import logging

from recipes.benchmarks.accuracy.arguments import AccuracyArguments
from recipes.benchmarks.accuracy.bench import Bench
from recipes.benchmarks.accuracy.figures import finished, gathered
from recipes.benchmarks.accuracy.images import Splits, load_images
from recipes.benchmarks.accuracy.nets import FAMILIES
from recipes.benchmarks.accuracy.plot import plot
from recipes.benchmarks.accuracy.record import Record
from recipes.benchmarks.accuracy.stages import STAGES, Timing
from recipes.benchmarks.accuracy.tables import summary, write_tables
from recipes.benchmarks.conditions import conditions_of
from updp_hf.recipe.command_line import parse_arguments


def benches(options: AccuracyArguments, splits: Mapping[str, Splits]) -> Iterator[tuple[Bench, Record]]:
    """Yield the baselines, seed by seed, with what is known of each."""
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = conditions_of(options)
    conditions = {**asdict(options.budget), "batch_size_of_latency": options.batch_size, "rounds": options.rounds}
    conditions |= {name: known[name] for name in ("device", "threads", "versions")}
    for seed in options.seeds:
        for family in options.families:
            name = f"{options.dataset}-{family}-{seed}"
            bench = Bench(family, seed, options.budget, splits[family], folder / name, options.device)
            yield bench, Record(folder / f"{name}.json", {**conditions, "network": FAMILIES[family]._asdict()})


def main() -> None:
    (options,) = parse_arguments(AccuracyArguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    splits = {
        family: load_images(options.dataset, FAMILIES[family].resolution, options.budget) for family in options.families
    }
    timing = Timing(options.batch_size, options.rounds)
    for stage in map(STAGES.__getitem__, options.stages):
        for bench, record in benches(options, splits):
            stage(bench, record, timing)
    results = gathered(Path(options.folder))
    for dataset, families in results.items():
        found = finished(families)
        print(f"\n{dataset}:\n{summary(found)}" if found else f"\n{dataset}: nothing is fine-tuned yet.")
    if options.output:
        output = Path(options.output)
        write_tables(results, output)
        plot(results, output.parent, output.stem)


if __name__ == "__main__":
    main()
