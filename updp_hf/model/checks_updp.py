"""A configuration from the Hub is untrusted data: what of it is not accepted, because no merged model needs it."""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from transformers import PreTrainedConfig

from .layout_updp import UPDPError, short

__all__ = [
    "FLOATING_DTYPES",
    "check_base_document",
    "check_document",
    "check_numbers",
    "data_fields",
    "one_line",
    "unreadable",
]

FLOATING_DTYPES = ("float16", "bfloat16", "float32", "float64")
MAX_CLASSES = 2**18
"""Largest number of classes that a configuration may have."""

MAX_NUMBER = 2**20
"""Largest number that an architecture may be given, and largest sum of a list of them: it may count in plain Python."""

MAX_DEPTH = 12
"""How deep the values of a configuration may be nested."""

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


def unreadable(place: str, error: Exception) -> UPDPError:
    """Return the error to raise for a configuration that transformers does not accept."""
    return UPDPError(
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


def check_document(document: Mapping[str, Any]) -> None:
    """Check the configuration of a merged model for what no `save_pretrained` of one writes.

    Raises:
        UPDPError: there is some.
    """
    _check_depth(document)
    _check_references({name: value for name, value in document.items() if name != "auto_map"})
    labels = document.get("num_labels")  # transformers makes a name for each
    if labels is not None and not (type(labels) is int and 0 < labels <= MAX_CLASSES):
        raise UPDPError(
            f"The configuration has num_labels = {short(labels)}, expected a number from 1 to {MAX_CLASSES}: the file "
            "is damaged, download it again."
        )
    if isinstance(base := document.get("base_config"), dict):
        check_base_document(base)


def check_base_document(base: Mapping[str, Any]) -> None:
    """Check a stock configuration for what would load other files or code.

    Raises:
        UPDPError: there is some.
    """
    _check_depth(base)
    arguments = base.get("model_args")
    unsafe = _OTHER_FILES & set(arguments if isinstance(arguments, dict) else {})
    if unsafe:
        raise UPDPError(
            f"The base configuration asks to load other files ({', '.join(sorted(unsafe))}), which a merged model "
            "never needs: do not use this model."
        )
    for part in _mappings(base):
        _check_references(part)


def check_numbers(config_class: type[PreTrainedConfig], document: Mapping[str, Any]) -> None:
    """Check that no number reaches the architecture which it could count up to for hours, or fill the memory with.

    It reads the fields that its configuration declares. Any other field is the user's own and may hold anything.

    Raises:
        UPDPError: a number, or the sum of a list, is larger than `MAX_NUMBER`, or is none.
    """
    declared = {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}
    for name in declared & set(document):
        value = document[name]
        part_class = config_class.sub_configs.get(name)
        if isinstance(part_class, type) and is_dataclass(part_class) and isinstance(value, Mapping):
            check_numbers(part_class, value)
        else:
            _check_numbers_of(name, value)


def _check_numbers_of(name: str, value: Any) -> None:
    if isinstance(value, Mapping):  # its numbers have names of their own
        for inner, content in value.items():
            _check_numbers_of(str(inner), content)
        return
    numbers = []
    remaining = [value]
    while remaining:
        content = remaining.pop()
        if isinstance(content, Mapping):
            _check_numbers_of(name, content)
        elif isinstance(content, list | tuple):
            remaining += content
        elif isinstance(content, int | float):
            numbers.append(content)
    are_small = all(-MAX_NUMBER <= number <= MAX_NUMBER for number in numbers)  # NaN is not
    if not are_small or sum(map(abs, numbers)) > MAX_NUMBER:
        raise UPDPError(
            f"The base configuration has {name} = {short(value)}, expected at most {MAX_NUMBER} in all: the file is "
            "damaged, download it again."
        )


def _mappings(value: Any) -> list[Mapping[Any, Any]]:
    """Return `value` and the mappings in it, but those of labels, whose names are anyone's choice."""
    found: list[Mapping[Any, Any]] = []
    remaining: list[Any] = [value]
    while remaining:
        value = remaining.pop()
        if isinstance(value, Mapping):
            found.append(value)
            remaining += [inner for name, inner in value.items() if name not in _LABELS]
        elif isinstance(value, list | tuple):
            remaining += value
    return found


def _check_depth(document: Mapping[str, Any]) -> None:
    """Check that no values are nested so deep that copying or printing them would exhaust the stack."""
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


def _check_references(part: Mapping[Any, Any]) -> None:
    """Check for fields that make transformers or timm fetch weights or code from elsewhere, or that name no dtype."""
    given = {name for name in _OTHER_MODELS & set(part) if part[name] is not None}
    elsewhere = sorted(name for name in given if not (name.startswith("use_") and part[name] is False))
    if elsewhere:
        raise UPDPError(
            f"The configuration asks for other models or code ({', '.join(elsewhere)}), which a merged model never "
            "needs: do not use this model."
        )
    for name, value in part.items():
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
        if name == "architecture" and value is not None and not _is_plain_name(value):
            raise UPDPError(
                f"The base configuration has architecture = {short(value)}, expected the plain name of a timm model: "
                "do not use this model."
            )


def _is_plain_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.]+", value) is not None


def _is_floating(dtype: Any) -> bool:
    return str(dtype).removeprefix("torch.") in FLOATING_DTYPES
