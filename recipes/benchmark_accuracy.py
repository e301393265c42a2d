"""Does UPDP keep accuracy where simpler ways to the same latency lose it? Four families, three levels, three seeds.

    python recipes/benchmark_accuracy.py
    python recipes/benchmark_accuracy.py --families vit resnet --stages baselines
    python recipes/benchmark_accuracy.py --quick

Small networks on scikit-learn's digits, made hard, or on glyphs. Each baseline loses depth by UPDP as shipped, at three
levels; the rivals are brought to the same latency, measured here, and fine-tuned on the same images for as many steps,
with a learning rate chosen in the same way; networks from scratch keep the baseline's. What is done is kept in
`folder`, a file for each baseline: the same command goes on where it was interrupted, and several may run side by side
with other families or seeds. The stages `sizes` and `runtimes` measure latencies and want an idle machine. Tables and
pictures are made of what there is then: with `--output model_cards/benchmark_accuracy.json` those of the README.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accuracy_ablations import ABLATED, ABLATION_SEEDS, ablations_of, blocks_for, plan_for, pruning_of, speed_ups_of
from accuracy_figures import finished, gathered
from accuracy_images import DATASETS, Budget, Splits, load_images
from accuracy_matching import cost, networks_of
from accuracy_nets import FAMILIES
from accuracy_plot import plot
from accuracy_rates import HIGHEST, RATES, best_run, nearest
from accuracy_record import Record
from accuracy_tables import summary, write_tables
from accuracy_ways import ABRUPT, BASELINE, SMALLER, UPDP, Bench, Network
from benchmark_selectors import held_out
from conditions import conditions_of
from latency_modes import COMPILED, EAGER, ONNX, prepared
from transformers.utils import logging

from updp_hf.core.cost import measure_latency
from updp_hf.core.kinds import DEFAULT_FORM, Form
from updp_hf.recipe.command_line import parse_arguments
from updp_hf.surgery.model_io import example_inputs_of

STAGES = ("baselines", "blocks", "sizes", "rates", "train", "ablate", "runtimes")


@dataclass
class AccuracyArguments:
    """What is run of the benchmark."""

    dataset: str = field(default="digits", metadata={"help": "The images.", "choices": list(DATASETS)})
    families: list[str] = field(
        default_factory=lambda: list(FAMILIES), metadata={"help": "The networks.", "choices": list(FAMILIES)}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Of the baselines, one for each; learning rates are searched with 0, so that comes first."},
    )
    stages: list[str] = field(
        default_factory=lambda: list(STAGES), metadata={"help": "What to do of it.", "choices": list(STAGES)}
    )
    quick: bool = field(default=False, metadata={"help": "A few images and steps, to see that all of it works."})
    batch_size: int = field(default=64, metadata={"help": "Images in the forward of which the latency is measured."})
    rounds: int = field(default=15, metadata={"help": "Forwards that are measured of each network, in turn."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run: the Trainer's choice."}
    )
    folder: str = field(default="output/accuracy", metadata={"help": "Where all that was done is kept."})
    output: str | None = field(
        default=None, metadata={"help": "JSON file for all results, with tables and pictures beside it."}
    )

    def __post_init__(self) -> None:
        if self.quick:
            self.folder, self.rounds = f"{self.folder}-quick", 3

    @property
    def budget(self) -> Budget:
        if self.quick:
            return Budget(256, 256, baseline_scale=0.25, calibration_images=32)
        return Budget(baseline_scale=DATASETS[self.dataset])


def baselines(bench: Bench, record: Record, options: AccuracyArguments) -> None:
    """Train the baseline."""

    def step() -> dict[str, Any]:
        model = bench.baseline()
        return {f"test_{name}": value for name, value in held_out(model, bench.splits.test.batches()).items()}

    record.do("baseline", "trained", step)


def blocks(bench: Bench, record: Record, options: AccuracyArguments) -> None:
    """Put sites and blocks in the order in which they are pruned."""
    model = bench.baseline()
    for form in (DEFAULT_FORM, Form.MERGE, Form.BLOCK_DROP):
        record.do("blocks", form, lambda: bench.order(model, form))  # noqa: B023


def sizes(bench: Bench, record: Record, options: AccuracyArguments) -> None:
    """Choose what is as fast as UPDP's levels in the other ways, and measure all of it in turn."""

    def step() -> list[dict[str, Any]]:
        model = bench.baseline()
        networks = list(networks_of(bench, model, options.batch_size, options.rounds))
        # At once or annealed, what is left is one and the same network.
        built = {network.key: bench.build(network, model) for network in networks if network.way != ABRUPT}
        images = [example_inputs_of(model, options.batch_size)]
        medians = measure_latency({"baseline": model, **built}, images, rounds=options.rounds)
        entries = [{"way": BASELINE, "amount": 0, "level": 0, "seconds": medians["baseline"][0], **cost(model)}]
        for network in networks:
            same = replace(network, way=UPDP) if network.way == ABRUPT else network
            entries.append({**asdict(network), "seconds": medians[same.key][0], **cost(built[same.key])})
        return entries

    record.do("sizes", "networks", step)


def networks_in(record: Record) -> list[Network]:
    """Return the baseline and the networks that the stage `sizes` has chosen."""
    if "sizes" not in record.found:
        raise ValueError(f"{record.file} has no sizes yet: run the stage 'sizes' first.")
    return [Network.of(entry) for entry in record.found["sizes"]["networks"]]


def rates(bench: Bench, record: Record, options: AccuracyArguments) -> None:
    """Fine-tune every network of the first seed with several learning rates."""
    if bench.seed != 0:
        return
    model = bench.baseline()

    def run(network: Network, factor: float) -> None:
        rate = factor * FAMILIES[bench.family].learning_rate
        record.do("rates", f"{network.key}, {factor}", lambda: bench.run(network, model, rate))

    for network in networks_in(record):
        if network.way == SMALLER:
            continue
        for factor in RATES:
            run(network, factor)
        if best_run(network, record)["learning_rate"] >= max(RATES) * FAMILIES[bench.family].learning_rate:
            run(network, HIGHEST)


def train(bench: Bench, record: Record, options: AccuracyArguments) -> None:
    """Fine-tune every network, with the learning rate that was best for the one of the first seed next to it."""
    model = bench.baseline()
    file = record.file.with_name(record.file.name.replace(f"-{bench.seed}.json", "-0.json"))
    first = Record(file, record.found["conditions"])

    def step(network: Network) -> dict[str, Any]:
        if network.way == SMALLER:
            return bench.run(network, model, FAMILIES[bench.family].learning_rate)
        best = best_run(nearest(network, networks_in(first)), first)
        return best if bench.seed == 0 else bench.run(network, model, best["learning_rate"])

    for network in networks_in(record):
        record.do("runs", network.key, lambda: step(network))  # noqa: B023


def ablate(bench: Bench, record: Record, options: AccuracyArguments) -> None:
    """Prune with one option changed."""
    if bench.family not in ABLATED or bench.seed not in ABLATION_SEEDS:
        return
    model = bench.baseline()
    level = ABLATED[bench.family]
    network = next(network for network in networks_in(record) if (network.way, network.level) == (UPDP, level))
    runs = record.found.get("runs", {})
    if network.key not in runs:
        raise ValueError(f"{record.file} has no run of {network.key!r} yet: run the stage 'train' first.")
    rate = runs[network.key]["learning_rate"]

    def step(changes: dict[str, Any]) -> dict[str, Any]:
        blocks = blocks_for(changes, bench, network, model, rate)
        plan = plan_for(changes, blocks, model)
        return {**bench.run(network, model, rate, {"plan": plan, **pruning_of(changes)}), "blocks": blocks}

    for name, changes in ablations_of(level).items():
        record.do("ablations", name, lambda: step(changes))  # noqa: B023


def runtimes(bench: Bench, record: Record, options: AccuracyArguments) -> None:
    """Measure what was ablated, and the networks of the first seed in every runtime, all of them in turn."""
    if "ablations" not in record.found and bench.seed != 0:
        return
    model = bench.baseline()
    images = example_inputs_of(model, options.batch_size)
    if "ablations" in record.found:
        runs = record.found["ablations"]
        record.do("ablated", "speed-ups", lambda: speed_ups_of(runs, bench, model, images, options.rounds))
    if bench.seed != 0:
        return
    networks = {n.key: n for n in networks_in(record) if n.way not in (BASELINE, ABRUPT)}
    built = {"baseline": model, **{key: bench.build(network, model) for key, network in networks.items()}}

    def step(mode: str) -> dict[str, float]:
        models = {name: prepared(network, "contiguous", mode, images) for name, network in built.items()}
        medians = measure_latency(models, [images], rounds=options.rounds)
        return {name: median for name, (median,) in medians.items()}

    for mode in (EAGER, COMPILED, ONNX):
        record.do("runtimes", mode, lambda: step(mode))  # noqa: B023


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
    for stage in map(globals().__getitem__, options.stages):
        for bench, record in benches(options, splits):
            stage(bench, record, options)
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
