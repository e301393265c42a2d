"""How far the gates are closed at each step: functions of the step, so that resumed runs and all processes agree."""

import math
import random
from collections.abc import Callable
from typing import Literal

from updp_hf.core.plan.budget import Choice
from updp_hf.errors import UPDPError

__all__ = ["RAMP_END", "Schedule", "ramp", "sandwich"]

Schedule = Callable[[float], float]
"""From progress in [0, 1], the fraction of all optimizer steps that are done, to λ in [0, 1]."""
RAMP_END = 0.1
"""Where a ramp ends by default, as a fraction of training; `recipes.benchmarks.accuracy` compares it with others."""


def ramp(
    shape: Literal["linear", "cosine", "constant"] = "linear", start: float = 0.0, end: float = RAMP_END
) -> Schedule:
    """Return the schedule that takes λ from 0 at `start` to 1 at `end`, both fractions of training.

    `linear` is p, `cosine` is (1 - cos πp) / 2 with p the progress between start and end; `constant` jumps from 0 to
    1 at `end`. VanillaNet (arXiv 2305.12972) anneals its activations with the first two; UPDP's schedule is not known.

    Raises:
        ValueError: not 0 <= start <= end <= 1, or an unknown shape.
    """
    if not 0.0 <= start <= end <= 1.0:
        raise UPDPError(
            f"The ramp goes from {start} to {end}, expected 0 <= start <= end <= 1 (fractions of training)."
        )
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda p: p,
        "cosine": lambda p: (1 - math.cos(math.pi * p)) / 2,
        "constant": lambda p: 0.0,
    }
    if shape not in shapes:
        raise UPDPError(f"The ramp's shape is {shape!r}, expected one of {sorted(shapes)}.")
    curve = shapes[shape]

    def schedule(progress: float) -> float:
        if progress >= end:
            return 1.0
        return curve((progress - start) / (end - start)) if progress > start else 0.0

    return schedule


def sandwich(num_sites: int, *, num_random: int = 2, seed: int = 0) -> Callable[[int], list[Choice]]:
    """Return the settings of supernet training (UPDP, step 1): from the step to the sites closed in each setting.

    The sandwich rule (Yu & Huang, arXiv 1903.05134): nothing closed, everything closed, and `num_random` choices in
    between, whose number of sites is uniform. They are drawn from `(seed, step)` alone. How UPDP draws is not known.

    Raises:
        ValueError: there are no sites, or `num_random` is negative.
    """
    if num_sites < 1 or num_random < 0:
        raise UPDPError(f"The sandwich rule was given {num_sites} sites and {num_random} random choices.")

    def settings(step: int) -> list[Choice]:
        generator = random.Random(f"{seed} {step}")
        counts = [generator.randint(1, max(num_sites - 1, 1)) for _ in range(num_random)]
        drawn = [tuple(sorted(generator.sample(range(num_sites), count))) for count in counts]
        return [(), tuple(range(num_sites)), *drawn]

    return settings
