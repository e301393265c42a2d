"""Plans of release 0.1, whose sites had the fields of all kinds at once."""

from collections.abc import Mapping
from typing import Any

from updp_hf.errors import UPDPError
from updp_hf.model.layout_updp import short

__all__ = ["upgraded"]

_KINDS = {
    "merge": "run",
    "merge-keep-norm": "run",
    "merge-whole-kernels": "run",
    "branch-fit": "branch",
    "attention-drop": "attention",
    "block-drop": "block",
}
_KEPT = {
    "run": ("activations", "norms", "norm_channels", "cropped"),
    "branch": (),
    "attention": ("outputs",),
    "block": ("outputs",),
}
_SAVING = {"macs_saved": "macs", "params_saved": "parameters", "seconds_saved": "seconds"}
_TUPLES = ("run", "activations", "norms", "norm_channels", "shared", "marked", "cropped")


def upgraded(site: Any) -> dict[str, Any]:
    """Return a site of a plan of format version 1 as one of version 2, both as JSON values.

    Raises:
        UPDPError: it is none.
    """
    if not isinstance(site, Mapping) or not all(isinstance(site.get(name), list) for name in _TUPLES):
        raise UPDPError(f"{short(site)} is no site, which needs {', '.join(_TUPLES)}")
    form = site.get("form")
    if not isinstance(form, str) or form not in _KINDS:
        raise UPDPError(f"a site has the form {short(form)}, expected one of {[*_KINDS]}")
    kind = _KINDS[form]
    found = {name: site[name] for name in ("form", "block", "channels", "channel_axis", *_KEPT[kind]) if name in site}
    saving = {new: site[old] for old, new in _SAVING.items() if old in site}
    return {"kind": kind, **found, **_with_shared(site, found), "saving": saving}


def _with_shared(site: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the slots, with the activations that were closed at one of several calls: no model fits these any more."""
    slots, shared = [], list(site["shared"])
    for slot in site["run"]:
        slots.append(slot)
        if slot in site["marked"] and shared:
            slots.append(shared.pop(0))
    return {"slots": slots, **({"activations": [*found["activations"], *site["shared"]]} if site["shared"] else {})}
