"""Command lines of recipes: dataclasses, a YAML or JSON file, and options that win over the file."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

__all__ = ["parse_arguments"]


def parse_arguments(*types: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse the command line into one object of each dataclass in `types`.

    `--config file.yaml` (or `.json`) sets values by the names of the fields; options on the command line win.

    Raises:
        SystemExit: an option or a key of the file is unknown, as argparse does it.
    """
    parser = HfArgumentParser(types)
    parser.add_argument("--config", type=Path, help="YAML or JSON file with values for these options.")
    options = list(sys.argv[1:] if argv is None else argv)
    from_file, rest = _split_config(parser, options)
    known = {action.dest for action in parser._actions}
    unknown = sorted(set(from_file) - known)
    if unknown:
        parser.error(f"the file has the keys {', '.join(unknown)}, which are no options of this recipe: see --help")
    for action in parser._actions:
        action.required = action.required and action.dest not in from_file
    parser.set_defaults(**from_file)
    *parsed, _ = parser.parse_args_into_dataclasses(args=rest)
    return tuple(parsed)


def _split_config(parser: HfArgumentParser, options: list[str]) -> tuple[dict[str, Any], list[str]]:
    if "--config" not in options:
        return {}, options
    index = options.index("--config")
    if index + 1 == len(options):
        parser.error("--config needs the name of a file")
    file = Path(options[index + 1])
    if not file.is_file():
        parser.error(f"--config {file}: there is no such file")
    import yaml  # an extra, needed for this option alone; JSON is YAML too

    content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    if not isinstance(content, dict):
        parser.error(f"--config {file}: expected names and values, found a {type(content).__name__}")
    return content, options[:index] + options[index + 2 :]
