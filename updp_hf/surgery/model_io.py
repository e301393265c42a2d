"""What goes into a model and what comes out of it, whichever library it is from."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from updp_hf.errors import UPDPError

__all__ = ["base_model_of", "check_batches", "example_inputs_of", "image_shape_of", "logits_of", "model_inputs"]


USUAL_SIZE = 224
"""Height and width of the images that a transformers model is taken to be for if it does not tell."""


def image_shape_of(model: nn.Module) -> tuple[int, int, int]:
    """Return `(channels, height, width)` of the images that `model` was made for.

    Raises:
        ValueError: neither the model nor its configuration tells.
    """
    configs = [c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)]
    channels = next((c.num_channels for c in configs if getattr(c, "num_channels", None)), None)
    # timm keeps the size that a net was built for in its patch embedding, and that of its weights in a dict.
    known = [cfg for module in model.modules() if isinstance(cfg := getattr(module, "pretrained_cfg", None), Mapping)]
    shape = next((cfg["input_size"] for cfg in known if cfg.get("input_size")), None)
    channels = channels or (shape[0] if shape else None)
    sizes = [getattr(config, "image_size", None) for config in configs]
    sizes += [getattr(module, "img_size", None) for module in model.modules()]
    sizes += [shape[1:]] if shape else []
    sizes += [USUAL_SIZE] if configs else []
    for size in sizes:
        if isinstance(size, int):
            return (channels or 3, size, size)
        if isinstance(size, Sequence) and len(size) == 2:
            return (channels or 3, int(size[0]), int(size[1]))
    raise UPDPError(
        f"{type(model).__name__} does not tell the size of its images: give `example_inputs`, the keyword arguments of "
        "one forward on one image."
    )


def example_inputs_of(model: nn.Module, batch_size: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Make random images for `model`, by the name of its input, with the dtype and device of its parameters."""
    parameter = next(model.parameters())
    images = torch.randn(batch_size, *image_shape_of(model), generator=torch.Generator().manual_seed(seed))
    return {_input_name(model): images.to(parameter.device, parameter.dtype)}


def model_inputs(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> dict[str, Tensor]:
    """Return the keyword arguments for one forward without labels, on the model's device and in its dtype."""
    parameter = next(model.parameters())
    name = _input_name(model)
    images = batch[name] if isinstance(batch, Mapping) else batch
    return {name: images.to(parameter.device, parameter.dtype)}


def logits_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Run `model` and return its logits, of shape `(batch, classes)`."""
    output = model(**inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def base_model_of(model: nn.Module) -> str:
    """Return the Hub id that `model` was loaded from, empty if it came from elsewhere."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return "" if not name or Path(name).exists() else name


def check_batches(batches: Iterable[Any]) -> list[Any]:
    """Return calibration batches as a list, since they are walked over more than once.

    Raises:
        ValueError: there are none.
    """
    found = list(batches)
    if not found:
        raise UPDPError("There are no calibration batches, expected at least one: pass some images of the task.")
    return found


def _input_name(model: nn.Module) -> str:
    if isinstance(model, PreTrainedModel):
        return str(model.main_input_name)
    return next(iter(inspect.signature(model.forward).parameters))
