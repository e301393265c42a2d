"""What each part of UPDP is worth in the accuracy benchmark: one thing changed at a time, at one level."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from recipes.benchmarks.accuracy.bench import Bench
from recipes.benchmarks.accuracy.ways import AT_ONCE, LEVELS, Network
from recipes.benchmarks.latency.networks import merged
from updp_hf import Plan, UPDPTrainer, UPDPTrainingArguments
from updp_hf.core.cost import measure_latency
from updp_hf.core.kinds import DEFAULT_FORM, Form
from updp_hf.selection.supernet import SUPERNET
from updp_hf.surgery.find import require_sites

__all__ = ["ABLATED", "ABLATION_SEEDS", "ablations_of", "blocks_for", "plan_for", "pruning_of", "speed_ups_of"]

ABLATED = {"vit": 2, "convnext": 2, "mobilenetv2": 3}
"""The level of each family: a transformer and two convolutional nets, one of them with all of its sites closed."""
ABLATION_SEEDS = (0, 1)

ABLATIONS: dict[str, dict[str, Any]] = {
    "random blocks": {"selector": "random"},
    "last blocks": {"selector": "last"},
    "blocks of a supernet": {"selector": SUPERNET},
    "soft distillation": {"distillation": "soft"},
    "hard distillation": {"distillation": "hard"},
    "norms to BatchNorms": {"form": Form.MERGE},
    "checkpoint's weights": {"start": "inherit"},
    "all at once": AT_ONCE,
    "ramp over 25 %": {"ramp_end": 0.25},
    "ramp over 50 %": {"ramp_end": 0.5},
    "cosine ramp over 50 %": {"ramp": "cosine", "ramp_end": 0.5},
    "end activation": {"end_activation": "relu"},
    "end activation, checkpoint's weights": {"end_activation": "relu", "start": "inherit"},
}
"""Options of `UPDPTrainingArguments` that are others than in UPDP as shipped."""
_OF_PLAN = ("selector", "form", "start", "end_activation")


def ablations_of(level: int) -> dict[str, dict[str, Any]]:
    """Return what is changed at this level: where all sites are closed, there is nothing to choose."""
    return {name: changes for name, changes in ABLATIONS.items() if level < LEVELS or "selector" not in changes}


def blocks_for(changes: Mapping[str, Any], bench: Bench, network: Network, model: nn.Module, rate: float) -> list[str]:
    """Return the blocks that are chosen under `changes`."""
    selector = changes.get("selector", "greedy")
    if selector == SUPERNET:
        return _plan_of_supernet(bench, network, model, rate).blocks
    return bench.plan(model, int(network.amount), changes.get("form", DEFAULT_FORM), selector).blocks


def plan_for(changes: Mapping[str, Any], blocks: Sequence[str], model: nn.Module) -> Plan:
    """Return the plan that closes what there is to close in `blocks` under `changes`."""
    sites = require_sites(model, changes.get("form", DEFAULT_FORM))
    start = changes.get("start", UPDPTrainingArguments.start)
    chosen = tuple(site for site in sites if site.block in blocks)
    return Plan(chosen, start=start, end_activation=changes.get("end_activation"))


def pruning_of(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `changes` that are not about the plan."""
    return {name: value for name, value in changes.items() if name not in _OF_PLAN}


def speed_ups_of(
    runs: Mapping[str, Any], bench: Bench, model: nn.Module, images: Mapping[str, Tensor], rounds: int
) -> dict[str, float]:
    """Return how many times as fast as `model` what each of `runs` has pruned is, all of it measured in turn."""
    changes = ablations_of(ABLATED[bench.family])
    plans = {name: plan_for(changes[name], run["blocks"], model) for name, run in runs.items()}
    built = {"": model, **{name: merged(model, plan, bench.sample()) for name, plan in plans.items()}}
    medians = {name: median for name, (median,) in measure_latency(built, [images], rounds=rounds).items()}
    return {name: medians[""] / medians[name] for name in plans}


def _plan_of_supernet(bench: Bench, network: Network, model: nn.Module, rate: float) -> Plan:
    """Train a supernet as long as `supernet_fraction` says by default, and search it."""
    settings = bench.settings("supernet", bench.budget.epochs, rate)
    asked = {"num_pruned_blocks": int(network.amount), "selector": SUPERNET}
    args = UPDPTrainingArguments(**settings, **asked, calibration_size=bench.budget.calibration_images)
    return UPDPTrainer(model=model, args=args, train_dataset=bench.splits.train).select()
