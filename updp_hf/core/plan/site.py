"""The nouns of the search: a site, the form that closing it leaves, a refusal."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["DEFAULT_FORM", "Form", "Refusal", "Site", "outermost"]


class Form(StrEnum):
    """What closing a site leaves behind."""

    MERGE = "merge"
    """Norms close to BatchNorms and other non-linearities to the identity, as in UPDP; the run becomes one Linear or
    one convolution. All kernels but the largest are cropped to their centres where that is cheaper: ours."""
    MERGE_KEEP_NORM = "merge-keep-norm"
    """The same with the norm in front kept: ours, and HetDPT's choice."""
    MERGE_WHOLE_KERNELS = "merge-whole-kernels"
    """The same as `merge` with no kernel cropped: two 3×3 convolutions become one 5×5."""
    BRANCH_FIT = "branch-fit"
    """Any per-token branch, gated ones too, becomes one Linear fitted to it: ours."""
    ATTENTION_DROP = "attention-drop"
    """The attention branch becomes zero."""
    BLOCK_DROP = "block-drop"
    """The block becomes the identity."""

    @property
    def merges(self) -> bool:
        """Whether a run of affine maps is folded into one."""
        return self in (Form.MERGE, Form.MERGE_KEEP_NORM, Form.MERGE_WHOLE_KERNELS)


DEFAULT_FORM = Form.MERGE_KEEP_NORM
"""Measured: where there is a norm to keep, it keeps more accuracy than `merge` at the same latency."""


@dataclass(frozen=True)
class Site:
    """A place that can be closed. Paths are slots of the stock architecture."""

    form: Form
    block: str  # path of the enclosing block: the site's name for people
    run: tuple[str, ...]  # slots in order of execution; one map is left of them
    activations: tuple[str, ...] = ()  # those of `run` that close to the identity
    norms: tuple[str, ...] = ()  # those of `run` that close to a BatchNorm
    norm_channels: tuple[int, ...] = ()  # of each of `norms`
    shared: tuple[str, ...] = ()  # activations that close at one of their calls, and are called elsewhere
    marked: tuple[str, ...] = ()  # those of `run` that tell `shared` ones to
    cropped: tuple[str, ...] = ()  # those of `run` that are cropped to their centre tap
    container: str | None = None  # the one module that a branch or a block is
    outputs: int = 0  # length of the tuple that `container` returns, 0 if it returns a tensor
    channels: int = 0  # of what the block returns
    channel_axis: int = -1  # of what the block returns, 1 or -1
    tokens: int = field(default=0, compare=False)  # positions per image at which the site returns something
    params_saved: int = field(default=0, compare=False)
    macs_saved: int = field(default=0, compare=False)  # multiply-accumulates per image
    seconds_saved: float | None = field(default=None, compare=False)  # of latency, where that was measured

    @property
    def pays(self) -> bool:
        """Whether closing the site makes the model cheaper; one that does not is taken by explicit plans only."""
        return (self.macs_saved if self.seconds_saved is None else self.seconds_saved) > 0

    def __str__(self) -> str:
        return f"{self.block} ({self.form})"


@dataclass(frozen=True)
class Refusal:
    """A block that has no site of a form, and why."""

    form: Form
    block: str
    reason: str


def outermost(paths: Sequence[str]) -> list[str]:
    """Return those of `paths` that do not lie inside another one of them."""
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
