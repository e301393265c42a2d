"""A merged model as an ONNX file that was checked against PyTorch, and what it takes beside it."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoImageProcessor
from transformers.utils import logging

from updp_hf.deployment.runtimes import (
    OnnxLibraries,
    OnnxSession,
    first_line,
    onnx_libraries,
    random_images,
    runtimes_of,
    write_onnx,
)
from updp_hf.errors import ExportError
from updp_hf.reporting.measure import device_name
from updp_hf.reporting.report import LatencyConditions, OnnxFacts
from updp_hf.reporting.tables import latency_facts
from updp_hf.surgery.model_io import image_shape_of, load_classifier, logits_of

__all__ = ["OnnxExport", "export_onnx"]

logger = logging.get_logger(__name__)

ONNX_FILE = Path("onnx") / "model.onnx"
TOLERANCE = 1e-4
"""Largest difference between the logits of ONNX Runtime and PyTorch, relative to the largest logit."""

CHECKED_BATCH_SIZES = (1, 2, 5)


@dataclass(frozen=True)
class OnnxExport:
    """An ONNX file and what was measured of it."""

    file: Path
    opset: int
    difference: float  # largest one to PyTorch's logits in float32, relative to the largest logit
    latency: dict[str, dict[str, float]] = field(default_factory=dict)  # median seconds by runtime and batch size
    conditions: LatencyConditions | None = None  # under which the latency was measured

    def facts(self) -> OnnxFacts:
        """Return what a report says of it."""
        return OnnxFacts(self.opset, self.difference, self.latency, self.conditions)

    def columns(self) -> dict[str, dict[str, str]]:
        """Return the latencies as people read them, by runtime; one that was not measured has none."""
        return {name: latency_facts(medians) for name, medians in self.latency.items()}


def export_onnx(folder: str | Path, *, batch_sizes: Sequence[int] = (1, 8), rounds: int = 15) -> OnnxExport:
    """Export the model in `folder` to `onnx/model.onnx` inside it, in float32 and for batches of any size.

    The images have the size that the processor in `folder` makes, else the one that the model was made for. The file
    appears when ONNX Runtime has given the logits that PyTorch gives; an earlier one stays until then.

    Args:
        folder: where `save_pretrained` has put an image classifier, a pruned one or any other.
        batch_sizes: the batch sizes to measure latency at on the CPU; none measures no latency.
        rounds: how often each runtime runs at each batch size, the runtimes in turn.

    Raises:
        ExportError: the model cannot be exported, or the logits differ.
        MissingLibraryError: a library of the extra `onnx` is missing.
        UPDPError: there is no image classifier in `folder`, or its files are damaged.
    """
    libraries = onnx_libraries()
    folder = Path(folder)
    model = load_classifier(folder, dtype=torch.float32).eval()  # the precision that every runtime has
    shape = _image_shape(folder, model)
    _check_shape(model, shape)
    target = folder / ONNX_FILE
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        file = Path(unfinished) / target.name
        write_onnx(model, shape, file)
        opset = _opset(libraries, file)
        session = OnnxSession(libraries, file)
        difference = _largest_difference(model, session, shape)
        logger.info("Exported: logits differ by %.1e of the largest one.", difference)
        latency = runtimes_of(model, session, shape, batch_sizes, rounds) if batch_sizes else {}
        del session  # some systems move no file that is open
        _move(Path(unfinished), target)
    return OnnxExport(target, opset, difference, latency, _conditions(rounds) if batch_sizes else None)


def _image_shape(folder: Path, model: nn.Module) -> tuple[int, int, int]:
    """Return `(channels, height, width)` of the images that the model is going to see."""
    channels, height, width = image_shape_of(model)
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError):  # there is none
        return channels, height, width
    image = np.zeros((2 * height, 2 * width, 3), dtype=np.uint8)
    height, width = processor(image, return_tensors="pt")["pixel_values"].shape[2:]
    return channels, height, width


@torch.no_grad()
def _check_shape(model: nn.Module, shape: Sequence[int]) -> None:
    """Check that the model takes images of `shape`, before the exporter says so in its own words.

    Raises:
        ExportError: it does not.
    """
    try:
        logits_of(model, {"pixel_values": random_images(shape, 1)})
    except Exception as error:  # each model has its own
        raise ExportError(
            f"{type(model).__name__} does not classify images of {' × '.join(map(str, shape))}, which is what the "
            f"processor in its folder makes ({first_line(error)}): save the processor that belongs to the model."
        ) from error


def _opset(libraries: OnnxLibraries, file: Path) -> int:
    """Check that `file` is valid ONNX and return the version of its operators.

    Raises:
        ExportError: it is not valid.
    """
    try:
        libraries.onnx.checker.check_model(file, full_check=True)
    except Exception as error:  # of the checker, of the inference of shapes, or of protobuf
        raise ExportError(f"The exported file is no valid ONNX ({first_line(error)}): report this model.") from error
    graph = libraries.onnx.load(file, load_external_data=False)
    return next(int(used.version) for used in graph.opset_import if used.domain in ("", "ai.onnx"))


@torch.no_grad()
def _largest_difference(model: nn.Module, session: nn.Module, shape: Sequence[int]) -> float:
    """Return the largest difference of the logits, relative to the largest logit, over batches of several sizes.

    Raises:
        ExportError: it is larger than rounding explains.
    """
    largest = 0.0
    for size in CHECKED_BATCH_SIZES:
        images = random_images(shape, size)
        expected, found = logits_of(model, {"pixel_values": images}), session(pixel_values=images)
        if found.shape != expected.shape:
            raise ExportError(
                f"The exported logits are of shape {tuple(found.shape)}, PyTorch's of {tuple(expected.shape)}: report "
                "this model."
            )
        scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
        difference = float((found - expected).abs().max() / scale)
        if not difference <= TOLERANCE:
            raise ExportError(
                f"The exported logits differ by {difference:.1e} of the largest one in a batch of {size}, expected at "
                f"most {TOLERANCE:.0e}: report this model."
            )
        largest = max(largest, difference)
    return largest


def _conditions(rounds: int) -> LatencyConditions:
    return LatencyConditions(
        device=device_name(torch.device("cpu")),
        dtype="float32",
        threads=torch.get_num_threads(),
        rounds=rounds,
        statistic="median, the runtimes in turn",
    )


def _move(unfinished: Path, target: Path) -> None:
    """Put the file in its place, what lies beside it first, and take away weights that an earlier one had beside it."""
    target.parent.mkdir(exist_ok=True)
    files = sorted(unfinished.iterdir(), key=lambda file: file.name == target.name)
    for file in files:
        os.replace(file, target.parent / file.name)
    if len(files) == 1:
        target.with_name(f"{target.name}.data").unlink(missing_ok=True)
