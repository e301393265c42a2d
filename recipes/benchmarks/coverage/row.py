"""What the benchmark of coverage measures of one model."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """What was measured of one model. None: it did not come to that."""

    name: str
    stage: str = "build"  # what is being done, "done" at the end
    model: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    image_size: int = 0
    exported: bool | None = None
    sites: int = 0  # of the form `merge`
    cheap: int = 0  # those that save multiply-accumulates
    form: str = ""  # the form that was closed
    closed: int = 0
    gate_error: float | None = None
    merge_errors: dict[str, float] = field(default_factory=dict)  # by dtype, the largest of logits and blocks
    reloaded: bool | None = None
    macs_before: int = 0
    macs_after: int = 0
    refusals: dict[str, int] = field(default_factory=dict)  # number of blocks by cause
    why_not: str = ""  # why no site of the form `merge` pays
    failure: str = ""  # what ended the measurement before it was done
    seconds: float = 0.0
