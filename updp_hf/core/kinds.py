"""The kinds of sites: a new one is a class in a file of its own and a line here."""

from enum import StrEnum
from typing import Any

from updp_hf.core.depth.attention import Attention
from updp_hf.core.depth.blocks import Block
from updp_hf.core.depth.branches import Branch
from updp_hf.core.depth.runs import Run
from updp_hf.core.plan.site import Site
from updp_hf.errors import UPDPError

__all__ = ["DEFAULT_FORM", "KINDS", "Form", "kind_of_form"]

KINDS: dict[str, type[Site]] = {
    Run.kind: Run,
    Branch.kind: Branch,
    Attention.kind: Attention,
    Block.kind: Block,
}

Form: Any = StrEnum.__call__(
    "Form", {form.upper().replace("-", "_"): form for kind in KINDS.values() for form in kind.forms}
)
"""What closing a site leaves behind: the forms of all kinds. Type checkers want the members of an enum written out."""

DEFAULT_FORM = "merge-keep-norm"
"""Measured: where there is a norm to keep, it keeps more accuracy than `merge` at the same latency."""


def kind_of_form(form: str) -> type[Site]:
    """Return the kind of site that has the form `form`.

    Raises:
        UPDPError: there is none.
    """
    for kind in KINDS.values():
        if form in kind.forms:
            return kind
    known = [str(name) for kind in KINDS.values() for name in kind.forms]
    raise UPDPError(f"The form is {form!r}, expected one of {known}.")
