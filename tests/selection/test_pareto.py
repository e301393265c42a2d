"""The front holds what no other choice beats, and nothing else; it is written and read."""

import copy
import json
import random
from itertools import combinations

import pytest
import torch
from tiny_training import RandomImages, gate_, vit
from torch import nn

from updp_hf import Plan, calibrate_, close_, merge
from updp_hf.core.depth.runs import Run
from updp_hf.errors import PlanError
from updp_hf.selection.pareto import Front, fitted_fitness, front_of
from updp_hf.selection.scores import closeness
from updp_hf.surgery.find import require_sites

SITES = tuple(Run("merge", f"blocks.{index}", (f"blocks.{index}.fc1", f"blocks.{index}.fc2")) for index in range(6))
EVERY = [choice for count in range(1, 7) for choice in combinations(range(6), count)]


class Measured:
    """A model of the latency, in place of measuring it, that writes down what was asked for."""

    def __init__(self, speed_up_of):
        self.speed_up_of, self.asked = speed_up_of, []

    def __call__(self, model, sites, batch_size=1):
        choice = tuple(SITES.index(site) for site in sites)
        self.asked.append((choice, batch_size))
        return 3.0 * self.speed_up_of(choice), 3.0


def drawn(seed, choice):
    return random.Random(f"{seed} {choice}").random()


def scores(seed):
    return lambda choices: [drawn(seed, choice) for choice in choices]


def choice_of(point):
    return tuple(SITES.index(site) for site in Plan.from_dict(point.plan).sites)


def beats(one, other):
    """Return whether one pair of score and speed-up is as good in both as another, and better in one."""
    return one[0] >= other[0] and one[1] >= other[1] and one != other


def values(points):
    return [(point.score, point.speed_up) for point in points]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_that_of_all_choices_where_latency_counts_blocks(seed):
    measured = Measured(lambda choice: 1.0 + 0.1 * len(choice))
    front = front_of(nn.Identity(), SITES, scores(seed), measure=measured)
    every = {choice: (drawn(seed, choice), 1.0 + 0.1 * len(choice)) for choice in EVERY}
    expected = [choice for choice in EVERY if not any(beats(other, every[choice]) for other in every.values())]
    assert [choice_of(point) for point in front.points] == expected
    for point in (*front.points, *front.beaten):
        assert (point.score, point.speed_up) == pytest.approx(every[choice_of(point)])
        assert point.latency == 3.0


@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_each_number_of_blocks_is_on_the_front_or_beaten_by_it(seed):
    measured = Measured(lambda choice: 1.0 + drawn(seed + 1000, choice))
    front = front_of(nn.Identity(), SITES, scores(seed), measure=measured)
    best = [max(combinations(range(6), count), key=lambda choice: drawn(seed, choice)) for count in range(1, 7)]
    assert sorted(map(choice_of, (*front.points, *front.beaten)), key=len) == best
    points, beaten = values(front.points), values(front.beaten)
    assert not any(beats(one, other) for one in points + beaten for other in points)
    assert all(any(beats(one, other) for one in points) for other in beaten)
    assert front.points
    for part in (front.points, front.beaten):
        assert [point.speed_up for point in part] == sorted(point.speed_up for point in part)


@pytest.mark.parametrize("seed", [0, 1])
def test_measurements_worse_than_the_checkpoint_stay_what_they_are(seed):
    measured = Measured(lambda choice: 0.9)
    front = front_of(nn.Identity(), SITES, scores(seed), measure=measured)
    assert len(front.points) == 1
    assert front.points[0].speed_up == pytest.approx(0.9)
    assert front.points[0].score == max(drawn(seed, choice) for choice in EVERY)


def test_choices_that_are_equally_good_do_not_beat_each_other():
    measured = Measured(lambda choice: 1.5 if len(choice) < 4 else 1.2)
    front = front_of(nn.Identity(), SITES, lambda choices: [-0.25 for _ in choices], measure=measured)
    assert front.points
    assert set(values(front.points)) == {(-0.25, 1.5)}
    assert len(front.points) + len(front.beaten) == 6
    assert {len(choice_of(point)) for point in front.beaten} >= {4, 5, 6}


def test_each_choice_is_measured_once_at_the_batch_size():
    measured = Measured(lambda choice: 1.0 + 0.1 * len(choice))
    front = front_of(nn.Identity(), SITES, scores(0), measure=measured, batch_size=8)
    assert [len(choice) for choice, _ in measured.asked] == [1, 2, 3, 4, 5, 6]
    assert {batch_size for _, batch_size in measured.asked} == {front.batch_size} == {8}


def test_settings_are_those_of_the_search():
    measured = Measured(lambda choice: 1.0 + 0.1 * len(choice))
    with pytest.raises(ValueError, match="The search has population 2"):
        front_of(nn.Identity(), SITES, scores(0), measure=measured, population=2)
    few = [
        front_of(nn.Identity(), SITES, scores(0), measure=measured, population=4, generations=0, seed=seed)
        for seed in (1, 1)
    ]
    assert few[0] == few[1]
    best = front_of(nn.Identity(), SITES, scores(0), measure=measured)
    assert sum(point.score for point in (*few[0].points, *few[0].beaten)) < sum(
        point.score for point in (*best.points, *best.beaten)
    )


# what is written


def a_front(**options):
    measured = Measured(lambda choice: 1.0 + drawn(7, choice))
    return front_of(nn.Identity(), SITES, scores(3), measure=measured, **options)


def test_a_front_is_read_as_it_was_written(tmp_path):
    front = a_front(batch_size=4, score="negated loss, nats")
    assert front.score == "negated loss, nats"
    front.save(tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"pareto.json"}
    assert Front.load(tmp_path / "new" / "folder") == front
    assert Front.load(str(tmp_path / "new" / "folder")) == front


def test_the_plans_in_the_file_are_plans(tmp_path):
    front = a_front()
    front.save(tmp_path)
    document = json.loads((tmp_path / "pareto.json").read_text())
    assert set(document) == {"points", "beaten", "batch_size", "score"}
    for point in document["points"]:
        (tmp_path / "plan.json").write_text(json.dumps(point["plan"]))
        plan = Plan.load(tmp_path / "plan.json")
        assert plan.sites == tuple(SITES[index] for index in sorted(SITES.index(site) for site in plan.sites))


# without training


def test_the_fitness_without_training_is_the_closeness_of_fitted_sites():
    model = vit()
    state, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    images = [RandomImages(16).images]
    sites = require_sites(model, "merge")
    gated = copy.deepcopy(model)
    gate_(gated, Plan(sites, start="fit"))
    calibrate_(gated, images)
    score = closeness(gated, images)
    fitness = fitted_fitness(model, sites, iter(images))
    choices = [(0,), (0, 2), (0,), (0, 1, 2)]
    assert fitness(choices) == [score(choice) for choice in choices]
    assert max(fitness(choices)) < 0
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


def test_the_fitness_without_training_asks_for_images():
    with pytest.raises(ValueError, match="no calibration batches"):
        fitted_fitness(vit(), (), [])


def test_the_plans_of_a_models_front_are_followed():
    model = vit()
    model.config._name_or_path = "someone/vit"
    sites = require_sites(model, "merge")
    fitness = fitted_fitness(model, sites, [RandomImages(16).images])
    front = front_of(model, sites, fitness, measure=lambda model, sites, batch_size: (1.0 + len(sites), 1.0))
    assert [len(point.plan["sites"]) for point in front.points] == [1, 2, 3]
    for point in front.points:
        plan = Plan.from_dict(point.plan)
        assert plan.base_model == "someone/vit"
        gated = copy.deepcopy(model)
        gate_(gated, plan)
        close_(gated)
        assert merge(gated).num_parameters() < model.num_parameters()
    with pytest.raises(PlanError):
        Plan.from_dict({**front.points[0].plan, "format_version": 0})
