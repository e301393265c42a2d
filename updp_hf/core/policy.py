"""How far each gate is closed at each step: functions of the step, so that resumed runs and all ranks agree."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

__all__ = ["Policy", "Schedule", "anneal", "ramp"]

Schedule = Callable[[float], float]
"""From progress in [0, 1], the fraction of all optimizer steps that are done, to λ in [0, 1]."""
Policy = Callable[[int, int], Mapping[str, float]]
"""From `(step, total_steps)` to λ by the path of each gate."""


def ramp(shape: Literal["linear", "cosine", "constant"] = "linear", start: float = 0.0, end: float = 0.5) -> Schedule:
    """Return the schedule that takes λ from 0 at `start` to 1 at `end`, both fractions of training.

    `linear` is p, `cosine` is (1 - cos πp) / 2 with p the progress between start and end; `constant` jumps from 0 to
    1 at `end`. VanillaNet (arXiv 2305.12972) anneals its activations with the first two; UPDP's schedule is not known.

    Raises:
        ValueError: not 0 <= start <= end <= 1, or an unknown shape.
    """
    if not 0.0 <= start <= end <= 1.0:
        raise ValueError(
            f"The ramp goes from {start} to {end}, expected 0 <= start <= end <= 1 (fractions of training)."
        )
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda p: p,
        "cosine": lambda p: (1 - math.cos(math.pi * p)) / 2,
        "constant": lambda p: 0.0,
    }
    if shape not in shapes:
        raise ValueError(f"The ramp's shape is {shape!r}, expected one of {sorted(shapes)}.")
    curve = shapes[shape]

    def schedule(progress: float) -> float:
        if progress >= end:
            return 1.0
        return curve((progress - start) / (end - start)) if progress > start else 0.0

    return schedule


def anneal(gates: Sequence[str], schedule: Schedule) -> Policy:
    """Return the policy of progressive training (UPDP, step 3): every gate, named by its path, follows `schedule`."""

    def policy(step: int, total_steps: int) -> Mapping[str, float]:
        return dict.fromkeys(gates, schedule(min(step / max(total_steps, 1), 1.0)))

    return policy
