"""The ways to run a model on the CPU: PyTorch eager, PyTorch compiled, ONNX Runtime."""

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from updp_hf.core.cost import measure_latency
from updp_hf.errors import ExportError, MissingLibraryError
from updp_hf.surgery.model_io import logits_of

__all__ = [
    "OnnxLibraries",
    "OnnxSession",
    "first_line",
    "onnx_libraries",
    "random_images",
    "runtimes_of",
    "write_onnx",
]

logger = logging.get_logger(__name__)

LARGEST_FILE = 2**31 - 2**26
"""Bytes of weights that one file may hold: protobuf ends at 2 GB, and the graph needs some of it."""
EAGER, COMPILED, RUNTIME = "PyTorch eager", "PyTorch compiled", "ONNX Runtime"


class OnnxLibraries(NamedTuple):
    """What the extra `onnx` installs."""

    onnx: ModuleType
    onnxruntime: ModuleType


def onnx_libraries() -> OnnxLibraries:
    """Import what an export needs.

    Raises:
        ImportError: some of it is not installed.
    """
    try:
        import_module("onnxscript")  # torch uses it
        return OnnxLibraries(import_module("onnx"), import_module("onnxruntime"))
    except ImportError as error:
        raise MissingLibraryError(
            f"Exporting to ONNX needs onnx, onnxscript and onnxruntime ({error}): `pip install 'updp-hf[onnx]'`."
        ) from error


class _Logits(nn.Module):
    """The model as a function of its images alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return logits_of(self.model, {"pixel_values": pixel_values})


class OnnxSession(nn.Module):
    """A session of ONNX Runtime, called as a model is, with as many threads as torch has."""

    def __init__(self, libraries: OnnxLibraries, file: Path):
        super().__init__()
        options = libraries.onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        # Else the threads of a session that waits keep the cores from those of the one that runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = libraries.onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])


def random_images(shape: Sequence[int], batch_size: int) -> Tensor:
    """Return `batch_size` images of `shape`, the same at each call."""
    return torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(batch_size))


def write_onnx(model: nn.Module, shape: Sequence[int], file: Path) -> None:
    """Write the model to `file`, with its weights in a file beside it only if one cannot hold them.

    Raises:
        ExportError: the exporter fails.
    """
    images = random_images(shape, 2)  # a batch of 1 would be taken for a constant
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        torch.onnx.export(
            _Logits(model).eval(),
            (images,),
            file,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=size > LARGEST_FILE,
            verbose=False,
        )
    except Exception as error:  # whatever happens inside of torch
        raise ExportError(
            f"torch cannot export {type(model).__name__} to ONNX ({first_line(error.__cause__ or error)}): try a "
            "newer version of torch and onnxscript, or report this model."
        ) from error


def first_line(error: BaseException) -> str:
    """Return what kind of error it is and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def runtimes_of(
    model: nn.Module, session: nn.Module, shape: Sequence[int], batch_sizes: Sequence[int], rounds: int
) -> dict[str, dict[str, float]]:
    """Return the median seconds of one forward of `model` eager and compiled, and of its `session`, by batch size.

    They run in turn; what cannot be compiled is left out.
    """
    batches = [{"pixel_values": random_images(shape, size)} for size in batch_sizes]
    runtimes: dict[str, nn.Module] = {EAGER: model, RUNTIME: session}
    compiled = _compiled(model, batches)
    if compiled is not None:
        runtimes[COMPILED] = compiled
    medians = measure_latency(runtimes, batches, rounds=rounds)
    return {name: dict(zip(map(str, batch_sizes), times, strict=True)) for name, times in medians.items()}


def _compiled(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> nn.Module | None:
    """Compile `model` for each of `batches`, None if it cannot be: it needs a C compiler, for example."""
    try:
        # For each size its own code, as fast as it gets: the sizes are few.
        compiled: Any = torch.compile(model, dynamic=False)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on faster settings
            for batch in batches:
                compiled(**batch)
    except Exception as error:  # whatever happens inside of torch
        logger.warning("%s: not measured, since torch.compile fails (%s).", COMPILED, first_line(error))
        return None
    wrapped: nn.Module = compiled
    return wrapped
