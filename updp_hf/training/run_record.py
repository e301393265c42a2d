"""What a checkpoint tells of its run beside weights and plan, for when it is resumed."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils import logging

from updp_hf.core.plan.schema import from_values
from updp_hf.reporting.report import SelectionFacts
from updp_hf.training.arguments import UPDPTrainingArguments
from updp_hf.training.run_facts import changed_arguments

__all__ = ["RUN_NAME", "read_run_record", "write_run_record"]

logger = logging.get_logger(__name__)

RUN_NAME = "updp_run.json"


def write_run_record(folder: Path, args: UPDPTrainingArguments, selection: SelectionFacts | None) -> None:
    """Write the options of the run, and how its sites were selected, into the checkpoint `folder`."""
    record = {"arguments": _options(args), "selection": None if selection is None else asdict(selection)}
    (folder / RUN_NAME).write_text(json.dumps(record), encoding="utf-8")


def read_run_record(folder: str | Path, args: UPDPTrainingArguments) -> SelectionFacts | None:
    """Return how the sites of the run in `folder` were selected, and warn of options that are others now."""
    file = Path(folder) / RUN_NAME
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    before, now = record["arguments"], _options(args)
    changed = [
        f"{name} {now.get(name, 'by default')} (was {before.get(name, 'by default')})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        logger.warning(f"The run goes on with other options than it was begun with: {', '.join(changed)}.")
    return from_values(SelectionFacts, record["selection"]) if record["selection"] else None


def _options(args: UPDPTrainingArguments) -> dict[str, Any]:
    """Return the options that are not the defaults, as JSON values."""
    options: dict[str, Any] = json.loads(json.dumps(changed_arguments(args), default=str))
    return options
