"""What a recipe prints: a few lines of progress, one table, its conditions as a sentence."""

import time
from collections.abc import Mapping
from typing import Any

import datasets
import transformers.trainer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from updp_hf.reporting.report import Cost, LatencyConditions
from updp_hf.reporting.tables import numbers, side_by_side, speed_ups

__all__ = ["ProgressLines", "conditions_sentence", "table_of", "tell_progress_in_lines"]


def tell_progress_in_lines() -> None:
    """Let every Trainer of this process print lines instead of bars, and the libraries print no bars.

    A supernet is trained by a Trainer that no recipe gets hold of, so the default is what has to change.
    `--disable_tqdm true` gives transformers' own dictionaries, which scripts can read.
    """
    transformers.trainer.DEFAULT_PROGRESS_CALLBACK = ProgressLines
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


class ProgressLines(TrainerCallback):
    """Print one line whenever something is logged: how far training is, and how well it goes."""

    def __init__(self) -> None:
        self._begin = 0.0
        self._first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin, self._first = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        facts = facts_of(logs or {})
        if facts and state.is_world_process_zero and state.max_steps:  # else no training, only an evaluation
            kind = "supernet, " if "loss_open" in (logs or {}) else ""
            step = str(state.global_step).rjust(len(str(state.max_steps)))
            text = ", ".join([*facts, *self._time_left(state)])
            print(f"   {kind}step {step} of {state.max_steps}: {text}", flush=True)

    def _time_left(self, state: TrainerState) -> list[str]:
        done, left = state.global_step - self._first, state.max_steps - state.global_step
        if not done or not left:
            return []
        minutes, seconds = divmod(round((time.monotonic() - self._begin) / done * left), 60)
        return [f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"]


def facts_of(logs: Mapping[str, Any]) -> list[str]:
    """Return what there is to say of one log entry; nothing of the summary at the end of training."""
    found = []
    if "loss" in logs:
        found.append(f"loss {float(logs['loss']):.3f}")
    if "lambda" in logs:
        found.append(f"λ {float(logs['lambda']):.2f}")
    if "eval_accuracy" in logs:
        found.append(f"held-out accuracy {float(logs['eval_accuracy']):.2%}")
    elif "eval_loss" in logs:
        found.append(f"held-out loss {float(logs['eval_loss']):.3f}")
    return found


def table_of(costs: Mapping[str, Cost], metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of models by name, the first of which is the one that the others are compared with."""
    columns: dict[str, dict[str, str]] = {}
    first = next(iter(costs.values())).latency or {}
    for name, cost in costs.items():
        accuracy = numbers(metrics[name]).get("accuracy")
        columns[name] = {
            "held-out accuracy": "not measured" if accuracy is None else f"{accuracy:.2%}",
            **cost.facts(),
            **{f"speed-up, batch {size}": f"{ratio:.2f}×" for size, ratio in speed_ups(first, cost.latency).items()},
        }
    return side_by_side(columns)


def conditions_sentence(conditions: LatencyConditions | None) -> str:
    """Return under what conditions latencies were measured."""
    if conditions is None:
        return "Latency was not measured."
    threads = f"{conditions.threads} thread{'' if conditions.threads == 1 else 's'}"
    parts = [conditions.device, conditions.dtype, conditions.mode, threads]
    return f"Latency: {', '.join(parts)}; {conditions.rounds} rounds, {conditions.statistic}."
