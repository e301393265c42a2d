"""Under what conditions a benchmark ran, and where its results go."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from updp_hf.core.plan.plan import library_versions
from updp_hf.reporting.measure import device_name

__all__ = ["conditions_of", "write_json"]


def conditions_of(options: Any) -> dict[str, Any]:
    """Return what has to be known of a run beside its results; `options` is a dataclass with a `device`."""
    return {
        "arguments": {name: value for name, value in asdict(options).items() if name != "output"},
        "device": device_name(torch.device(options.device)),
        "threads": torch.get_num_threads(),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "convolutions": torch.backends.cudnn.allow_tf32},
        "versions": library_versions(),
    }


def write_json(results: dict[str, Any], file: str) -> None:
    Path(file).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
