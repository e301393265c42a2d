"""Schedules are functions of progress or of the step, and remember nothing."""

import math
import random

import pytest
import torch

from updp_hf.core.schedule import ramp, sandwich

STEPS = [i / 40 for i in range(41)]
GOLDEN = [(), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), (5, 6, 7, 8, 10), (4,), (4, 5, 11)]
"""What `sandwich(12, num_random=3, seed=42)(7)` returned when it was written."""


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.1, 0.9), (0.0, 1.0), (0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_a_ramp_is_open_before_closed_after_and_never_goes_back(shape, start, end):
    values = {progress: ramp(shape, start, end)(progress) for progress in STEPS}
    assert all(value == 0.0 for progress, value in values.items() if progress <= start and progress < end)
    assert all(value == 1.0 for progress, value in values.items() if progress >= end)
    assert list(values.values()) == sorted(values.values())
    assert 0.0 <= min(values.values()) <= max(values.values()) <= 1.0


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [("linear", 0.25, 0.5), ("cosine", (1 - math.cos(math.pi / 4)) / 2, 0.5), ("constant", 0.0, 0.0)],
)
def test_the_shapes_between_start_and_end(shape, quarter, half):
    schedule = ramp(shape, 0.2, 0.6)
    assert schedule(0.3) == pytest.approx(quarter)
    assert schedule(0.4) == pytest.approx(half)


def test_by_default_all_but_the_first_tenth_of_training_is_closed():
    schedule = ramp()
    assert [schedule(p) for p in (0.0, 0.05, 0.1, 1.0)] == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("start", "end"), [(0.6, 0.5), (-0.1, 0.5), (0.0, 1.1), (float("nan"), 1.0), (0.0, float("nan"))]
)
def test_a_ramp_outside_of_training_is_refused(start, end):
    with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
        ramp(start=start, end=end)


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match=r"'sigmoid', expected one of .*cosine"):
        ramp("sigmoid")


# the sandwich rule


@pytest.mark.parametrize("num_sites", [1, 2, 3, 12])
@pytest.mark.parametrize("num_random", [0, 1, 2, 5])
def test_a_step_has_the_open_and_the_closed_network_and_some_between(num_sites, num_random):
    settings = sandwich(num_sites, num_random=num_random)
    for step in range(20):
        open_, closed, *between = settings(step)
        assert open_ == ()
        assert closed == tuple(range(num_sites))
        assert len(between) == num_random
        for choice in between:
            assert 1 <= len(choice) <= max(num_sites - 1, 1)
            assert choice == tuple(sorted(set(choice)))
            assert set(choice) <= set(closed)


def test_what_is_drawn_is_fixed_by_the_seed_and_the_step_alone():
    assert sandwich(12, num_random=3, seed=42)(7) == GOLDEN  # on every machine, in every process, for ever
    steps = [9, 3, 3, 0, 7]
    one, other = sandwich(12, num_random=3, seed=42), sandwich(12, num_random=3, seed=42)
    in_order = {step: one(step) for step in sorted(steps)}
    assert [other(step) for step in steps] == [in_order[step] for step in steps]


def test_other_steps_and_other_seeds_draw_otherwise():
    drawn = {tuple(sandwich(12, seed=seed)(step)[2:]) for seed in range(8) for step in range(8)}
    assert len(drawn) == 64  # of a pair that was drawn twice the chance is far below 1 %


def test_every_number_of_sites_is_as_likely_and_every_site():
    settings = sandwich(6)
    drawn = [choice for step in range(2000) for choice in settings(step)[2:]]
    counts = [sum(len(choice) == count for choice in drawn) for count in range(1, 6)]
    assert sum(counts) == 4000
    assert all(700 < count < 900 for count in counts)  # 800 each: 25 are one standard deviation
    closed = [sum(site in choice for choice in drawn) for site in range(6)]
    assert all(1870 < count < 2130 for count in closed)  # half of all: 32 are one standard deviation


def test_drawing_leaves_the_global_generators_alone():
    before = random.getstate(), torch.get_rng_state()
    sandwich(12)(3)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(("num_sites", "num_random"), [(0, 2), (-1, 2), (3, -1)])
def test_a_sandwich_of_nothing_is_refused(num_sites, num_random):
    expected = f"^The sandwich rule was given {num_sites} sites and {num_random} random choices"
    with pytest.raises(ValueError, match=expected):
        sandwich(num_sites, num_random=num_random)
