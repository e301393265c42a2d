"""The selector that trains a supernet and searches it for the best choice: UPDP's first two steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from updp_hf.core.plan.plan import Plan
from updp_hf.processes import split_over_processes
from updp_hf.selection.score_history import ScoreHistory
from updp_hf.selection.scores import label_fit

__all__ = ["SUPERNET", "Supernet", "SupernetTraining"]

SUPERNET = "supernet"
"""The selector that trains a supernet and searches it, beside `SELECTORS`."""


@dataclass(frozen=True)
class SupernetTraining:
    """How a supernet is trained, and where the scores of its choices are kept."""

    train: Callable[[Plan, Sequence[Any]], nn.Module]
    """From the plan of all candidates and images to calibrate with to the trained supernet."""
    subject: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that tell this training from others."""
    file: Path | None = None
    """Where scores are kept, so that a search that was interrupted goes on; nowhere by default."""
    disable_tqdm: bool = False

    def run(self, plan: Plan, images: Sequence[Any], processes: PartialState | None = None) -> "Supernet":
        """Train, and return the supernet with the fitness of its choices on labelled `images`.

        Raises:
            ValueError: the images have no labels, or the scores in `file` are those of another search.
        """
        network = self.train(plan, images)
        fitness = ScoreHistory(
            split_over_processes(label_fit(network, images), processes),
            {"sites": plan.digest(), **self.subject},
            file=self.file,
            processes=processes,
            disable_tqdm=self.disable_tqdm,
        )
        return Supernet(network, fitness)


@dataclass(frozen=True)
class Supernet:
    """A trained supernet, and the fitness of its choices."""

    network: nn.Module
    fitness: ScoreHistory
