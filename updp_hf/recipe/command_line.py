"""Command lines of recipes: dataclasses, YAML or JSON files, and options that win over the files."""

import argparse
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from transformers import HfArgumentParser

__all__ = ["Layer", "parse_arguments"]

Layer: TypeAlias = Path | Mapping[str, Any]
"""Values by the names of the fields, or the file that holds them."""


def parse_arguments(
    *types: type, argv: Sequence[str] | None = None, under: Sequence[Layer] = (), over: Sequence[Layer] = ()
) -> tuple[Any, ...]:
    """Parse the command line into one object of each dataclass in `types`.

    `--config file.yaml` (or `.json`) sets values by the names of the fields; options on the command line win. What is
    said of one of a dataclass's `ALTERNATIVES`, groups of fields of which one can be given, takes the place of what
    was said before of the others.

    Args:
        *types: dataclasses; no two have a field of the same name.
        argv: the command line, by default that of this process.
        under: what holds unless `--config` says otherwise.
        over: what holds whatever `--config` says.

    Raises:
        SystemExit: an option or a key of a file is unknown, as argparse does it.
    """
    parser = HfArgumentParser(types, allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="YAML or JSON file with values for these options.")
    options = list(sys.argv[1:] if argv is None else argv)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    found, rest = finder.parse_known_args(options)
    layers = [*under, *([] if found.config is None else [found.config]), *over]
    known = {field.name: field for type_ in types for field in fields(type_) if field.init}
    values = _laid_over([_values_in(layer, known.keys(), parser) for layer in layers], rest, types)
    # What has no default is an option that has to be given: a file gives it in front of those of the command line.
    needed = [name for name in values if known[name].default is known[name].default_factory is MISSING]
    parser.set_defaults(**values)
    *parsed, _ = parser.parse_args_into_dataclasses(args=[*(f"--{name}={values[name]}" for name in needed), *rest])
    return tuple(parsed)


def _laid_over(layers: Iterable[Mapping[str, Any]], options: Sequence[str], types: Sequence[type]) -> dict[str, Any]:
    """Return what the layers say together, without what the options have alternatives to."""
    groups = [set(group) for type_ in types for group in getattr(type_, "ALTERNATIVES", ())]
    given = {option[2:].partition("=")[0].replace("-", "_") for option in options if option.startswith("--")}
    values: dict[str, Any] = {}
    for layer in (*layers, dict.fromkeys(given)):
        replaced = set().union(*(group for group in groups if group & layer.keys()))
        values = {name: value for name, value in values.items() if name not in replaced}
        values |= {name: value for name, value in layer.items() if name not in given}
    return values


def _values_in(layer: Layer, known: Collection[str], parser: HfArgumentParser) -> Mapping[str, Any]:
    if isinstance(layer, Mapping):
        return layer
    if not layer.is_file():
        parser.error(f"--config {layer}: there is no such file")
    content = yaml.safe_load(layer.read_text(encoding="utf-8")) or {}  # JSON is YAML too
    if not isinstance(content, dict):
        parser.error(f"--config {layer}: expected names and values, found a {type(content).__name__}")
    unknown = sorted(set(content) - set(known))
    if unknown:
        parser.error(f"{layer} has the keys {', '.join(unknown)}, which are no options of this recipe: see --help")
    return content
