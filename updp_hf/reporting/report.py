"""The facts of one run, written beside the merged model. No number in a card comes from anywhere else."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from updp_hf.core.cost import LatencyTable
from updp_hf.core.plan.plan import FORMAT_VERSION, Plan, library_versions
from updp_hf.core.plan.schema import from_values
from updp_hf.core.plan.site import Site
from updp_hf.errors import UPDPError
from updp_hf.reporting.tables import latency_facts

__all__ = [
    "KEPT",
    "REPORT_NAME",
    "Cost",
    "HeldOutSet",
    "LatencyConditions",
    "ModelFacts",
    "OnnxFacts",
    "Report",
    "SelectionFacts",
    "TrainingFacts",
]

REPORT_NAME = "updp_report.json"
KEPT = "kept"
"""What became of a block in which nothing was pruned."""


@dataclass(frozen=True)
class Cost:
    """What a model costs; None where it was not measured."""

    parameters: int
    macs: int  # multiply-accumulates per image
    latency: dict[str, float] | None = None  # median seconds of one forward, by batch size

    def facts(self) -> dict[str, str]:
        """Return the numbers as people read them."""
        return {
            "parameters": f"{self.parameters / 1e6:.2f} M",
            "MACs per image": f"{self.macs / 1e6:.1f} M",
            **latency_facts(self.latency or {}),
        }


@dataclass(frozen=True)
class LatencyConditions:
    """How latencies were measured."""

    device: str = "device not recorded"
    dtype: str = "dtype not recorded"
    threads: int | None = None
    rounds: int | None = None
    statistic: str = "median"
    mode: str = "eager"

    def __str__(self) -> str:
        known = {name: value for name, value in asdict(self).items() if value is not None and name != "mode"}
        return ", ".join(f"{name}: {value}" for name, value in known.items())


@dataclass(frozen=True)
class ModelFacts:
    """The class of the unpruned model, that of the merged one, and the architecture if it is one of timm's."""

    base_class: str | None = None
    merged_class: str | None = None
    timm_architecture: str | None = None


@dataclass(frozen=True)
class SelectionFacts:
    """How the sites were chosen."""

    selector: str | None = None
    budget: str | None = None
    candidates: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)  # why other blocks were no candidates, by block
    seconds: float | None = None
    speed_up: float | None = None  # of the merged model, if one was asked for


@dataclass(frozen=True)
class TrainingFacts:
    """The schedule of λ, how long training was and where it ran."""

    ramp: str
    ramp_start: float
    ramp_end: float
    steps: int
    epochs: float
    processes: int
    device: str
    steps_done: int | None = None
    seconds: float | None = None  # None if not all of them were counted


@dataclass(frozen=True)
class HeldOutSet:
    """The images that were evaluated on."""

    name: str | None = None
    id: str | None = None  # on the Hub
    split: str | None = None
    images: int | None = None


@dataclass(frozen=True)
class OnnxFacts:
    """What exporting to ONNX measured."""

    opset: int
    difference: float  # from PyTorch's logits, relative to the largest one
    latency: dict[str, dict[str, float]] = field(default_factory=dict)  # median seconds by runtime and batch size
    conditions: LatencyConditions | None = None


@dataclass(frozen=True)
class Report:
    """The facts of one run: None and empty mean "not measured" or "not recorded"."""

    plan: dict[str, Any]  # as `Plan.to_dict` writes it
    before: Cost
    after: Cost
    model: ModelFacts | None = None
    blocks: list[str] = field(default_factory=list)  # of the unpruned network, in order of execution
    merge_error: float | None = None
    metrics_before: dict[str, Any] = field(default_factory=dict)
    metrics_after: dict[str, Any] = field(default_factory=dict)
    metrics_without_training: dict[str, Any] = field(default_factory=dict)
    latency_conditions: LatencyConditions | None = None
    latencies: LatencyTable | None = None  # by which the sites were chosen, if they were
    selection: SelectionFacts | None = None  # None if a plan was given
    arguments: dict[str, Any] = field(default_factory=dict)  # those that differ from the defaults
    training: TrainingFacts | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # step, λ and metrics of each evaluation
    evaluated_on: HeldOutSet | None = None
    metadata: dict[str, Any] = field(default_factory=dict)  # for the head of the card: licence, datasets, tags
    onnx: OnnxFacts | None = None
    seed: int | None = None
    weights: str | None = None  # SHA-256 of the weights that all this is true of
    versions: dict[str, str] = field(default_factory=library_versions)

    @property
    def sites(self) -> tuple[Site, ...]:
        """What was pruned.

        Raises:
            PlanError: the plan cannot be read.
        """
        return Plan.from_dict({"format_version": FORMAT_VERSION, **self.plan}).sites if self.plan.get("sites") else ()

    @property
    def outcomes(self) -> dict[str, str]:
        """What became of each block of the unpruned network, in order of execution: `KEPT`, or what its sites say."""
        found: dict[str, list[str]] = {block: [] for block in self.blocks}
        for site in self.sites:
            found.setdefault(site.block, []).append(site.outcome)
        return {block: " and ".join(dict.fromkeys(outcomes)) or KEPT for block, outcomes in found.items()}

    def save(self, folder: str | Path) -> None:
        """Write the report into `folder`."""
        (Path(folder) / REPORT_NAME).write_text(self._document() + "\n", encoding="utf-8")

    def as_saved(self) -> Self:
        """Return the report as it will be read again: what is no JSON value as text, everything in order."""
        return self.from_dict(json.loads(self._document()))

    def _document(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True, default=str)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Read the JSON values that `save` wrote, in this version or in an earlier one.

        Raises:
            ValueError: they are not those of a report.
        """
        if isinstance(document, Mapping):
            # Release 0.1 wrote an empty object for a part that was not measured.
            document = {name: None if name in _PARTS and value == {} else value for name, value in document.items()}
        try:
            return from_values(cls, document)
        except ValueError as error:
            raise UPDPError(f"The report cannot be read ({error}): was the file edited by hand?") from error

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the report in `folder`.

        Raises:
            ValueError: its file holds no report.
        """
        file = Path(folder) / REPORT_NAME
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except (RecursionError, ValueError) as error:  # of `json`, or of bytes that are no text
            raise UPDPError(f"{file} is not JSON ({error}), expected a report written by `Report.save`.") from error
        return cls.from_dict(document)


_PARTS = ("evaluated_on", "latencies", "latency_conditions", "model", "onnx", "selection", "training")
