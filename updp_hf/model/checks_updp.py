"""A configuration from the Hub is data: what is refused of it, because no merged model needs it."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from .layout_updp import MAX_FEATURES, UPDPError, short

__all__ = ["FLOATING_DTYPES", "data_fields", "one_line", "refuse_unsafe", "refuse_unsafe_base", "unreadable"]

FLOATING_DTYPES = ("float16", "bfloat16", "float32", "float64")
MAX_BLOCKS = 1024
"""Largest number of blocks that a stock configuration may ask for."""

MAX_CLASSES = 2**18
"""Largest number of classes that a configuration may have."""

MAX_TOKEN = 2**20
"""Largest token of a text tower, which an image classifier describes and does not build."""

MAX_DEPTH = 12
"""How deep the values of a configuration may be nested."""

_BLOCKS = ("num_hidden_layers", "depth", "depths", "layers", "num_layers", "num_blocks")
_OTHER_FILES = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
_OTHER_MODELS = {
    "auto_map",
    "backbone",
    "backbone_config",
    "backbone_kwargs",
    "fusion_config",
    "quantization_config",
    "transformers_weights",
    "use_pretrained_backbone",
    "use_timm_backbone",
}
_LABELS = ("id2label", "label2id", "label_descriptions")
"""Fields with names of classes in them, which are anyone's choice."""

_IMPLEMENTATIONS = (None, "eager", "sdpa", "flex_attention")


def one_line(error: Exception) -> str:
    """Return what `error` says as a part of a sentence."""
    return " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__


def unreadable(place: str, error: Exception) -> ValueError:
    """Return the error to raise for a configuration that transformers refuses."""
    return ValueError(
        f"The configuration {place}cannot be read ({one_line(error)}): the file is damaged, download it again."
    )


def data_fields(config_class: type[PreTrainedConfig], document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is data in `document`: another name would replace a method of the configuration, or its inner state.

    A class attribute of transformers is data if it is a field, or a property that may be set.
    """
    known = {field.name for field in fields(config_class)}
    known |= {name for name, value in vars(PreTrainedConfig).items() if getattr(value, "fset", None) is not None}
    return {
        name: value
        for name, value in document.items()
        if name in known or not (name.startswith("_") or hasattr(PreTrainedConfig, name))
    }


def refuse_unsafe(document: Mapping[str, Any]) -> None:
    """Refuse a configuration that says what no `save_pretrained` of a merged model writes."""
    _refuse_deep(document)
    _refuse_foreign({name: value for name, value in document.items() if name != "auto_map"})
    labels = document.get("num_labels")
    if labels is not None and not (type(labels) is int and 0 < labels <= MAX_CLASSES):
        raise UPDPError(
            f"The configuration has num_labels = {short(labels)}, expected a number from 1 to {MAX_CLASSES}: the file "
            "is damaged, download it again."
        )
    if isinstance(base := document.get("base_config"), dict):
        refuse_unsafe_base(base)


def refuse_unsafe_base(base: Mapping[str, Any]) -> None:
    """Refuse a stock configuration that asks for other files or code, or for more than anyone's image classifier is.

    Raises:
        ValueError: it does.
    """
    _refuse_deep(base)
    arguments = base.get("model_args")
    unsafe = _OTHER_FILES & set(arguments if isinstance(arguments, dict) else {})
    if unsafe:
        raise UPDPError(
            f"The base configuration asks to load other files ({', '.join(sorted(unsafe))}), which a merged model "
            "never needs: do not use this model."
        )
    for part in _parts(base):
        _refuse_foreign(part)
        for name, value in part.items():
            _refuse_absurd(str(name), value)  # labels are numbered


def _parts(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return `document` and all mappings in it but those of labels, whose names are anyone's choice."""
    found: list[Mapping[str, Any]] = []
    remaining: list[Any] = [document]
    while remaining:
        value = remaining.pop()
        if isinstance(value, Mapping):
            found.append(value)
            remaining += [inner for name, inner in value.items() if name not in _LABELS]
        elif isinstance(value, list | tuple):
            remaining += value
    return found


def _refuse_deep(document: Mapping[str, Any]) -> None:
    """Refuse values nested so deep that copying or printing them would exhaust the stack."""
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ())
        ]
    if level:
        raise UPDPError(
            f"The configuration is nested more than {MAX_DEPTH} levels deep: the file is damaged, download it again."
        )


def _refuse_foreign(fields: Mapping[str, Any]) -> None:
    """Refuse fields that make transformers or timm fetch weights or code from elsewhere, or name no dtype."""
    given = {name for name in _OTHER_MODELS & set(fields) if fields[name] is not None}
    foreign = sorted(name for name in given if not (name.startswith("use_") and fields[name] is False))
    if foreign:
        raise UPDPError(
            f"The configuration asks for other models or code ({', '.join(foreign)}), which a merged model never "
            "needs: do not use this model."
        )
    for name, value in fields.items():
        if str(name).endswith("_implementation") and value not in _IMPLEMENTATIONS:
            raise UPDPError(
                f"The configuration has {name} = {short(value)}, which may be code from elsewhere, expected one of "
                f"{_IMPLEMENTATIONS}: choose another one as an argument of `from_pretrained`."
            )
        if name in ("dtype", "torch_dtype") and value is not None and not _is_floating(value):
            raise UPDPError(
                f"The configuration has {name} = {short(value)}, expected one of {FLOATING_DTYPES}: the file is "
                "damaged, download it again."
            )
        if (
            name == "architecture"
            and value is not None
            and not (isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.]+", value))
        ):
            raise UPDPError(
                f"The base configuration has architecture = {short(value)}, expected the plain name of a timm model: "
                "do not use this model."
            )


def _is_floating(dtype: Any) -> bool:
    return str(dtype).removeprefix("torch.") in FLOATING_DTYPES


def _refuse_absurd(name: str, value: Any) -> None:
    """Refuse a size that would take all memory or time to build: nobody's image classifier is that large."""
    if name in _BLOCKS:
        largest = MAX_BLOCKS
    elif "token" in name or "vocab" in name or name == "max_position_embeddings":
        largest = MAX_TOKEN
    else:
        largest = MAX_CLASSES if name in ("num_classes", "num_labels") else MAX_FEATURES
    numbers = [number for number in _flat(value) if isinstance(number, int | float)]
    too_large = any(abs(number) > largest or number != number for number in numbers)
    if too_large or len(numbers) > MAX_FEATURES or (name in _BLOCKS and sum(numbers) > largest):
        raise UPDPError(
            f"The base configuration has {name} = {short(value)}, expected at most {largest}: the file is damaged, "
            "download it again."
        )


def _flat(value: Any) -> list[Any]:
    """Return the values in the lists of `value`, however deep; mappings are parts of their own."""
    if isinstance(value, list | tuple):
        return [inner for each in value for inner in _flat(each)]
    return [value]
