"""What the arguments, the selection and the log of a Trainer tell of a pruning run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from updp_hf.reporting.measure import device_name
from updp_hf.reporting.report import Report, SelectionFacts, TrainingFacts
from updp_hf.reporting.tables import speed_ups
from updp_hf.selection.choose import Selection
from updp_hf.training.arguments import UPDPTrainingArguments

__all__ = [
    "OTHER_IMAGES",
    "changed_arguments",
    "evaluations",
    "facts_of_run",
    "metrics_before_and_after",
    "selection_facts",
    "training_facts",
    "warn_if_slower",
    "with_speed_up",
]

logger = logging.get_logger(__name__)

Metrics = dict[str, Any]
OTHER_IMAGES = "other_images"
"""Marks the entry in the log of an evaluation on other images than the held-out ones."""
_FILLED_IN = ("accelerator_config", "dataloader_pin_memory", "ddp_find_unused_parameters", "do_eval", "report_to")
"""What the arguments make of their own defaults."""
_NO_FACTS = ("disable_tqdm", "logging_steps")
"""What changes nothing of the result."""
_PRIVATE = ("token", "dir", "or_path", "plan", "hub", "run_name", "resume", "project", "trackio")


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


def selection_facts(selection: Selection) -> SelectionFacts:
    """Return how the sites were chosen."""
    return SelectionFacts(
        selector=selection.selector,
        budget=str(selection.budget),
        candidates=[str(site) for site in selection.candidates],
        reasons=dict(selection.reasons),
        seconds=selection.seconds,
    )


def facts_of_run(
    args: UPDPTrainingArguments, state: TrainerState, lambda_at: Callable[[int, int], float], *, was_resumed: bool
) -> dict[str, Any]:
    """Return what arguments and log say of a run, by the name of the field of `Report`."""
    history = evaluations(state, lambda_at)
    best = state.best_global_step if args.load_best_model_at_end else None
    before, after = metrics_before_and_after(history, best or state.global_step)
    return {
        "metrics_before": {} if args.start_from_supernet else before,  # what was evaluated is the supernet
        "metrics_after": after,
        "arguments": changed_arguments(args),
        "training": training_facts(args, state, was_resumed=was_resumed),
        "history": history,
        "seed": args.seed,
    }


def with_speed_up(
    selection: SelectionFacts | None, report: Report, args: UPDPTrainingArguments
) -> SelectionFacts | None:
    """Return `selection` with the speed-up that was measured of the merged model, if one was asked for."""
    if args.target_speed_up is None:
        return selection
    measured = speed_ups(report.before.latency, report.after.latency)
    return replace(selection or SelectionFacts(), speed_up=measured[str(args.per_device_eval_batch_size)])


def warn_if_slower(report: Report, args: UPDPTrainingArguments) -> None:
    """Warn if the merged model is not as fast as was asked for."""
    asked, found = args.target_speed_up, None if report.selection is None else report.selection.speed_up
    if asked is not None and found is not None and found < asked:
        logger.warning(
            f"The merged model is {found:.2f}× as fast at batch size {args.per_device_eval_batch_size}, {asked:g}× was "
            "asked for: measure on an idle machine, or ask for more."
        )


def training_facts(args: UPDPTrainingArguments, state: TrainerState, *, was_resumed: bool) -> TrainingFacts:
    """Return the schedule of λ, how long training was and where it ran; no seconds if not all of them were counted."""
    seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    return TrainingFacts(
        ramp=args.ramp,
        ramp_start=args.ramp_start,
        ramp_end=args.ramp_end,
        steps=state.max_steps,
        steps_done=state.global_step,
        epochs=round(state.epoch or 0.0, 2),
        processes=args.world_size,
        device=device_name(args.device),
        seconds=None if was_resumed or not seconds else seconds[-1],
    )


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the training arguments that differ from the library's defaults, without folders, tokens and the plan."""
    library = UPDPTrainingArguments if isinstance(args, UPDPTrainingArguments) else TrainingArguments
    # No second object is made to compare with: that would reset the state of accelerate, which the trainer needs.
    defaults = {known.name: known.default for known in fields(library)}
    return {
        name: value
        for name, value in args.to_dict().items()
        if _given(value) != _given(defaults.get(name))
        and name not in (*_FILLED_IN, *_NO_FACTS)
        and not any(part in name for part in _PRIVATE)
        and not any(_is_place(text) for text in _texts(value))
    }


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, str):
        yield value


def _is_place(text: str) -> bool:
    """Return whether `text` may tell of somebody's machine."""
    return text.startswith(("/", "~", ".")) or "://" in text or Path(text).is_absolute()


def _given(value: Any) -> Any:
    """Return `value` as `to_dict` writes it, and None for all the ways to say that nothing was given."""
    return None if value is MISSING or value is False or value in ("", []) else getattr(value, "value", value)
