"""The ways in which the benchmark of latencies runs a forward: eager, compiled, by ONNX Runtime, from a CUDA graph."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from updp_hf.deployment.runtimes import OnnxSession, onnx_libraries, write_onnx
from updp_hf.surgery.model_io import image_shape_of

__all__ = ["COMPILED", "EAGER", "FORMATS", "GRAPHS", "ONNX", "prepared"]

EAGER, COMPILED, GRAPHS, ONNX = "eager", "compiled", "CUDA graphs", "ONNX Runtime"
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def prepared(model: nn.Module, memory_format: str, mode: str, images: dict[str, Tensor]) -> nn.Module:
    """Return `model`, laid out in place, and compiled, captured or written to ONNX on its own."""
    model.to(memory_format=FORMATS[memory_format])
    if mode == ONNX:
        return InRuntime(model)
    if mode.startswith(COMPILED):  # versions of one class would share a cache
        model = torch.compile(model, fullgraph=True, dynamic=False, isolate_recompiles=True)
    return Replayed(model, images) if mode.endswith(GRAPHS) else model


class Replayed(nn.Module):
    """The forward of `model` for images of one shape, captured in a CUDA graph as torch's documentation has it.

    Args:
        model: on the GPU, in evaluation mode.
        images: the keyword arguments of the forward.
    """

    def __init__(self, model: nn.Module, images: dict[str, Tensor]):
        super().__init__()
        self._images = {name: image.clone() for name, image in images.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(side):
            for _ in range(3):  # compiles, and lets cuDNN choose, neither of which can be captured
                model(**self._images)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self._graph):
            self._output = model(**self._images)
        self._model = (model,)  # the graph reads its weights

    def forward(self, **images: Tensor) -> Tensor:
        for name, image in images.items():
            self._images[name].copy_(image)
        self._graph.replay()
        return self._output


class InRuntime(nn.Module):
    """`model`, a timm net on the CPU in float32, as a session of ONNX Runtime for the images that `model` takes.

    Raises:
        ExportError: it cannot be exported.
        ImportError: a library of the extra `onnx` is missing.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            write_onnx(_OfPixelValues(model), image_shape_of(model), file)
            self._session = OnnxSession(onnx_libraries(), file)

    def forward(self, **images: Tensor) -> Tensor:
        (pixel_values,) = images.values()
        return self._session(pixel_values)


class _OfPixelValues(nn.Module):
    """`model`, whatever it calls its images, with the name that transformers gives them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self._model(pixel_values)
