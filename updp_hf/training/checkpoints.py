"""Checkpoints of a training that has not ended: written whole or not at all, found again, loaded strictly."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from updp_hf.core.graph.structure import Structure
from updp_hf.core.plan.plan import Plan
from updp_hf.errors import AccessError, PlanError, UPDPError
from updp_hf.model.configuration_updp import UPDPConfig
from updp_hf.model.modeling_updp import UPDPForImageClassification, base_config, updp_config
from updp_hf.surgery.find import read
from updp_hf.surgery.gate import gate_, plan_of

__all__ = [
    "AVERAGE_NAME",
    "appearing_whole",
    "gated_model_in",
    "last_checkpoint",
    "load_checkpoint_",
    "plan_in",
    "read_gated_model",
    "save_checkpoint",
    "whole_or_none",
]

logger = logging.get_logger(__name__)

AVERAGE_NAME = "average.safetensors"
"""The moving average of the weights, beside the weights themselves."""
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")
"""What torch names where it cannot write a file."""


def save_checkpoint(model: nn.Module, folder: Path) -> None:
    """Save a gated model so that no `from_pretrained` takes it for a pruned one, under the names of today.

    Transformers would write the names of its version 4, and not load them again when training resumes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_model(model, str(folder / SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
    fields = {"plan": plan_of(model).to_dict(), "is_gated": True}
    config = updp_config(model, **fields) if isinstance(model, PreTrainedModel) else UPDPConfig(**fields)
    config.save_pretrained(folder)


def load_checkpoint_(model: nn.Module, folder: str | Path, name: str = SAFE_WEIGHTS_NAME) -> None:
    """Load the weights in `folder` strictly: a checkpoint of another structure is an error, not a warning.

    Raises:
        ValueError: there are no weights, or they do not fit.
    """
    file = Path(folder) / name
    if not file.is_file():
        raise UPDPError(
            f"{folder} holds no {name}: resume a checkpoint that is complete, with the options that its run had."
        )
    try:
        safetensors.torch.load_model(model, file)
    except (RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UPDPError(
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
    """Build the model whose training `checkpoint` is, gates and weights and all: the averaged ones if there are any.

    Raises:
        PlanError: the folder is no checkpoint of a pruning run.
        ValueError: its weights do not fit its configuration.
    """
    return read_gated_model(checkpoint)[0]


def read_gated_model(checkpoint: str | Path) -> tuple[nn.Module, Structure]:
    """Build the model as `gated_model_in` does, and return it with the structure of the unpruned one.

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
    structure = read(model)
    gate_(model, plan, structure=structure)
    is_averaged = (Path(checkpoint) / AVERAGE_NAME).is_file()
    load_checkpoint_(model, checkpoint, AVERAGE_NAME if is_averaged else SAFE_WEIGHTS_NAME)
    return model.eval(), structure


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint of the training in `folder`, None if there is none.

    What a run was writing when it was killed is passed over with a warning.
    """
    found = sorted(_numbered(Path(folder)), reverse=True)
    for _, checkpoint in found:
        if _is_complete(checkpoint):
            return str(checkpoint)
        logger.warning_once(
            f"{checkpoint} is not complete, its run was interrupted while writing it: it is passed over."
        )
    return None


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in `folder`, each with its step."""
    matches = [(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in folder.glob("*")]
    return [(int(match[1]), path) for match, path in matches if match and path.is_dir()]


def _is_complete(checkpoint: Path) -> bool:
    """Return whether all of a checkpoint has been written: the state of the Trainer is what it writes last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not there, not text, or no JSON
        return False
    return (checkpoint / SAFE_WEIGHTS_NAME).is_file()


@contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """Let `folder` appear at the end, when all has been written into the one that is returned."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as unfinished:
        written = Path(unfinished) / folder.name
        yield written
        os.replace(written, folder)


@contextmanager
def whole_or_none(folder: Path, *, is_writer: bool) -> Iterator[None]:
    """Write a checkpoint within, which counts once it is whole; what cannot be written is taken away again.

    Args:
        folder: that of the checkpoint.
        is_writer: whether this process makes the folder.

    Raises:
        OSError: it could not be written.
    """
    if is_writer:
        # Of an older checkpoint of the same name: it must not vouch for the new one.
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        # torch and safetensors have errors of their own for a full disk. Processes that lose each other raise a
        # RuntimeError, too, and what fails once the checkpoint is complete is something else.
        is_another = isinstance(error, RuntimeError) and not any(name in str(error) for name in _TORCH_WRITER)
        if not is_writer or is_another or _is_complete(folder):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free / 2**30
        last = last_checkpoint(folder.parent)
        goes_on = "begins anew" if last is None else f"goes on after {os.path.basename(last)}"
        raise AccessError(
            f"{folder} could not be written ({' '.join(str(error).split())}; {free:.1f} GiB are free there): make "
            f"room and start the same command again, which {goes_on}."
        ) from error
