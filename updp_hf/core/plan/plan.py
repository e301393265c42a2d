"""The plan: all that passes from selection to training, merging and the card. A frozen JSON document."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

from updp_hf.core.plan.schema import from_values
from updp_hf.core.plan.site import Form, Site
from updp_hf.errors import PlanError, UPDPError
from updp_hf.model.layout_updp import END_ACTIVATIONS, short

__all__ = ["Plan", "library_versions"]

FORMAT_VERSION = 1
_TUPLES = ("run", "activations", "norms", "norm_channels", "shared", "marked", "cropped")
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
    start: Literal["inherit", "fit"] = "inherit"
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
        dropped = next((site for site in self.sites if site.form is Form.BLOCK_DROP), None)
        if self.end_activation is not None and dropped is not None:
            raise PlanError(
                f"Nothing is left of {dropped} that an activation could follow: plan it without end_activation."
            )
        for site in self.sites:
            if site.outputs and site.form is Form.BRANCH_FIT:
                raise PlanError(
                    f"{site.container!r} returns a tuple of {site.outputs}, but the Linear fitted in its place would "
                    "return one tensor: choose another form."
                )
        slots: dict[str, Site] = {}
        around: dict[str, Site] = {}  # what those slots lie in
        for site in self.sites:
            for slot in site.run:
                clash = next((slots[path] for path in (slot, *_around(slot)) if path in slots), around.get(slot))
                if clash is not None:
                    raise PlanError(
                        f"The sites {clash} and {site} overlap in {slot!r}, but a slot can be closed once: "
                        "leave one of them out of the plan."
                    )
            for slot in site.run:
                slots[slot] = site
                around.update(dict.fromkeys(_around(slot), site))

    @property
    def blocks(self) -> list[str]:
        """The blocks in which something is pruned, in order."""
        return list(dict.fromkeys(site.block for site in self.sites))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {"format_version": FORMAT_VERSION, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            PlanError: the document is not a plan, or one of a newer format.
        """
        found = document.get("format_version") if isinstance(document, Mapping) else type(document).__name__
        if type(found) is not int or found != FORMAT_VERSION:
            raise PlanError(
                f"The plan has format version {short(found)}, but this version of updp_hf reads {FORMAT_VERSION}: "
                "make the plan again, or install the version that wrote it."
            )
        values = {name: value for name, value in document.items() if name != "format_version"}
        try:
            sites = values.get("sites")
            if isinstance(sites, list) and any(set(_TUPLES) - set(site) for site in sites if isinstance(site, Mapping)):
                raise UPDPError(f"each site needs {', '.join(_TUPLES)}")
            return from_values(cls, values)
        except PlanError:
            raise
        except ValueError as error:
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
            del site["params_saved"], site["macs_saved"], site["seconds_saved"], site["tokens"]
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def check(self, found: Iterable[Site]) -> None:
        """Compare the plan with the sites that a model has.

        Raises:
            PlanError: a site of the plan is not among them.
        """
        sites = list(found)
        for site in self.sites:
            if site not in sites:
                names = list(dict.fromkeys(str(s) for s in sites if s.form is site.form))
                shown = ", ".join(names[:3]) + (f" … {names[-1]}" if len(names) > 3 else "") or f"none of {site.form}"
                raise PlanError(
                    f"The plan names {site} with the slots {', '.join(site.run)}, but this model has the sites "
                    f"{shown}: was the plan made for another checkpoint?"
                )


def _around(slot: str) -> Iterator[str]:
    """Yield the paths of what `slot` lies in."""
    while slot := slot.rpartition(".")[0]:
        yield slot
