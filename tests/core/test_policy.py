"""A schedule is a function of progress, a policy one of the step; neither remembers anything."""

import math

import pytest

from updp_hf.core.policy import anneal, ramp

STEPS = [i / 40 for i in range(41)]


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


def test_by_default_the_second_half_of_training_is_closed():
    schedule = ramp()
    assert [schedule(p) for p in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("start", "end"), [(0.6, 0.5), (-0.1, 0.5), (0.0, 1.1), (float("nan"), 1.0), (0.0, float("nan"))]
)
def test_a_ramp_outside_of_training_is_refused(start, end):
    with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
        ramp(start=start, end=end)


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match=r"'sigmoid', expected one of .*cosine"):
        ramp("sigmoid")


def test_every_gate_follows_the_schedule():
    policy = anneal(["a", "b.c"], ramp(end=0.5))
    assert policy(0, 100) == {"a": 0.0, "b.c": 0.0}
    assert policy(25, 100) == {"a": 0.5, "b.c": 0.5}
    assert policy(50, 100) == policy(100, 100) == {"a": 1.0, "b.c": 1.0}
    assert policy(101, 100) == policy(100, 100)  # an evaluation behind the last step


def test_a_policy_is_a_function_of_the_step():
    steps = [70, 3, 3, 99, 0, 41]
    one, other = anneal(["a"], ramp("cosine")), anneal(["a"], ramp("cosine"))
    in_order = {step: one(step, 100) for step in sorted(steps)}
    assert [other(step, 100) for step in steps] == [in_order[step] for step in steps]


def test_training_of_no_steps_has_a_lambda():
    assert anneal(["a"], ramp())(0, 0) == {"a": 0.0}
