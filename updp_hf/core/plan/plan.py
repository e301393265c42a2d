"""The plan: all that passes from selection to training, merging and the card. A frozen JSON document."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from updp_hf.core.graph.structure import Structure
from updp_hf.core.kinds import KINDS
from updp_hf.core.plan.old_plans import upgraded
from updp_hf.core.plan.schema import from_values
from updp_hf.core.plan.site import Site, Start
from updp_hf.errors import PlanError, UPDPError
from updp_hf.model.layout_updp import short
from updp_hf.model.modules_updp import END_ACTIVATIONS

__all__ = ["Plan", "library_versions"]

FORMAT_VERSION = 2
_LIBRARIES = ("updp-hf", "torch", "transformers", "timm")


def library_versions(names: Iterable[str] = _LIBRARIES) -> dict[str, str]:
    """Return the installed versions of the libraries `names`, those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Plan:
    """The sites to close, in order of execution, and how each of them starts."""

    sites: tuple[Site, ...]
    start: Start = "fit"
    """`inherit`: the pruned side shares the checkpoint's weights, as in UPDP; `fit`: it is a Linear or a convolution
    fitted to them, with a BatchNorm behind it that merging folds."""
    end_activation: str | None = None
    """Activation that follows each pruned block behind a BatchNorm, as in UPDP; None adds nothing."""
    base_model: str = ""
    revision: str | None = None
    versions: Mapping[str, str] = field(default_factory=library_versions, compare=False)

    def __post_init__(self) -> None:
        if self.start not in ("inherit", "fit"):
            raise PlanError(f"The plan's start is {self.start!r}, expected 'inherit' or 'fit'.")
        if self.end_activation not in (None, *END_ACTIVATIONS):
            raise PlanError(
                f"The plan's end activation is {self.end_activation!r}, expected None or one of "
                f"{sorted(END_ACTIVATIONS)}."
            )
        dropped = next((site for site in self.sites if site.drops_block), None)
        if self.end_activation is not None and dropped is not None:
            raise PlanError(
                f"Nothing is left of {dropped} that an activation could follow: plan it without end_activation."
            )
        slots: dict[str, Site] = {}
        around: dict[str, Site] = {}  # what those slots lie in
        for site in self.sites:
            for slot in site.slots:
                clash = next((slots[path] for path in (slot, *_around(slot)) if path in slots), around.get(slot))
                if clash is not None:
                    raise PlanError(
                        f"The sites {clash} and {site} overlap in {slot!r}, but a slot can be closed once: "
                        "leave one of them out of the plan."
                    )
            for slot in site.slots:
                slots[slot] = site
                around.update(dict.fromkeys(_around(slot), site))

    @property
    def blocks(self) -> list[str]:
        """The blocks in which something is pruned, in order."""
        return list(dict.fromkeys(site.block for site in self.sites))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        document = json.loads(json.dumps(asdict(self)))
        sites = [{"kind": site.kind, **values} for site, values in zip(self.sites, document["sites"], strict=True)]
        return {"format_version": FORMAT_VERSION, **document, "sites": sites}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            PlanError: the document is not a plan, or one of a newer format.
        """
        found = document.get("format_version") if isinstance(document, Mapping) else type(document).__name__
        if type(found) is not int or not 1 <= found <= FORMAT_VERSION:
            raise PlanError(
                f"The plan has format version {short(found)}, but this version of updp_hf reads {FORMAT_VERSION} and "
                "older ones: make the plan again, or install the version that wrote it."
            )
        values = {name: value for name, value in document.items() if name != "format_version"}
        try:
            if not isinstance(values.get("sites"), list):
                raise UPDPError(f"its sites are {short(values.get('sites'))}")
            sites = [_site(upgraded(site) if found == 1 else site) for site in values["sites"]]
            start = {"start": "inherit"} if found == 1 else {}  # the default of then
            return replace(from_values(cls, {**start, **values, "sites": []}), sites=tuple(sites))
        except PlanError:
            raise
        except UPDPError as error:
            raise PlanError(f"The plan cannot be read ({error}): was the file edited by hand?") from error

    def save(self, file: str | Path) -> None:
        """Write the plan as JSON."""
        Path(file).write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read a plan from a JSON file.

        Raises:
            PlanError: the file holds no plan.
        """
        try:
            return cls.from_dict(json.loads(Path(file).read_text(encoding="utf-8")))
        except PlanError:
            raise
        except (RecursionError, ValueError) as error:  # of `json`, or of bytes that are no text
            raise PlanError(f"{file} is not JSON ({error}), expected a plan written by `Plan.save`.") from error

    def digest(self) -> str:
        """Return the SHA-256 of what the plan does to a model: equal for plans that prune alike."""
        kept = {k: v for k, v in self.to_dict().items() if k not in ("versions", "base_model", "revision")}
        for site in kept["sites"]:
            del site["saving"]
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def check(self, structure: Structure) -> None:
        """Compare the plan with a model.

        Raises:
            PlanError: a site of the plan does not fit it.
        """
        for site in self.sites:
            if reason := site.fits(structure):
                raise PlanError(
                    f"The plan closes {site}, which does not fit this model, because {reason}: was the plan made for "
                    "another checkpoint?"
                )


def _site(document: Any) -> Site:
    if not isinstance(document, Mapping) or document.get("kind") not in [*KINDS]:
        kind = document.get("kind") if isinstance(document, Mapping) else document
        raise UPDPError(f"a site is of the kind {short(kind)}, expected one of {[*KINDS]}")
    return from_values(KINDS[document["kind"]], {name: value for name, value in document.items() if name != "kind"})


def _around(slot: str) -> Iterator[str]:
    """Yield the paths of what `slot` lies in."""
    while slot := slot.rpartition(".")[0]:
        yield slot
