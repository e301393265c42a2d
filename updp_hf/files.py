"""What a run leaves on disk: training checkpoints, and the merged model."""

import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from updp_hf.configuration_updp import UPDPConfig
from updp_hf.core.plan import Plan, PlanError
from updp_hf.modeling_updp import updp_config
from updp_hf.report import Report
from updp_hf.surgery import plan_of

__all__ = ["load_checkpoint_", "plan_in", "refuse_occupied", "save_checkpoint", "save_merged", "write_merged"]


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
        raise ValueError(
            f"The checkpoint {folder} does not fit the model: {error}. Resume with the model, the plan and the "
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


def refuse_occupied(folder: str | Path, base: nn.Module) -> None:
    """Refuse to write a merged model over the checkpoint `base` was loaded from, or over a training checkpoint.

    Raises:
        ValueError: one of them lies in `folder`.
    """
    source = str(getattr(getattr(base, "config", None), "_name_or_path", "") or "")
    if source and (Path(source) / CONFIG_NAME).is_file() and Path(source).resolve() == Path(folder).resolve():
        raise ValueError(f"The output folder is {folder}, where the checkpoint itself lies: choose another folder.")
    config = Path(folder) / CONFIG_NAME
    if config.is_file() and UPDPConfig.from_json_file(str(config)).to_dict().get("is_gated"):
        raise ValueError(f"The output folder is {folder}, which holds a training checkpoint: choose another folder.")


def save_merged(merged: nn.Module, folder: Path, processing_class: Any, report: Report) -> None:
    """Save the merged model, what prepares its images, and the report. Each file appears in `folder` when it is whole.

    Raises:
        ValueError: the model is no transformers model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        write_merged(merged, Path(unfinished), processing_class, report)
        for file in Path(unfinished).iterdir():
            os.replace(file, folder / file.name)


def write_merged(merged: nn.Module, folder: Path, processing_class: Any, report: Report) -> None:
    """Write the files of a merged model into an empty folder."""
    if not isinstance(merged, PreTrainedModel):
        raise ValueError(
            f"{type(merged).__name__} is no transformers model, so there is no configuration to save it with: load it "
            "through AutoModelForImageClassification, which wraps timm models, and prune that."
        )
    merged.save_pretrained(folder)
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    report.save(folder)
