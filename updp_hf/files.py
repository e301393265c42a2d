"""What a run leaves on disk: training checkpoints, and the merged model."""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from updp_hf.card import CARD_NAME, PICTURES, add_card
from updp_hf.configuration_updp import UPDPConfig
from updp_hf.core.plan import Plan, PlanError
from updp_hf.modeling_updp import UPDPForImageClassification, base_config, updp_config
from updp_hf.processors import ordinary_processor
from updp_hf.report import REPORT_NAME, WEIGHTS_NAMES, Report, digest_of_weights
from updp_hf.surgery import gate_, plan_of

__all__ = [
    "MERGED_FILES",
    "gated_model_in",
    "is_training_checkpoint",
    "load_checkpoint_",
    "plan_in",
    "refuse_occupied",
    "save_checkpoint",
    "save_merged",
    "save_processor",
]

_WEIGHTS = (*WEIGHTS_NAMES, SAFE_WEIGHTS_INDEX_NAME)
MERGED_FILES = (
    *(CONFIG_NAME, *_WEIGHTS, IMAGE_PROCESSOR_NAME),
    *("checks_updp.py", "configuration_updp.py", "layout_updp.py", "modeling_updp.py", "weights_updp.py"),
    *(REPORT_NAME, CARD_NAME, *PICTURES, "onnx/model.onnx", "onnx/model.onnx.data"),
)
"""The files of a merged model, as patterns: what is published of a folder."""


def save_checkpoint(model: nn.Module, folder: Path) -> None:
    """Save a gated model so that no `from_pretrained` takes it for a pruned one, under the names of today.

    Transformers would write the names of its version 4, and not load them again when training resumes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_model(model, str(folder / SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
    fields = {"plan": plan_of(model).to_dict(), "is_gated": True}
    config = updp_config(model, **fields) if isinstance(model, PreTrainedModel) else UPDPConfig(**fields)
    config.save_pretrained(folder)


def load_checkpoint_(model: nn.Module, folder: str | Path) -> None:
    """Load the weights in `folder` strictly: a checkpoint of another structure is an error, not a warning.

    Raises:
        ValueError: there are no weights, or they do not fit.
    """
    file = Path(folder) / SAFE_WEIGHTS_NAME
    if not file.is_file():
        raise ValueError(f"{folder} holds no {SAFE_WEIGHTS_NAME}: is the checkpoint complete?")
    try:
        safetensors.torch.load_model(model, file)
    except (RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The checkpoint {folder} does not fit the model: {reason}. Resume with the model, the plan and the "
            "options that the run was started with."
        ) from error


def plan_in(checkpoint: str | Path) -> Plan:
    """Return the plan that a training checkpoint follows.

    Raises:
        PlanError: the folder is no checkpoint of a pruning run.
    """
    config = UPDPConfig.from_pretrained(checkpoint)
    if not getattr(config, "is_gated", False) or not config.plan:
        raise PlanError(f"{checkpoint} is no checkpoint of a pruning run: resume from a folder `checkpoint-*` of one.")
    return Plan.from_dict(config.plan)


def gated_model_in(checkpoint: str | Path) -> nn.Module:
    """Build the model whose training `checkpoint` is, gates and weights and all.

    Raises:
        PlanError: the folder is no checkpoint of a pruning run.
        ValueError: its weights do not fit its configuration.
    """
    plan = plan_in(checkpoint)
    config = UPDPConfig.from_pretrained(checkpoint)
    base = config.base_config or {}
    if base.get("model_type") == UPDPConfig.model_type:  # what had been pruned before
        model = UPDPForImageClassification(UPDPConfig.from_dict(base))
    else:
        model = AutoModelForImageClassification.from_config(base_config(config))
    gate_(model, plan)
    load_checkpoint_(model, checkpoint)
    return model.eval()


def refuse_occupied(folder: str | Path, base: nn.Module) -> None:
    """Refuse to write a merged model over the checkpoint `base` was loaded from, or over a training checkpoint.

    Raises:
        ValueError: one of them lies in `folder`.
    """
    source = str(getattr(getattr(base, "config", None), "_name_or_path", "") or "")
    if source and (Path(source) / CONFIG_NAME).is_file() and Path(source).resolve() == Path(folder).resolve():
        raise ValueError(f"The output folder is {folder}, where the checkpoint itself lies: choose another folder.")
    if is_training_checkpoint(folder):
        raise ValueError(f"The output folder is {folder}, which holds a training checkpoint: choose another folder.")


def is_training_checkpoint(folder: str | Path) -> bool:
    """Return whether the weights in `folder` are those of an unfinished pruning run, gates and all."""
    config = Path(folder) / CONFIG_NAME
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("is_gated"))


def save_merged(merged: nn.Module, folder: Path, processing_class: Any, report: Report, repo_id: str) -> None:
    """Save the merged model, what prepares its images, the report and the card.

    Each file appears in `folder` when it is whole. A card that was edited by hand stays.

    Args:
        merged: what `merge` returned.
        folder: made if there is none.
        processing_class: what prepares its images, saved beside it; None saves nothing.
        report: the facts of the run, to which the digest of the weights is added.
        repo_id: where the card says that the model is loaded from.

    Raises:
        ValueError: the model is no transformers model.
    """
    if not isinstance(merged, PreTrainedModel):
        raise ValueError(
            f"{type(merged).__name__} is no transformers model, so there is no configuration to save it with: load it "
            "through AutoModelForImageClassification, which wraps timm models, and prune that."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        merged.save_pretrained(unfinished)
        if processing_class is not None:
            save_processor(processing_class, Path(unfinished))
        report = replace(report, weights=digest_of_weights(unfinished))
        report.save(unfinished)
        stale = {file.name for pattern in _WEIGHTS for file in folder.glob(pattern)}
        for file in Path(unfinished).iterdir():
            os.replace(file, folder / file.name)
            stale.discard(file.name)
        for name in stale:
            (folder / name).unlink()
    add_card(report, folder, repo_id)


def save_processor(processing_class: Any, folder: Path) -> None:
    """Save what prepares the images, as an ordinary image processor where it is timm's."""
    processor = ordinary_processor(processing_class)
    if processor is not None:
        processor.save_pretrained(folder)
