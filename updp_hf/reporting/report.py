"""The facts of one run, written beside the merged model. No number in a card comes from anywhere else."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, TrainingArguments
from transformers.utils import logging

from updp_hf.core.cost import count_macs, count_parameters, measure_latency
from updp_hf.core.plan.plan import library_versions
from updp_hf.core.plan.schema import from_values
from updp_hf.errors import UPDPError
from updp_hf.model.configuration_updp import UPDPConfig
from updp_hf.model.modeling_updp import UPDPForImageClassification, base_config
from updp_hf.surgery.find import blocks_of
from updp_hf.surgery.model_io import example_inputs_of
from updp_hf.training.arguments import UPDPTrainingArguments

__all__ = [
    "Cost",
    "Report",
    "changed_arguments",
    "device_name",
    "digest_of_weights",
    "latency_facts",
    "measure_costs",
    "model_facts",
    "numbers",
    "report_in",
    "report_of",
    "side_by_side",
    "speed_ups",
]

logger = logging.get_logger(__name__)

REPORT_NAME = "updp_report.json"
WEIGHTS_NAMES = ("model.safetensors", "model-*-of-*.safetensors")
"""Files of the weights, as patterns."""
_FILLED_IN = ("accelerator_config", "dataloader_pin_memory", "ddp_find_unused_parameters", "do_eval", "report_to")
"""What the arguments make of their own defaults."""
_NO_FACTS = ("disable_tqdm", "logging_steps")
"""What changes nothing of the result."""
_PRIVATE = ("token", "dir", "or_path", "plan", "hub", "run_name", "resume", "project", "trackio")


@dataclass(frozen=True)
class Cost:
    """What a model costs; None where it was not measured."""

    parameters: int
    macs: int  # multiply-accumulates per image
    latency: dict[str, float] | None = None  # median seconds of one forward, by batch size

    def facts(self) -> dict[str, str]:
        """Return the numbers as people read them."""
        return {
            "parameters": f"{self.parameters / 1e6:.2f} M",
            "MACs per image": f"{self.macs / 1e6:.1f} M",
            **latency_facts(self.latency or {}),
        }


def _size(item: tuple[str, float]) -> int:
    return int(item[0])


def latency_facts(seconds: Mapping[str, float]) -> dict[str, str]:
    """Return latencies in seconds, by batch size, as people read them."""
    return {f"latency, batch {size}": f"{value * 1e3:.2f} ms" for size, value in sorted(seconds.items(), key=_size)}


def speed_ups(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> dict[str, float]:
    """Return how many times as fast the second is, by batch size, where both were measured."""
    before, after = before or {}, after or {}
    return {size: before[size] / after[size] for size in sorted(before, key=int) if size in after}


@dataclass
class Report:
    """The facts of one run: None and empty mean "not measured"."""

    plan: dict[str, Any]
    before: Cost
    after: Cost
    model: dict[str, str] = field(default_factory=dict)  # its classes, see `model_facts`
    blocks: list[str] = field(default_factory=list)  # of the unpruned network, in order of execution
    merge_error: float | None = None
    metrics_before: dict[str, Any] = field(default_factory=dict)
    metrics_after: dict[str, Any] = field(default_factory=dict)
    metrics_without_training: dict[str, Any] = field(default_factory=dict)
    latency_conditions: dict[str, Any] = field(default_factory=dict)
    latencies: dict[str, Any] = field(default_factory=dict)  # by which the sites were chosen, if they were
    selection: dict[str, Any] = field(default_factory=dict)  # how the sites were chosen, if no plan was given
    arguments: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)  # ramp, steps, processes, device and time
    history: list[dict[str, Any]] = field(default_factory=list)  # step, λ and metrics of each evaluation
    evaluated_on: dict[str, Any] = field(default_factory=dict)  # name, id, split and images of the held-out set
    metadata: dict[str, Any] = field(default_factory=dict)  # for the head of the card: licence, datasets, tags
    onnx: dict[str, Any] = field(default_factory=dict)  # what exporting measured, if it was exported
    seed: int | None = None
    weights: str | None = None  # SHA-256 of the weights that all this is true of
    versions: dict[str, str] = field(default_factory=library_versions)

    def save(self, folder: str | Path) -> None:
        """Write the report into `folder`."""
        (Path(folder) / REPORT_NAME).write_text(self._document() + "\n", encoding="utf-8")

    def as_saved(self) -> Self:
        """Return the report as it will be read again: what is no JSON value as text, everything in order."""
        return self.from_dict(json.loads(self._document()))

    def _document(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True, default=str)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Read the JSON values that `save` wrote.

        Raises:
            ValueError: they are not those of a report.
        """
        try:
            return from_values(cls, document)
        except ValueError as error:
            raise UPDPError(f"The report cannot be read ({error}): was the file edited by hand?") from error

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the report in `folder`.

        Raises:
            ValueError: its file holds no report.
        """
        file = Path(folder) / REPORT_NAME
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except (RecursionError, ValueError) as error:  # of `json`, or of bytes that are no text
            raise UPDPError(f"{file} is not JSON ({error}), expected a report written by `Report.save`.") from error
        return cls.from_dict(document)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Leave out what is no number: a `compute_metrics` may return a confusion matrix, too."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def digest_of_weights(folder: str | Path) -> str | None:
    """Return the SHA-256 of the safetensors files in `folder`, None if there are none."""
    files = sorted(file for pattern in WEIGHTS_NAMES for file in Path(folder).glob(pattern))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(2**20):
                digest.update(piece)
    return digest.hexdigest() if files else None


def report_in(folder: str | Path, model: PreTrainedModel) -> Report:
    """Return the report in `folder` if it is about the weights there, else one with what `model` itself tells.

    A model that was trained on, or merged by hand, has no figures but those that can be counted.

    Raises:
        ValueError: the model is a stock one, of which nothing tells that it was pruned.
    """
    metadata: dict[str, Any] = {}
    if (Path(folder) / REPORT_NAME).is_file():
        try:
            report = Report.load(folder)
        except ValueError as error:
            logger.warning(f"{error} What it says is left out of the card.")
        else:
            if report.weights == digest_of_weights(folder):
                return report
            metadata = report.metadata
            logger.warning(
                f"The report in {folder} is about other weights than those that lie there, so its figures are left out "
                "of the card."
            )
    return replace(report_of(model), metadata=metadata, weights=digest_of_weights(folder))


def report_of(
    merged: PreTrainedModel,
    batch_sizes: Sequence[int] = (),
    *,
    base: nn.Module | None = None,
    plan: Mapping[str, Any] | None = None,
) -> Report:
    """Return what a merged model tells: what was pruned, and what it costs before and after.

    Args:
        merged: the model.
        batch_sizes: the batch sizes to measure latency at; none measures no latency.
        base: the unpruned model; by default one of its structure, built from the configuration.
        plan: the plan that was followed, by default that in the configuration.

    Raises:
        ValueError: the model is a stock one that does not tell what was pruned, and no `base` is given.
    """
    if base is None:
        if merged.config.model_type != UPDPConfig.model_type:
            raise UPDPError(
                f"A stock {type(merged).__name__} does not tell what was pruned of it: keep the {REPORT_NAME} that "
                "`save_model` left beside its weights."
            )
        base = AutoModelForImageClassification.from_config(base_config(merged.config))
        base = base.to(merged.device, merged.dtype)
    costs, conditions = measure_costs({"before": base, "after": merged}, batch_sizes)
    return Report(
        plan=dict(plan or getattr(merged.config, "plan", None) or {"sites": []}),
        before=costs["before"],
        after=costs["after"],
        model=model_facts(base, merged),
        blocks=blocks_of(base),
        merge_error=getattr(merged.config, "merge_error", None),
        latency_conditions=conditions,
    )


def model_facts(base: nn.Module, merged: nn.Module) -> dict[str, str]:
    """Return the class of the unpruned model, that of the merged one, and the architecture if it is one of timm's."""
    facts = {"base_class": type(base).__name__, "merged_class": type(merged).__name__}
    if isinstance(base, UPDPForImageClassification):
        base = base.base
    architecture = getattr(getattr(base, "config", None), "architecture", None)
    return facts if architecture is None else {**facts, "timm_architecture": str(architecture)}


def measure_costs(
    models: Mapping[str, nn.Module], batch_sizes: Sequence[int] = (), rounds: int = 15
) -> tuple[dict[str, Cost], dict[str, Any]]:
    """Return what each model costs, and the conditions under which the latency was measured.

    Args:
        models: models for the same images, on one device.
        batch_sizes: the batch sizes to measure latency at; none measures no latency.
        rounds: how often each model runs at each batch size, the models in turn.
    """
    first = next(iter(models.values()))
    for model in models.values():
        model.eval()
    latency: dict[str, dict[str, float]] = {}
    conditions: dict[str, Any] = {}
    if batch_sizes:
        medians = measure_latency(models, [example_inputs_of(first, size) for size in batch_sizes], rounds=rounds)
        latency = {name: dict(zip(map(str, batch_sizes), times, strict=True)) for name, times in medians.items()}
        parameter = next(first.parameters())
        conditions = {
            "device": device_name(parameter.device),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "statistic": "median, the models in turn",
            "mode": "eager",
        }
    example = example_inputs_of(first)
    costs = {
        name: Cost(count_parameters(model), count_macs(model, example), latency.get(name))
        for name, model in models.items()
    }
    return costs, conditions


def side_by_side(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Return a Markdown table with one column of facts for each name; a fact that one lacks reads "not measured"."""
    names = list(dict.fromkeys(name for facts in columns.values() for name in facts))
    rows = [
        ["", *columns],
        *([name, *(facts.get(name, "not measured") for facts in columns.values())] for name in names),
    ]
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = "-|-".join("-" * width for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|-{rule}-|", *(f"| {line} |" for line in lines[1:])])


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


def device_name(device: torch.device) -> str:
    """Return what `device` is, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {os.cpu_count()} cores)"
