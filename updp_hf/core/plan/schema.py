"""Dataclasses from JSON values of any origin: each field gets a value of its type, or an error says which does not."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from updp_hf.errors import UPDPError
from updp_hf.model.layout_updp import short

__all__ = ["from_values"]

LARGEST = 2**63 - 1
LONGEST = 2**12
"""Number of characters of a text; that of a slot is compared with all that it lies in."""

T = TypeVar("T")


def from_values(cls: type[T], document: Any) -> T:
    """Return an instance of the dataclass `cls` with the values in `document`, an object of JSON.

    Raises:
        ValueError: a field is missing, unknown, or has a value that is not of its type.
    """
    if not isinstance(document, Mapping):
        raise UPDPError(f"{short(document)} is no {cls.__name__}")
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    needed = {name for name, field in known.items() if field.default is field.default_factory is MISSING}
    for problem, names in (("unknown", set(document) - set(known)), ("missing", needed - set(document))):
        if names:
            raise UPDPError(f"{problem} in a {cls.__name__}: {short(sorted(map(str, names)))}")
    hints = get_type_hints(cls)
    return cls(**{name: _typed(value, hints[name], f"{cls.__name__}.{name}") for name, value in document.items()})


def _typed(value: Any, hint: Any, name: str) -> Any:
    """Return `value` as one of type `hint`, for the types that the documents of this package have."""
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, Union):  # of None and one other type
        return None if value is None else _typed(value, next(t for t in inner if t is not types.NoneType), name)
    if is_dataclass(hint):
        return from_values(hint, value)  # type: ignore[arg-type]
    if isinstance(hint, type) and issubclass(hint, StrEnum) and value in list(hint):
        return hint(value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_typed(each, inner[0], name) for each in value)
    if origin is list and isinstance(value, list):
        return [_typed(each, inner[0], name) for each in value]
    if origin in (dict, Mapping) and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _typed(each, inner[1], name) for key, each in value.items()}
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > LARGEST
    if (
        (origin is Literal and value in inner)
        or (hint is str and isinstance(value, str) and len(value) <= LONGEST)
        or (hint is int and is_number and isinstance(value, int))
        or (hint is float and (is_number or value in (float("inf"), float("-inf"))))
    ):
        return value
    raise UPDPError(f"{name} is {short(value)}, expected {getattr(hint, '__name__', hint)}")
