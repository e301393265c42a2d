"""What each selector chooses, what that costs, and how it scores other plans."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from recipes.benchmarks.selectors.bench import Bench, arguments, held_out
from recipes.benchmarks.selectors.images import SAMPLE
from recipes.benchmarks.selectors.networks import NETS, SUPERNETS
from updp_hf import Plan, recalibrate_batch_norms_
from updp_hf.core.plan.budget import Choice
from updp_hf.core.search import search
from updp_hf.data.calibration_set import sample_and_rest
from updp_hf.processes import split_over_processes
from updp_hf.selection.score_history import ScoreHistory
from updp_hf.selection.scores import closeness, label_fit
from updp_hf.selection.selectors import least, selector_by_name, sensitivities, taylor_importances
from updp_hf.surgery.calibrate import calibrated_copy
from updp_hf.surgery.gate import close_only_
from updp_hf.training.supernet import train_supernet

FREE = ("taylor", "sensitivity, inherit", "sensitivity, fit", "divergence, inherit", "divergence, fit", "greedy")
BLIND = ("uniform", "last", "random")
"""Those that train nothing: of them, those that look at nothing. A divergence is that of whole plans."""


def choose(name: str, bench: Bench, sample: Sequence[Choice]) -> dict[str, Any]:
    """Return what the selector `name` chooses, what that costs, and its scores of the sample if it has any."""
    model, sites, images, demand = bench.model, bench.sites, bench.sample, bench.demand
    kind, _, start = name.partition(", ")
    history, harms = None, []
    begin = time.process_time()
    with counted(model) as forwards:
        if kind in ("supernet", "divergence"):
            net = supernet(bench, name) if kind == "supernet" else calibrated(bench, start)
            history = ScoreHistory(split_over_processes((label_fit if kind == "supernet" else closeness)(net, images)))
            choice = search(history, demand, seed=bench.seed)
        elif kind in ("taylor", "sensitivity"):
            harms = (
                sensitivities(model, sites, images, start=start) if start else taylor_importances(model, sites, images)
            )
            choice = least(harms)(demand)
        else:
            choice = selector_by_name(name, model, sites, images, seed=bench.seed)(demand)
    run = {"choice": key(choice), "images": sum(forwards), "seconds": time.process_time() - begin}
    if history is not None:
        run |= {"searched": len(history.scores), "scores": list(history(sample))}
    elif harms:
        run["scores"] = [-sum(harms[index] for index in plan) for plan in sample]
    if kind == "supernet":  # the same, scored by accuracy instead of by loss
        run["accuracies"] = []
        for plan in sample:
            close_only_(net, plan)
            recalibrate_batch_norms_(net, images)
            run["accuracies"].append(held_out(net, images)["accuracy"])
    return run


def key(plan: Choice) -> str:
    return " ".join(map(str, plan))


def calibrated(bench: Bench, start: str) -> nn.Module:
    """Return the baseline gated at all sites, whose pruned sides begin as `start` says."""
    return calibrated_copy(bench.model, Plan(bench.sites, start=start), bench.sample)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Count the images that go through `model` and its copies; with a backward pass, each counts as three."""
    found: list[int] = []

    def count(module: nn.Module, args: Any, kwargs: Mapping[str, Tensor]) -> None:
        found.append(len(kwargs["pixel_values"]) * (3 if torch.is_grad_enabled() else 1))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def supernet(bench: Bench, name: str) -> nn.Module:
    """Train a supernet on the images by which it is not scored."""
    _, rest = sample_and_rest(bench.train, SAMPLE, bench.seed)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(
            bench.name, bench.seed, folder, num_train_epochs=NETS[bench.name].baseline_epochs, **SUPERNETS[name]
        )
        plan = Plan(bench.sites, args.start)
        set_seed(bench.seed)
        return train_supernet(bench.model, plan, bench.sample, args, Path(folder), train_dataset=rest)
