"""Which selector chooses the best blocks, and what it costs: its scores beside what fine-tuning really gives.

    python -m recipes.benchmarks.selectors --model vit

A network trained from scratch on digits, made hard by distortions and noise, loses K of its blocks. Each selector
chooses K sites, and scores a random sample of such plans if it has a score for plans. The sample and the choices are
fine-tuned with `UPDPTrainer`, which tells what the scores are worth. Results are written as they come; the same command
goes on where it was interrupted. The table of all networks is written beside them. More supernets
for one of the baselines:

    python -m recipes.benchmarks.selectors --model vit --seeds 0 --supernets "supernet, distilled" "supernet, short"
"""

import json
from pathlib import Path

import torch
from transformers.utils import logging

from recipes.benchmarks.selectors.arguments import SelectorArguments, conditions
from recipes.benchmarks.selectors.bench import Bench
from recipes.benchmarks.selectors.steps import steps
from recipes.benchmarks.selectors.tables import page, table
from updp_hf.recipe.command_line import parse_arguments


def main() -> None:
    (options,) = parse_arguments(SelectorArguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    output = Path(options.output)
    results = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {"networks": {}}
    network = results["networks"].setdefault(options.model, {"conditions": conditions(options), "seeds": {}})
    if network["conditions"] != conditions(options):
        raise ValueError(
            f"{output} has results of {network['conditions']}, expected {conditions(options)}: give another file."
        )
    for seed in options.seeds:
        bench = Bench.of(options.model, seed, Path(options.folder) / options.model / f"seed-{seed}")
        found = network["seeds"].setdefault(str(seed), {"selectors": {}, "plans": {}})
        for _ in steps(bench, found, options):
            output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))
    output.with_suffix(".md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
