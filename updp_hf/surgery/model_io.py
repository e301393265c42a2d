"""What goes into a model and what comes out of it, whichever library it is from."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from updp_hf.errors import AccessError, UPDPError

__all__ = [
    "base_model_of",
    "check_batches",
    "example_inputs_of",
    "image_shape_of",
    "load_classifier",
    "logits_of",
    "model_inputs",
]

_UNLOADABLE = (ImportError, RuntimeError, SafetensorError, UnpicklingError, ValueError)
"""What transformers raises for damaged files, unknown architectures and missing libraries."""
_EXPECTED = "Give a folder that `save_pretrained` wrote, or a Hub id, of an image classifier."

USUAL_SIZE = 224
"""Height and width of the images that a transformers model is taken to be for if it does not tell."""


def load_classifier(name: str | Path, *, may_have_new_head: bool = False, **options: Any) -> PreTrainedModel:
    """Load the image classifier `name`, with all of its weights.

    Args:
        name: a folder, or an id on the Hub; a `Path` is a folder.
        may_have_new_head: whether the weights of the head may be missing, or be those of other classes.
        **options: those of `AutoModelForImageClassification.from_pretrained`.

    Raises:
        AccessError: it cannot be reached, or its files cannot be read.
        UPDPError: it is no image classifier, or weights of it are missing.
    """
    if isinstance(name, Path) and not (name / CONFIG_NAME).is_file():
        raise AccessError(f"{name} holds no {CONFIG_NAME}: give the folder that a model was saved in.")
    try:
        # Weights that do not fit are accepted here, so that they can be named below.
        model, info = AutoModelForImageClassification.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except UPDPError:  # a pruned model, and what it says is clear
        raise
    except (OSError, *_UNLOADABLE) as error:
        kind = AccessError if isinstance(error, OSError) else UPDPError
        raise kind(_why_not_loaded(name, error)) from error
    lacking = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if may_have_new_head:
        lacking -= {key for key, weight in model.state_dict().items() if weight.shape[:1] == (model.num_labels,)}
    if lacking:
        shown = ", ".join(sorted(map(str, lacking))[:3]) + (", …" if len(lacking) > 3 else "")
        raise UPDPError(f"{str(name)!r} has no weights that fit {shown} of {type(model).__name__}. {_EXPECTED}")
    loaded: PreTrainedModel = model
    return loaded


def _why_not_loaded(name: str | Path, error: Exception) -> str:
    found = f"the folder {str(name)!r}"
    taken = f"{str(name)!r}, which is no folder here and was taken for a Hub id"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    where = found if Path(name).is_dir() else taken
    return f"No image classifier could be loaded from {where}: {reason}. {_EXPECTED}"


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
