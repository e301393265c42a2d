"""What each part of UPDP is worth in the accuracy benchmark: one thing changed at a time, at one level."""

from dataclasses import replace
from typing import Any

from accuracy_nets import options
from accuracy_ways import AT_ONCE, LEVELS, Bench, Network
from torch import nn

from updp_hf import Plan, UPDPTrainer, UPDPTrainingArguments
from updp_hf.core.sites import DEFAULT_FORM, Form

__all__ = ["ABLATED", "ABLATION_SEEDS", "ablations_of", "plan_for"]

ABLATED = {"vit": 2, "convnext": 2, "mobilenetv2": 3}
"""The level of each family: a transformer and two convolutional nets, one of them with all of its sites closed."""
ABLATION_SEEDS = (0, 1)

ABLATIONS: dict[str, dict[str, Any]] = {
    "random blocks": {"selector": "random"},
    "last blocks": {"selector": "last"},
    "blocks of a supernet": {"selector": "supernet"},
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


def plan_for(
    changes: dict[str, Any], bench: Bench, network: Network, model: nn.Module, rate: float
) -> tuple[Plan, dict[str, Any]]:
    """Return the plan under `changes`, and those of them that are not about the plan."""
    selector = changes.get("selector", "greedy")
    if selector == "supernet":
        plan = _plan_of_supernet(bench, network, model, rate)
    else:
        plan = bench.plan(model, int(network.amount), changes.get("form", DEFAULT_FORM), selector)
    of_plan = {"start": UPDPTrainingArguments.start, **changes}
    plan = replace(plan, **{name: of_plan[name] for name in ("start", "end_activation") if name in of_plan})
    return plan, {name: value for name, value in changes.items() if name not in _OF_PLAN}


def _plan_of_supernet(bench: Bench, network: Network, model: nn.Module, rate: float) -> Plan:
    """Train a supernet as long as `supernet_fraction` says by default, and search it."""
    settings = options(bench.budget, bench.folder / "supernet", bench.budget.epochs, rate, bench.seed)
    asked = {"num_pruned_blocks": int(network.amount), "selector": "supernet"}
    args = UPDPTrainingArguments(**settings, **asked, calibration_size=bench.budget.calibration_images)
    return UPDPTrainer(model=model, args=args, train_dataset=bench.splits.train).select()
