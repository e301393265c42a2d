"""What the Trainer's log tells of a pruning run."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerState

from updp_hf.reporting.report import device_name
from updp_hf.training.arguments import UPDPTrainingArguments

__all__ = ["OTHER_IMAGES", "evaluations", "metrics_before_and_after", "training_facts"]

Metrics = dict[str, Any]
OTHER_IMAGES = "other_images"
"""Marks the entry in the log of an evaluation on other images than the held-out ones."""


def evaluations(state: TrainerState, lambda_at: Callable[[int, int], float]) -> list[Metrics]:
    """Return what each evaluation gave, with its step and the λ of the network that was evaluated."""
    return [
        {
            "step": int(entry["step"]),
            "lambda": lambda_at(max(int(entry["step"]) - 1, 0), state.max_steps),
            **{name.removeprefix("eval_"): value for name, value in entry.items() if _is_metric(name)},
        }
        for entry in state.log_history
        if "eval_loss" in entry and OTHER_IMAGES not in entry
    ]


def _is_metric(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(("runtime", "per_second"))


def metrics_before_and_after(history: Sequence[Metrics], step: int) -> tuple[Metrics, Metrics]:
    """Return what the unpruned network reached, and the pruned one; nothing for what was not evaluated.

    Args:
        history: what `evaluations` returned.
        step: that of the weights that are kept.
    """
    before = [entry for entry in history if entry["step"] == 0 and entry["lambda"] == 0.0]
    after = [entry for entry in history if entry["step"] == step > 0 and entry["lambda"] == 1.0]
    return _metrics(before[:1]), _metrics(after[-1:])


def _metrics(entries: Sequence[Metrics]) -> Metrics:
    return {name: value for entry in entries for name, value in entry.items() if name not in ("step", "lambda")}


def training_facts(args: UPDPTrainingArguments, state: TrainerState, *, was_resumed: bool) -> dict[str, Any]:
    """Return the schedule of λ, how long training was and where it ran; no seconds if not all of them were counted."""
    seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    return {
        **{name: getattr(args, name) for name in ("ramp", "ramp_start", "ramp_end")},
        "steps": state.max_steps,
        "steps_done": state.global_step,
        "epochs": round(state.epoch or 0.0, 2),
        "processes": args.world_size,
        "device": device_name(args.device),
        "seconds": None if was_resumed or not seconds else seconds[-1],
    }
