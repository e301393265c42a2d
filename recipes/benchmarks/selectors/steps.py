"""The run of the benchmark of selectors, step by step."""

import random
import time
from collections.abc import Iterator
from typing import Any

from recipes.benchmarks.selectors.arguments import SelectorArguments
from recipes.benchmarks.selectors.bench import Bench, fine_tuned, held_out
from recipes.benchmarks.selectors.choosing import BLIND, FREE, choose, key
from recipes.benchmarks.selectors.networks import NETS
from recipes.benchmarks.selectors.tables import REPEATS
from updp_hf.core.plan.budget import Choice


def steps(bench: Bench, found: dict[str, Any], options: SelectorArguments) -> Iterator[None]:
    """Do what is missing in `found`, and yield after each step."""
    found["baseline"] = {**held_out(bench.model, bench.test), "sites": len(bench.sites)}
    generator = random.Random(bench.seed)
    sample: list[Choice] = []
    while len(sample) < NETS[bench.name].plans:
        plan = bench.demand.draw(generator)
        sample += [plan] if plan not in sample else []
    found["sample"] = [key(plan) for plan in sample]
    for name in (*FREE, *BLIND, *options.supernets):
        if name not in found["selectors"]:
            found["selectors"][name] = run = choose(name, bench, sample)
            say(bench, f"{name}: plan {run['choice']} in {run['seconds']:.1f} s, {run['images']} images")
            yield
    choices = [tuple(map(int, run["choice"].split())) for run in found["selectors"].values()]
    for count, plans in ((1, [*choices, *sample]), (REPEATS, [*choices, *sample[: options.repeated]])):
        for plan in plans:
            runs = found["plans"].setdefault(key(plan), [])
            while len(runs) < count:
                runs.append(fine_tuned(bench, plan, bench.seed + 1000 * len(runs)))
                say(bench, f"plan {key(plan)}: {runs[-1]}")
                yield


def say(bench: Bench, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {bench.name}, seed {bench.seed}, {text}", flush=True)
