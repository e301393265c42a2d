"""The stages of the benchmark of accuracy: each does what is missing in the record of one baseline."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, NamedTuple, TypeAlias

from recipes.benchmarks.accuracy.ablations import (
    ABLATED,
    ABLATION_SEEDS,
    ablations_of,
    blocks_for,
    plan_for,
    pruning_of,
    speed_ups_of,
)
from recipes.benchmarks.accuracy.bench import Bench
from recipes.benchmarks.accuracy.matching import cost, networks_of
from recipes.benchmarks.accuracy.nets import FAMILIES
from recipes.benchmarks.accuracy.rates import HIGHEST, RATES, best_run, nearest
from recipes.benchmarks.accuracy.record import Record
from recipes.benchmarks.accuracy.ways import ABRUPT, BASELINE, SMALLER, UPDP, Network
from recipes.benchmarks.latency.modes import COMPILED, EAGER, ONNX, prepared
from recipes.benchmarks.selectors.bench import held_out
from updp_hf.core.cost import measure_latency
from updp_hf.core.kinds import DEFAULT_FORM, Form
from updp_hf.surgery.model_io import example_inputs_of


class Timing(NamedTuple):
    """How latencies are measured."""

    batch_size: int
    rounds: int


def baselines(bench: Bench, record: Record, timing: Timing) -> None:
    """Train the baseline."""

    def step() -> dict[str, Any]:
        model = bench.baseline()
        return {f"test_{name}": value for name, value in held_out(model, bench.splits.test.batches()).items()}

    record.do("baseline", "trained", step)


def blocks(bench: Bench, record: Record, timing: Timing) -> None:
    """Put sites and blocks in the order in which they are pruned."""
    model = bench.baseline()
    for form in (DEFAULT_FORM, Form.MERGE, Form.BLOCK_DROP):
        record.do("blocks", form, lambda: bench.order(model, form))  # noqa: B023


def sizes(bench: Bench, record: Record, timing: Timing) -> None:
    """Choose what is as fast as UPDP's levels in the other ways, and measure all of it in turn."""

    def step() -> list[dict[str, Any]]:
        model = bench.baseline()
        networks = list(networks_of(bench, model, timing.batch_size, timing.rounds))
        # At once or annealed, what is left is one and the same network.
        built = {network.key: bench.build(network, model) for network in networks if network.way != ABRUPT}
        images = [example_inputs_of(model, timing.batch_size)]
        medians = measure_latency({"baseline": model, **built}, images, rounds=timing.rounds)
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


def rates(bench: Bench, record: Record, timing: Timing) -> None:
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


def train(bench: Bench, record: Record, timing: Timing) -> None:
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


def ablate(bench: Bench, record: Record, timing: Timing) -> None:
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


def runtimes(bench: Bench, record: Record, timing: Timing) -> None:
    """Measure what was ablated, and the networks of the first seed in every runtime, all of them in turn."""
    if "ablations" not in record.found and bench.seed != 0:
        return
    model = bench.baseline()
    images = example_inputs_of(model, timing.batch_size)
    if "ablations" in record.found:
        runs = record.found["ablations"]
        record.do("ablated", "speed-ups", lambda: speed_ups_of(runs, bench, model, images, timing.rounds))
    if bench.seed != 0:
        return
    networks = {n.key: n for n in networks_in(record) if n.way not in (BASELINE, ABRUPT)}
    built = {"baseline": model, **{key: bench.build(network, model) for key, network in networks.items()}}

    def step(mode: str) -> dict[str, float]:
        models = {name: prepared(network, "contiguous", mode, images) for name, network in built.items()}
        medians = measure_latency(models, [images], rounds=timing.rounds)
        return {name: median for name, (median,) in medians.items()}

    for mode in (EAGER, COMPILED, ONNX):
        record.do("runtimes", mode, lambda: step(mode))  # noqa: B023


Stage: TypeAlias = Callable[[Bench, Record, Timing], None]

STAGES: dict[str, Stage] = {
    stage.__name__: stage for stage in (baselines, blocks, sizes, rates, train, ablate, runtimes)
}
"""In the order in which they are run."""
