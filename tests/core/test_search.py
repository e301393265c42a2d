"""A search finds the fittest choice that meets the demand, the same one each time."""

import random

import pytest

from updp_hf.core.plan.budget import Demand
from updp_hf.core.search import search
from updp_hf.errors import PlanError
from updp_hf.selection.score_history import ScoreHistory


class Fitness:
    """Score by a function of one choice, and write down what was asked for."""

    def __init__(self, score, interrupted_after=None):
        self.score, self.interrupted_after = score, interrupted_after
        self.asked = []

    def __call__(self, choices):
        scores = []
        for choice in choices:
            if len(self.asked) == self.interrupted_after:
                raise KeyboardInterrupt
            self.asked.append(choice)
            scores.append(self.score(choice))
        return scores


def noise(choice):
    """Return a number that is fixed by the choice and tells nothing about others."""
    return random.Random(str(choice)).random()


def pairs(choice):
    """Return a score by which sites are of use in pairs, some pairs more, and do harm alone.

    The first four pairs are best: 4 of 12 of them.
    """
    closed = set(choice)
    both = [pair for pair in range(12) if {2 * pair, 2 * pair + 1} <= closed]
    alone = len(closed) - 2 * len(both)
    return sum(1.0 + (pair < 4) for pair in both) - 0.5 * alone


PAIRED = Demand((1.0,) * 24, 8.0)
"""735471 choices, of which one is the fittest by `pairs`."""
BEST_PAIRS = tuple(range(8))


# where there are few choices


@pytest.mark.parametrize(
    "demand",
    [
        Demand((1.0,) * 10, 3.0),
        Demand((1.0,) * 4, 4.0),
        Demand((3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0), 13.0),
        Demand((0.5,), 0.1),
    ],
    ids=str,
)
def test_few_choices_are_all_scored_once(demand):
    fitness = Fitness(noise)
    choice = search(fitness, demand)
    assert choice == max(demand.choices(), key=noise)
    assert sorted(fitness.asked) == sorted(demand.choices())


def test_as_many_choices_as_the_algorithm_would_look_at_are_few():
    demand = Demand((1.0,) * 6, 3.0)  # 20 choices
    for generations, is_exhaustive in ((4, True), (3, False)):
        fitness = Fitness(noise)
        search(fitness, demand, population=4, generations=generations)
        assert (sorted(fitness.asked) == sorted(demand.choices())) == is_exhaustive


# where there are many


@pytest.mark.parametrize("seed", range(5))
def test_the_fittest_of_many_is_found_where_random_choices_miss_it(seed):
    fitness = Fitness(pairs)  # 60 of 60 seeds find it, by some 1200 of the choices
    assert search(fitness, PAIRED, population=64, generations=40, seed=seed) == BEST_PAIRS
    generator = random.Random(seed)
    assert pairs(max((PAIRED.draw(generator) for _ in fitness.asked), key=pairs)) < pairs(BEST_PAIRS)


def test_sites_of_unequal_savings_are_searched_as_well():
    generator = random.Random(0)
    demand = Demand(tuple(generator.uniform(0.5, 1.5) for _ in range(24)), 8.0)
    fitness = Fitness(pairs)
    found = search(fitness, demand, population=64, generations=40)
    assert pairs(found) > max(pairs(demand.draw(generator)) for _ in fitness.asked)


@pytest.mark.parametrize(
    "demand",
    [
        PAIRED,
        Demand(tuple(random.Random(index).uniform(0.01, 1.0) for index in range(24)), 6.0),
        Demand((8.0, *(1.0,) * 23), 9.0),
        Demand((1.0,) * 24, 22.0),
    ],
    ids=["equal", "unequal", "lopsided", "nearly all"],
)
@pytest.mark.parametrize("crossover", [0.0, 0.5, 1.0])
def test_every_choice_that_is_scored_meets_the_demand_with_nothing_to_spare(demand, crossover):
    fitness = Fitness(noise)
    found = search(fitness, demand, crossover=crossover, population=8, generations=6)
    assert found in fitness.asked
    for choice in fitness.asked:
        assert choice == tuple(sorted(set(choice)))
        assert demand.is_met(choice)
        assert not any(demand.is_met([i for i in choice if i != index]) for index in choice)


def test_a_search_asks_for_no_more_than_its_generations():
    fitness = Fitness(noise)
    search(fitness, PAIRED, population=10, generations=7)
    assert 8 <= len(fitness.asked) <= 80


def test_no_generations_are_a_search_among_random_choices():
    fitness = Fitness(pairs)
    assert search(fitness, PAIRED, generations=0) == min(fitness.asked, key=lambda choice: (-pairs(choice), choice))
    assert len(fitness.asked) == 32


@pytest.mark.parametrize("seed", [0, 7])
def test_the_same_seed_is_the_same_search(seed):
    runs = [Fitness(noise), Fitness(noise)]
    found = [search(fitness, PAIRED, seed=seed, generations=5) for fitness in runs]
    assert found[0] == found[1]
    assert runs[0].asked == runs[1].asked


def test_another_seed_is_another_search():
    runs = [Fitness(noise), Fitness(noise)]
    for seed, fitness in enumerate(runs):
        search(fitness, PAIRED, seed=seed, generations=1)
    assert runs[0].asked != runs[1].asked


def test_searching_leaves_the_global_generator_alone():
    state = random.getstate()
    search(Fitness(noise), PAIRED, generations=2)
    assert random.getstate() == state


def test_of_equally_fit_choices_the_first_by_its_sites_is_taken():
    assert search(Fitness(lambda choice: 0.0), Demand((1.0,) * 6, 3.0)) == (0, 1, 2)
    # Savings change the order in which choices are yielded, not which of them is taken.
    assert search(Fitness(lambda choice: 0.0), Demand((1.0, 1.0, 2.0, 2.0), 3.0)) == (0, 2)
    assert search(Fitness(lambda choice: float(3 in choice)), Demand((1.0,) * 6, 2.0)) == (0, 3)
    fitness = Fitness(lambda choice: 0.0)
    found = search(fitness, PAIRED, generations=3)
    assert found == min(fitness.asked)


@pytest.mark.parametrize("demand", [Demand((1.0,) * 4, 2.0), PAIRED], ids=["few", "many"])
def test_a_choice_that_is_worth_nothing_is_not_the_fittest(demand):
    broken = Fitness(lambda choice: -float("inf") if 0 in choice else noise(choice))
    found = search(broken, demand, population=4, generations=3)
    assert 0 not in found
    assert noise(found) == max(noise(choice) for choice in broken.asked if 0 not in choice)


def test_a_demand_that_nothing_meets_is_refused():
    with pytest.raises(PlanError, match=r"3.*4"):
        search(Fitness(noise), Demand((1.0,) * 3, 4.0))


@pytest.mark.parametrize(
    "settings",
    [
        {"population": 3},
        {"generations": -1},
        {"crossover": -0.1},
        {"crossover": 1.1},
        {"mutation": 0.0},
        {"mutation": 1.1},
        {"mutation": float("nan")},
        {"crossover": float("nan")},
    ],
    ids=str,
)
def test_settings_out_of_their_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"^The search has population .*expected a population of 4 or more"):
        search(Fitness(noise), PAIRED, **settings)


# interrupted

SETTINGS = {"population": 6, "generations": 5, "seed": 3}


def remembered(file, fitness):
    return ScoreHistory(fitness, {"model": "planted"}, file=file)


@pytest.fixture
def straight(tmp_path):
    """A search that was not interrupted: what it found, and every score."""
    fitness = Fitness(pairs)
    history = remembered(tmp_path / "straight.jsonl", fitness)
    found = search(history, PAIRED, **SETTINGS)
    assert len(fitness.asked) == len(set(fitness.asked)) > 20
    return found, history.scores, fitness.asked


def test_a_search_that_was_interrupted_anywhere_ends_where_the_straight_one_ends(tmp_path, straight):
    found, scores, asked = straight
    for after in range(len(asked) + 1):
        file = tmp_path / f"{after}.jsonl"
        broken = Fitness(pairs, interrupted_after=after)
        if after < len(asked):
            with pytest.raises(KeyboardInterrupt):
                search(remembered(file, broken), PAIRED, **SETTINGS)
        else:
            search(remembered(file, broken), PAIRED, **SETTINGS)
        resumed = Fitness(pairs)
        history = remembered(file, resumed)
        assert search(history, PAIRED, **SETTINGS) == found
        assert history.scores == scores
        assert [*broken.asked, *resumed.asked] == asked  # nothing is scored twice
        assert file.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_a_search_whose_file_was_cut_at_any_byte_ends_where_the_straight_one_ends(tmp_path, straight):
    found, scores, _ = straight
    whole = (tmp_path / "straight.jsonl").read_bytes()
    file = tmp_path / "cut.jsonl"
    for length in [*range(60), *range(60, len(whole), 29), len(whole) - 1]:
        file.write_bytes(whole[:length])
        history = remembered(file, Fitness(pairs))
        assert search(history, PAIRED, **SETTINGS) == found, f"cut after {length} bytes"
        assert history.scores == scores
        assert file.read_bytes() == whole


def test_a_search_that_was_interrupted_twice_goes_on(tmp_path, straight):
    found, scores, asked = straight
    for after in (5, 9):
        with pytest.raises(KeyboardInterrupt):
            search(remembered(tmp_path / "twice.jsonl", Fitness(pairs, after)), PAIRED, **SETTINGS)
    last = Fitness(pairs)
    history = remembered(tmp_path / "twice.jsonl", last)
    assert search(history, PAIRED, **SETTINGS) == found
    assert history.scores == scores
    assert last.asked == asked[14:]
