"""The search for the best choice of sites: a genetic algorithm, or all of them where they are few."""

import random
from collections.abc import Callable, Sequence
from itertools import islice

from updp_hf.core.plan.budget import Choice, Demand
from updp_hf.errors import UPDPError

__all__ = ["Fitness", "search"]

Fitness = Callable[[Sequence[Choice]], Sequence[float]]
"""From some choices to how good each is; it is asked for the same choice more than once."""


def search(
    fitness: Fitness,
    demand: Demand,
    *,
    population: int = 32,
    generations: int = 20,
    crossover: float = 0.5,
    mutation: float = 0.2,
    seed: int = 0,
) -> Choice:
    """Return the fittest choice found among those that meet `demand` and close nothing that is not needed.

    If there are not more of them than the algorithm would look at, all are scored. Else it keeps the better half of
    each generation and fills up with children: of two parents' sites, or of one parent with some sites exchanged.
    UPDP (arXiv 2401.06426) searches with a genetic algorithm; its settings are not known to us, these are ours.

    Args:
        fitness: scores several choices at once, the higher the better; equal ones are told apart by their sites.
        demand: what a choice has to save.
        population: choices in a generation, at least 4.
        generations: generations after the first one.
        crossover: probability that a child has two parents and not one.
        mutation: probability with which each site of a single parent is exchanged.
        seed: of everything that is drawn. Equal fitness gives an equal search, so one that was interrupted is resumed
            by a `fitness` that remembers.

    Raises:
        PlanError: no choice meets the demand.
        ValueError: a setting is out of its range.
    """
    if population < 4 or generations < 0 or not 0 <= crossover <= 1 or not 0 < mutation <= 1:
        raise UPDPError(
            f"The search has population {population}, {generations} generations, crossover {crossover:g} and mutation "
            f"{mutation:g}, expected a population of 4 or more and probabilities from 0 (mutation above it) to 1."
        )
    demand.take(range(len(demand.savings)))  # says so if nothing meets it
    most = population * (generations + 1)
    every = list(islice(demand.choices(), most + 1))
    if len(every) <= most:
        return _ranked(every, fitness)[0]
    generator = random.Random(seed)
    current = sorted({demand.draw(generator) for _ in range(population)})
    for _ in range(generations):
        parents = _ranked(current, fitness)[: population // 2]
        children = set(parents)
        for _ in range(10 * population):  # a small space may hold no further ones
            if len(children) == population:
                break
            one, other = generator.choice(parents), generator.choice(parents)
            if generator.random() < crossover:
                children.add(_crossed(one, other, demand, generator))
            else:
                children.add(_mutated(one, demand, generator, mutation))
        current = sorted(children)
    return _ranked(current, fitness)[0]


def _ranked(choices: Sequence[Choice], fitness: Fitness) -> list[Choice]:
    scores = dict(zip(choices, fitness(choices), strict=True))
    return sorted(choices, key=lambda choice: (-scores[choice], choice))


def _crossed(one: Choice, other: Choice, demand: Demand, generator: random.Random) -> Choice:
    """Return a child that has what both parents have, and of what one of them has as much as is needed."""
    both = [i for i in one if i in other]
    either = sorted(set(one) ^ set(other))
    generator.shuffle(either)
    return demand.take([*both, *either])


def _mutated(parent: Choice, demand: Demand, generator: random.Random, rate: float) -> Choice:
    """Return a child without some sites of its parent, at least one, and with others in their place."""
    gone = {i for i in parent if generator.random() < rate} or {generator.choice(parent)}
    others = [i for i in range(len(demand.savings)) if i not in parent]
    generator.shuffle(others)
    # Those that went come last: they return only where the others do not save enough.
    return demand.take([*(i for i in parent if i not in gone), *others, *sorted(gone)])
