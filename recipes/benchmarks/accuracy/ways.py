"""The ways to make a network faster that the accuracy benchmark compares."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UPDP, PAPER, ABRUPT = "updp", "paper", "abrupt"
DROP, TORCH_PRUNING, SMALLER = "block drop", "torch-pruning", "smaller"
WAYS = (UPDP, PAPER, ABRUPT, DROP, TORCH_PRUNING, SMALLER)
"""UPDP as by default; closest to the paper, with the checkpoint's own weights, norms that become BatchNorms and a ramp
over half of the training, but blocks chosen as by default and no activation behind them; with the checkpoint's own
weights and all non-linearities gone at once, as DepthShrinker removes those that it has learned to remove; whole blocks
left out; channels left out by Torch-Pruning; a narrower network from scratch, for as many steps as baseline and
fine-tuning together and with the baseline's learning rate."""
BASELINE = "baseline"
"""The way that leaves nothing out: what the others are fine-tuned from, fine-tuned as long as they are."""
AT_ONCE = {"ramp": "constant", "ramp_end": 0.0}
HOW: dict[str, dict[str, Any]] = {UPDP: {}, PAPER: {"ramp_end": 0.5}, ABRUPT: AT_ONCE, DROP: AT_ONCE}
"""Options of `UPDPTrainingArguments` that are others than by default."""
LEVELS = 3
"""How often something is pruned by UPDP: a third of the sites, two thirds, all."""


@dataclass(frozen=True)
class Network:
    """One way to make a network faster, and how far it goes."""

    way: str
    amount: float  # sites closed, blocks dropped, fraction of the channels left out, width
    level: int  # of UPDP, whose latency it has; for dropped blocks, which come whole, that is the nearest

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Network":
        """Return the network that an entry of the stage `sizes` is about."""
        return cls(entry["way"], entry["amount"], entry["level"])

    @property
    def key(self) -> str:
        return f"{self.way} {self.amount:g}"
