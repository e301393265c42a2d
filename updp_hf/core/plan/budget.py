"""How much is to be pruned: what people ask for, and what that demands of a choice among sites."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

from updp_hf.errors import PlanError, UPDPError

__all__ = ["Budget", "Choice", "Demand"]

Choice = tuple[int, ...]
"""The sites that are closed, by their index among the candidates, in ascending order."""


@dataclass(frozen=True)
class Budget:
    """How much is to be pruned; one of the four is given.

    Args:
        num_blocks: so many sites are closed (UPDP's P4, P6). Most networks have one site in a block, so that blocks are
            counted; in one such as VGG, whose layers form a single block, each run of layers is a site and counts.
        speed_up: the latency before is at least so many times that after, on the device at hand: above 1.
        macs: at most this fraction of the multiply-accumulates is left, between 0 and 1.
        parameters: at most this fraction of the parameters is left, between 0 and 1.

    Raises:
        ValueError: none or several are given, or one that is impossible for any model.

    Example:
        >>> prune(model, batches, Budget(speed_up=1.3))
    """

    num_blocks: int | None = None
    speed_up: float | None = None
    macs: float | None = None
    parameters: float | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            names = " and ".join(given) or "nothing"
            raise UPDPError(
                f"The budget gives {names}, expected one of the number of blocks, the speed-up, the MACs or the "
                "parameters that are left."
            )
        if self.num_blocks is not None and self.num_blocks < 1:
            raise UPDPError(f"`num_blocks` is {self.num_blocks}, expected at least 1.")
        if self.speed_up is not None and not self.speed_up > 1.0:
            raise UPDPError(f"The speed-up asked for is {self.speed_up:g}, expected a factor above 1, such as 1.3.")
        for name, value in (("MACs", self.macs), ("parameters", self.parameters)):
            if value is not None and not 0.0 < value < 1.0:
                raise UPDPError(
                    f"The fraction of {name} to be left is {value:g}, expected a number between 0 and 1, such as 0.7."
                )

    def __str__(self) -> str:
        if self.num_blocks is not None:
            return f"{self.num_blocks} site{'' if self.num_blocks == 1 else 's'}"
        if self.speed_up is not None:
            return f"a speed-up of {self.speed_up:g}×"
        if self.macs is not None:
            return f"{100 * self.macs:.4g}% of the MACs"
        return f"{100 * (self.parameters or 0.0):.4g}% of the parameters"


@dataclass(frozen=True)
class Demand:
    """What a choice of sites has to save: the savings of its sites add up to `required` at least."""

    savings: tuple[float, ...]  # of each candidate, above 0
    required: float

    def is_met(self, choice: Iterable[int]) -> bool:
        """Return whether `choice` saves enough."""
        return sum(self.savings[i] for i in choice) >= self.required * (1 - 1e-9)

    def take(self, order: Iterable[int]) -> Choice:
        """Return the first sites of `order` that save enough, without those that turn out not to be needed.

        Raises:
            PlanError: all of them together save too little.
        """
        taken: list[int] = []
        for index in order:
            if self.is_met(taken):
                break
            taken.append(index)
        if not self.is_met(taken):
            raise PlanError(f"The sites save {sum(self.savings[i] for i in taken):g}, and {self.required:g} is needed.")
        for index in reversed(taken[:]):
            rest = [i for i in taken if i != index]
            if self.is_met(rest):
                taken = rest
        return tuple(sorted(taken))

    def choices(self) -> Iterator[Choice]:
        """Yield every choice that saves enough and of which no site can be left out."""
        order = sorted(range(len(self.savings)), key=lambda i: -self.savings[i])

        def extend(taken: list[int], rest: Sequence[int]) -> Iterator[Choice]:
            # The last one taken saves least, so what is met with it and not without it is met without none.
            if self.is_met(taken):
                yield tuple(sorted(taken))
                return
            for position, index in enumerate(rest):
                if not self.is_met([*taken, *rest[position:]]):
                    return
                yield from extend([*taken, index], rest[position + 1 :])

        return extend([], order)

    def draw(self, generator: random.Random) -> Choice:
        """Return a random choice that saves enough and of which no site can be left out."""
        order = list(range(len(self.savings)))
        generator.shuffle(order)
        return self.take(order)
