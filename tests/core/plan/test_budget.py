"""A budget is one number; a demand is met by choices of which no site can be left out."""

import random
from itertools import combinations

import pytest

from updp_hf.core.plan.budget import Budget, Demand
from updp_hf.errors import PlanError

# what people ask for


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(num_blocks=6), "6 sites"),
        (Budget(speed_up=1.3), "a speed-up of 1.3×"),
        (Budget(speed_up=2), "a speed-up of 2×"),
        (Budget(macs=0.7), "70% of the MACs"),
        (Budget(parameters=0.25), "25% of the parameters"),
    ],
)
def test_a_budget_says_what_it_asks_for(budget, text):
    assert str(budget) == text


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "nothing"),
        ({"num_blocks": 2, "macs": 0.5}, "num_blocks and macs"),
        ({"speed_up": 1.5, "macs": 0.5, "parameters": 0.5}, "speed_up and macs and parameters"),
        ({"num_blocks": 0, "macs": 0.5}, "num_blocks and macs"),
    ],
    ids=str,
)
def test_a_budget_is_exactly_one_of_the_four(given, found):
    with pytest.raises(ValueError, match=f"^The budget gives {found}, expected one of the number of blocks, the speed"):
        Budget(**given)


@pytest.mark.parametrize("count", [0, -1])
def test_so_few_blocks_are_no_budget(count):
    with pytest.raises(ValueError, match=f"^`num_blocks` is {count}, expected at least 1"):
        Budget(num_blocks=count)


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0, -2.0, float("nan")])
def test_what_is_no_faster_is_no_speed_up(factor):
    with pytest.raises(ValueError, match=f"^The speed-up asked for is {factor:g}, expected a factor above 1"):
        Budget(speed_up=factor)


@pytest.mark.parametrize(("name", "noun"), [("macs", "MACs"), ("parameters", "parameters")])
@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 70.0, float("nan")])
def test_a_fraction_that_is_left_lies_between_nothing_and_all(name, noun, fraction):
    expected = f"^The fraction of {noun} to be left is {fraction:g}, expected a number between 0 and 1"
    with pytest.raises(ValueError, match=expected):
        Budget(**{name: fraction})


# what that demands of a choice


def demands(kind, count=40):
    """Return random demands that can be met."""
    generator = random.Random(kind)
    found = []
    for _ in range(count):
        number = generator.randint(1, 9)
        draw = {
            "equal": lambda: 1.0,
            "integers": lambda: float(generator.randint(1, 5)),
            "floats": lambda: generator.uniform(0.01, 1.0),
            "lopsided": lambda: 10.0 ** generator.randint(-3, 3),
        }[kind]
        savings = tuple(draw() for _ in range(number))
        share = generator.choice([0.1, 0.5, 0.9, 1.0, generator.random()])
        found.append(Demand(savings, max(share * sum(savings), min(savings) / 2)))
    return found


KINDS = ["equal", "integers", "floats", "lopsided"]


def saved(demand, choice):
    return sum(demand.savings[index] for index in choice)


def is_enough(demand, choice):
    return saved(demand, choice) >= demand.required - 1e-9 * demand.required


def is_minimal(demand, choice):
    without_one = combinations(choice, max(len(choice) - 1, 0))
    return is_enough(demand, choice) and not any(is_enough(demand, rest) for rest in without_one)


def every_choice(demand):
    sites = range(len(demand.savings))
    return [choice for count in range(len(sites) + 1) for choice in combinations(sites, count)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_demand_is_met_by_what_saves_enough(kind):
    for demand in demands(kind):
        assert all(demand.is_met(choice) == is_enough(demand, choice) for choice in every_choice(demand))


@pytest.mark.parametrize("kind", KINDS)
def test_every_minimal_choice_is_yielded_once_and_nothing_else(kind):
    for demand in demands(kind):
        found = list(demand.choices())
        assert sorted(found) == sorted(choice for choice in every_choice(demand) if is_minimal(demand, choice))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_where_all_save_alike_the_choices_are_the_combinations(count):
    assert sorted(Demand((2.5,) * 7, 2.5 * count).choices()) == list(combinations(range(7), count))
    assert sorted(Demand((2.5,) * 7, 2.5 * (count - 0.5)).choices()) == list(combinations(range(7), count))


def test_rounding_does_not_ask_for_one_site_more():
    savings = (0.1,) * 10  # their sum is 0.9999999999999999
    assert list(Demand(savings, 1.0).choices()) == [tuple(range(10))]
    assert Demand(savings, 0.3).take(range(10)) == (0, 1, 2)  # 0.1 + 0.1 + 0.1 is 0.30000000000000004


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_is_minimal_and_of_the_first_that_are_enough(kind):
    generator = random.Random(1)
    for demand in demands(kind):
        order = list(range(len(demand.savings)))
        generator.shuffle(order)
        choice = demand.take(iter(order))
        assert is_minimal(demand, choice)
        assert choice == tuple(sorted(choice))
        enough = next(count for count in range(len(order) + 1) if is_enough(demand, order[:count]))
        assert set(choice) <= set(order[:enough])
        assert order[enough - 1] in choice  # without it, what comes before it is not enough


def test_what_came_last_goes_first_if_it_is_not_needed():
    # 3 + 2 + 4 is enough: without 2 it still is, and then nothing else can go.
    assert Demand((3.0, 2.0, 4.0), 7.0).take([0, 1, 2]) == (0, 2)
    # The 1 and the 2 are needed no more, but not both can go.
    assert Demand((1.0, 2.0, 4.0), 5.0).take([0, 1, 2]) == (0, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_is_minimal_and_fixed_by_the_generator(kind):
    for demand in demands(kind):
        drawn = [demand.draw(random.Random(seed)) for seed in range(5)]
        assert all(is_minimal(demand, choice) for choice in drawn)
        assert drawn == [demand.draw(random.Random(seed)) for seed in range(5)]


def test_every_choice_is_drawn_some_time_and_all_alike_where_they_save_alike():
    demand, generator = Demand((1.0,) * 5, 2.0), random.Random(0)
    drawn = [demand.draw(generator) for _ in range(2000)]
    counts = [drawn.count(choice) for choice in demand.choices()]
    assert len(counts) == 10
    assert sum(counts) == 2000
    assert min(counts) > 140  # 200 each: 13 are one standard deviation
    assert max(counts) < 260


def test_drawing_leaves_the_global_generator_alone():
    state = random.getstate()
    Demand((1.0,) * 5, 2.0).draw(random.Random(0))
    assert random.getstate() == state


def test_more_than_all_save_is_refused():
    demand = Demand((1.0, 2.0, 3.0), 6.5)
    assert not demand.is_met(range(3))
    assert list(demand.choices()) == []
    with pytest.raises(PlanError, match=r"^The sites save 6, and 6\.5 is needed"):
        demand.take(range(3))
    with pytest.raises(PlanError, match=r"^The sites save 6, and 6\.5 is needed"):
        demand.draw(random.Random(0))


def test_an_order_that_leaves_out_what_is_needed_is_refused():
    with pytest.raises(PlanError, match=r"^The sites save 3, and 4 is needed\."):
        Demand((1.0, 2.0, 3.0), 4.0).take([0, 1])


def test_the_choices_of_many_sites_come_one_after_another():
    # There are 5e27 of them. Nothing is looked at that leads nowhere, however little the last ones save.
    equal = Demand((1.0,) * 96, 48.0).choices()
    assert len({next(equal) for _ in range(100)}) == 100
    lopsided = Demand((*(1e-6,) * 60, *(1.0,) * 12), 12.0).choices()
    assert next(lopsided) == tuple(range(60, 72))
    assert next(lopsided, None) is None
