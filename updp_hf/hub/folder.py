"""The folder of a merged model."""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME

from updp_hf.data.processors import ordinary_processor
from updp_hf.errors import UPDPError
from updp_hf.reporting.card import CARD_NAME, PICTURES, add_card
from updp_hf.reporting.measure import WEIGHTS_NAMES, digest_of_weights
from updp_hf.reporting.report import REPORT_NAME, Report

__all__ = ["MERGED_FILES", "check_unoccupied", "is_training_checkpoint", "save_merged", "save_processor"]

_WEIGHTS = (*WEIGHTS_NAMES, SAFE_WEIGHTS_INDEX_NAME)
MERGED_FILES = (
    *(CONFIG_NAME, *_WEIGHTS, IMAGE_PROCESSOR_NAME),
    "*_updp.py",
    *(REPORT_NAME, CARD_NAME, *PICTURES, "onnx/model.onnx", "onnx/model.onnx.data"),
)
"""The files of a merged model, as patterns: what is published of a folder."""


def is_training_checkpoint(folder: str | Path) -> bool:
    """Return whether the weights in `folder` are those of an unfinished pruning run, gates and all."""
    config = Path(folder) / CONFIG_NAME
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("is_gated"))


def check_unoccupied(folder: str | Path, base: nn.Module) -> None:
    """Refuse to write a merged model over the checkpoint `base` was loaded from, or over a training checkpoint.

    Raises:
        ValueError: one of them lies in `folder`.
    """
    source = str(getattr(getattr(base, "config", None), "_name_or_path", "") or "")
    if source and (Path(source) / CONFIG_NAME).is_file() and Path(source).resolve() == Path(folder).resolve():
        raise UPDPError(f"The output folder is {folder}, where the checkpoint itself lies: choose another folder.")
    if is_training_checkpoint(folder):
        raise UPDPError(f"The output folder is {folder}, which holds a training checkpoint: choose another folder.")


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
        raise UPDPError(
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
