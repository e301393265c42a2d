"""What each part of UPDP is worth in the accuracy benchmark: one thing changed at a time, at the middle level."""

from dataclasses import replace
from typing import Any

from accuracy_nets import options
from accuracy_ways import AT_ONCE, Bench, Network
from torch import nn

from updp_hf import Plan, UPDPTrainer, UPDPTrainingArguments

__all__ = ["ABLATED", "ABLATIONS", "ABLATION_SEEDS", "LEVEL", "plan_for"]

ABLATED, ABLATION_SEEDS, LEVEL = ("vit", "convnext"), (0, 1), 2
"""One transformer, one convolutional net."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "random blocks": {"selector": "random"},
    "last blocks": {"selector": "last"},
    "blocks of a supernet": {"selector": "supernet"},
    "soft distillation": {"distillation": "soft"},
    "hard distillation": {"distillation": "hard"},
    "closed-form start": {"start": "fit"},
    "closed-form start, at once": {"start": "fit", **AT_ONCE},
    "cosine ramp": {"ramp": "cosine"},
    "ramp over 25 %": {"ramp_end": 0.25},
    "ramp over 75 %": {"ramp_end": 0.75},
    "end activation": {"end_activation": "gelu"},
}
"""Options of `UPDPTrainingArguments` that are others than in UPDP as shipped."""
_OF_PLAN = ("selector", "start", "end_activation")


def plan_for(
    changes: dict[str, Any], bench: Bench, network: Network, model: nn.Module, rate: float
) -> tuple[Plan, dict[str, Any]]:
    """Return the plan under `changes`, and those of them that are not about the plan."""
    selector = changes.get("selector", "greedy")
    if selector == "supernet":
        plan = _plan_of_supernet(bench, network, model, rate)
    else:
        plan = bench.plan_of(replace(network, blocks=selector), model)
    plan = replace(plan, **{name: changes[name] for name in ("start", "end_activation") if name in changes})
    return plan, {name: value for name, value in changes.items() if name not in _OF_PLAN}


def _plan_of_supernet(bench: Bench, network: Network, model: nn.Module, rate: float) -> Plan:
    """Train a supernet as long as `supernet_fraction` says by default, and search it."""
    settings = options(bench.budget, bench.folder / "supernet", bench.budget.epochs, rate, bench.seed)
    asked = {"num_pruned_blocks": int(network.amount), "selector": "supernet"}
    args = UPDPTrainingArguments(**settings, **asked, calibration_size=bench.budget.calibration_images)
    return UPDPTrainer(model=model, args=args, train_dataset=bench.splits.train).select()
