"""A site: one thing that can be removed from a model. Each kind of site is a class of its own, in a file of its own."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from updp_hf.core.cost import LatencyTable
from updp_hf.core.gates.gate import Gate
from updp_hf.core.graph.structure import Structure
from updp_hf.errors import PlanError

__all__ = ["Saving", "Site", "Start", "Unsupported", "outermost"]

Start = Literal["inherit", "fit"]
"""How a pruned side starts: see `Plan.start`."""


@dataclass(frozen=True)
class Saving:
    """What removing a site saves; negative where the pruned model is the more expensive one."""

    macs: int = 0  # multiply-accumulates per image
    parameters: int = 0
    seconds: float | None = None  # of latency, where that was measured

    @property
    def compute(self) -> float:
        """What decides whether a site is worth removing: the latency where it was measured, else the MACs."""
        return self.macs if self.seconds is None else self.seconds


@dataclass(frozen=True)
class Unsupported:
    """A block that has no site of a form, and the reason."""

    form: str
    block: str
    reason: str


@dataclass(frozen=True)
class Site(ABC):
    """A place that can be closed. Paths are slots of the stock architecture.

    A kind of site is a subclass with the methods below and a line in `updp_hf.core.kinds`. It says for itself where it
    is found, whether it fits a model, which gates close it and what is left; everybody else loops over sites.
    """

    kind: ClassVar[str]
    """What the JSON of a plan calls it."""
    forms: ClassVar[Mapping[str, str]]
    """What closing may leave: the name of each form, and one phrase for tables and cards."""
    looked_for: ClassVar[str]
    """What a block needs to have a site of this kind, for the reasons of those that have none."""
    outcome: ClassVar[str]
    """What becomes of its block, for pictures."""
    drops_block: ClassVar[bool] = False
    """Whether nothing is left of the block."""

    form: str
    block: str  # path of the enclosing block: the site's name for people
    slots: tuple[str, ...]  # everything that it touches, in order of execution; sites that share a slot clash
    channels: int = 0  # of what the block returns
    channel_axis: int = -1  # of what the block returns, 1 or -1
    saving: Saving = field(default=Saving(), compare=False)

    def __post_init__(self) -> None:
        if self.form not in self.forms:
            raise PlanError(
                f"A site of the kind {self.kind!r} has the form {str(self.form)!r}, expected one of {[*self.forms]}."
            )
        if not self.slots:
            raise PlanError(f"{self} has no slots, so there is nothing to close: take it out of the plan.")

    @property
    def left(self) -> str:
        """What is left of the site, in one phrase."""
        return self.forms[self.form]

    @property
    def closed(self) -> tuple[str, ...]:
        """The slots whose function is taken away; empty if that is all of it."""
        return ()

    @property
    def saves_compute(self) -> bool:
        """Whether removing the site makes the model cheaper; a site that does not is taken by explicit plans only."""
        return self.saving.compute > 0

    @classmethod
    def find(
        cls, structure: Structure, form: str, latencies: LatencyTable | None = None
    ) -> Iterator["Site | Unsupported"]:
        """Yield, block by block, the sites of `form`, or the reason why there is none."""
        for block in structure.blocks():
            found: list[Site | Unsupported] = list(cls.find_in(structure, block, form, latencies))
            yield from found or [cls.unsupported(structure, block, form)]

    @classmethod
    def unsupported(cls, structure: Structure, block: str, form: str) -> Unsupported:
        """Say why `block` has no site of `form`."""
        reasons = cls.why_none(structure, block)
        return Unsupported(form, block, "; ".join([f"looked for {cls.looked_for}", *reasons[:3]]))

    @classmethod
    def why_none(cls, structure: Structure, block: str) -> list[str]:
        """Return the reasons why `block` has no site, the most telling first."""
        return structure.reasons.get(block, [])

    @classmethod
    @abstractmethod
    def find_in(
        cls, structure: Structure, block: str, form: str, latencies: LatencyTable | None = None
    ) -> Iterator["Site"]:
        """Yield the sites in `block`; by their latency if `latencies` is given, else by their MACs."""

    @abstractmethod
    def fits(self, structure: Structure) -> str:
        """Return "" if the model with this structure can be closed here, else the reason why not."""

    @abstractmethod
    def gates(self, model: nn.Module, start: Start) -> dict[str, Gate]:
        """Build the gates that close the site, by their slots."""

    @abstractmethod
    def merged(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return what stands in the slots of the closed `model` after merging; a slot inside another goes with it."""

    def misplaced(self, structure: Structure) -> str:
        """Return "" if the slots are modules in the block and called, else the reason why not: a part of `fits`."""
        for path in (self.block, *self.slots):
            if path not in structure.modules:
                return f"the model has no module {path!r}"
            if not f"{path}.".startswith(f"{self.block}."):
                return f"{path!r} lies outside of the block {self.block!r}"
            if path in self.slots and path not in structure.seen:
                return f"{path!r} is never called"
        return "" if structure.graph.within(self.block) else f"{self.block!r} is never called"

    def __str__(self) -> str:
        return f"{self.block} ({self.form})"


def outermost(paths: Sequence[str]) -> list[str]:
    """Return those of `paths` that do not lie inside another one of them."""
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
