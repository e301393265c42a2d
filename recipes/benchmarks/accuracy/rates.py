"""With which learning rate the accuracy benchmark fine-tunes a network: the best of those tried on the first seed."""

from collections.abc import Iterable
from typing import Any

from recipes.benchmarks.accuracy.record import Record
from recipes.benchmarks.accuracy.ways import Network

__all__ = ["HIGHEST", "RATES", "best_run", "nearest"]

RATES = (1.0, 0.3, 0.1)
"""Learning rates that are tried for fine-tuning, times that of the baseline."""
HIGHEST = 3.0
"""One that is tried, too, where the highest of these is the best."""


def best_run(network: Network, record: Record) -> dict[str, Any]:
    """Return the run of `network` with the least loss on the validation images."""
    tried = record.found.get("rates", {})
    runs = [tried.get(f"{network.key}, {factor}") for factor in RATES]
    if None in runs:
        raise ValueError(f"{record.file} has no learning rates for {network.key!r} yet: run the stage 'rates' first.")
    runs.append(tried.get(f"{network.key}, {HIGHEST}"))
    found: dict[str, Any] = min((run for run in runs if run), key=lambda run: run["validation_loss"])
    return found


def nearest(network: Network, others: Iterable[Network]) -> Network:
    """Return the one of `others` that goes the same way about as far as `network`."""
    same_way = [other for other in others if other.way == network.way]
    return min(same_way, key=lambda other: (abs(other.level - network.level), abs(other.amount - network.amount)))
