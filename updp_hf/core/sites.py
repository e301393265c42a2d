"""The nouns of the search: a site, the form that closing it leaves, a refusal."""

from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Form", "Refusal", "Site"]


class Form(StrEnum):
    """What closing a site leaves behind."""

    FFN = "ffn"
    """Norm, Linear, activation, Linear become one Linear: the norm closes to a BatchNorm, as in UPDP."""
    FFN_KEEP_NORM = "ffn-keep-norm"
    """The same with the norm in front kept: ours, and HetDPT's choice."""
    BRANCH_FIT = "branch-fit"
    """Any per-token branch, gated ones too, becomes one Linear fitted to it: ours."""
    ATTENTION_DROP = "attention-drop"
    """The attention branch becomes zero."""
    BLOCK_DROP = "block-drop"
    """The block becomes the identity."""


@dataclass(frozen=True)
class Site:
    """A place that can be closed. Paths are slots of the stock architecture."""

    form: Form
    block: str  # path of the enclosing block: the site's name for people
    run: tuple[str, ...]  # slots in order of execution; one map is left of them
    activations: tuple[str, ...] = ()  # those of `run` that close to the identity
    norms: tuple[str, ...] = ()  # those of `run` that close to a BatchNorm
    container: str | None = None  # the one module whose call is the run between norm and layer scale
    outputs: int = 0  # length of the tuple that `container` returns, 0 if it returns a tensor
    channels: int = 0  # of what the site returns
    tokens: int = field(default=0, compare=False)  # positions per image at which it does
    params_saved: int = field(default=0, compare=False)
    macs_saved: int = field(default=0, compare=False)  # multiply-accumulates per image

    def __str__(self) -> str:
        return f"{self.block} ({self.form})"


@dataclass(frozen=True)
class Refusal:
    """A block that has no site of a form, and why."""

    form: Form
    block: str
    reason: str
