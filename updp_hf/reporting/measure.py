"""What models cost, counted and measured, and what a merged model itself tells of its pruning."""

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from updp_hf.core.cost import count_macs, count_parameters, measure_latency
from updp_hf.core.graph.structure import Structure
from updp_hf.errors import UPDPError
from updp_hf.model.configuration_updp import UPDPConfig
from updp_hf.model.modeling_updp import UPDPForImageClassification, base_config
from updp_hf.reporting.report import REPORT_NAME, Cost, LatencyConditions, ModelFacts, Report
from updp_hf.surgery.find import blocks_of
from updp_hf.surgery.model_io import example_inputs_of

__all__ = [
    "WEIGHTS_NAMES",
    "device_name",
    "digest_of_weights",
    "measure_costs",
    "model_facts",
    "report_in",
    "report_of",
]

logger = logging.get_logger(__name__)

WEIGHTS_NAMES = ("model.safetensors", "model-*-of-*.safetensors")
"""Files of the weights, as patterns."""


def measure_costs(
    models: Mapping[str, nn.Module], batch_sizes: Sequence[int] = (), rounds: int = 15
) -> tuple[dict[str, Cost], LatencyConditions | None]:
    """Return what each model costs, and how the latency was measured, None if it was not.

    Args:
        models: models for the same images, on one device.
        batch_sizes: the batch sizes to measure latency at; none measures no latency.
        rounds: how often each model runs at each batch size, the models in turn.
    """
    first = next(iter(models.values()))
    for model in models.values():
        model.eval()
    latency: dict[str, dict[str, float]] = {}
    conditions = None
    if batch_sizes:
        medians = measure_latency(models, [example_inputs_of(first, size) for size in batch_sizes], rounds=rounds)
        latency = {name: dict(zip(map(str, batch_sizes), times, strict=True)) for name, times in medians.items()}
        parameter = next(first.parameters())
        conditions = LatencyConditions(
            device=device_name(parameter.device),
            dtype=str(parameter.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            rounds=rounds,
            statistic="median, the models in turn",
        )
    example = example_inputs_of(first)
    costs = {
        name: Cost(count_parameters(model), count_macs(model, example), latency.get(name))
        for name, model in models.items()
    }
    return costs, conditions


def device_name(device: torch.device) -> str:
    """Return what `device` is, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {os.cpu_count()} cores)"


def model_facts(base: nn.Module, merged: nn.Module) -> ModelFacts:
    """Return the class of the unpruned model, that of the merged one, and the architecture if it is one of timm's."""
    stock = base.base if isinstance(base, UPDPForImageClassification) else base
    architecture = getattr(getattr(stock, "config", None), "architecture", None)
    return ModelFacts(type(base).__name__, type(merged).__name__, None if architecture is None else str(architecture))


def report_of(
    merged: nn.Module,
    batch_sizes: Sequence[int] = (),
    *,
    base: nn.Module | None = None,
    plan: Mapping[str, Any] | None = None,
    structure: Structure | None = None,
) -> Report:
    """Return what a merged model tells: what was pruned, and what it costs before and after.

    Args:
        merged: the model.
        batch_sizes: the batch sizes to measure latency at; none measures no latency.
        base: the unpruned model; by default one of its structure, built from the configuration.
        plan: the plan that was followed, by default that in the configuration.
        structure: what `read` returned for the unpruned model, if that was called before.

    Raises:
        ValueError: the model is a stock one that does not tell what was pruned, and no `base` is given.
    """
    config = getattr(merged, "config", None)
    if base is None:
        if not isinstance(config, UPDPConfig):
            raise UPDPError(
                f"A stock {type(merged).__name__} does not tell what was pruned of it: keep the {REPORT_NAME} that "
                "`save_model` left beside its weights."
            )
        like = next(merged.parameters())
        base = AutoModelForImageClassification.from_config(base_config(config)).to(like.device, like.dtype)
    costs, conditions = measure_costs({"before": base, "after": merged}, batch_sizes)
    return Report(
        plan=dict(plan or getattr(config, "plan", None) or {"sites": []}),
        before=costs["before"],
        after=costs["after"],
        model=model_facts(base, merged),
        blocks=blocks_of(base, structure),
        merge_error=getattr(config, "merge_error", None),
        latency_conditions=conditions,
    )


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


def digest_of_weights(folder: str | Path) -> str | None:
    """Return the SHA-256 of the safetensors files in `folder`, None if there are none."""
    files = sorted(file for pattern in WEIGHTS_NAMES for file in Path(folder).glob(pattern))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(2**20):
                digest.update(piece)
    return digest.hexdigest() if files else None
