"""Selectors meet the demand; the clever ones know what does no harm."""

import copy
import math
import random
from functools import cache
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from rings import slow_but
from tiny_models import tiny_model
from tiny_training import RandomImages, gate_, mobilenet, resnet, sites_of, structure_of, vit
from torch import nn

from updp_hf import Budget, Plan, calibrate_, close_, merge
from updp_hf.core.cost import count_macs, count_parameters
from updp_hf.core.plan.budget import Demand
from updp_hf.errors import PlanError
from updp_hf.selection.choose import demand_of
from updp_hf.selection.scores import closeness
from updp_hf.selection.selectors import (
    SELECTORS,
    fittest,
    greedy,
    last,
    least,
    selector_by_name,
    sensitivities,
    shuffled,
    taylor_importances,
    uniform,
)
from updp_hf.surgery.find import require_sites
from updp_hf.surgery.model_io import example_inputs_of, logits_of

EQUAL = (1.0,) * 12
UNEQUAL = (1.0, 2.0, 3.0, 4.0)


def batches_for(model):
    return [example_inputs_of(model, 16, seed) for seed in (1, 2)]


@cache
def named_sites(name, form="merge"):
    return sites_of(tiny_model(name), form)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_as_before(model, state, modules):
    same = all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    return same and list(model.modules()) == modules


# what needs no images


@pytest.mark.parametrize(("count", "expected"), [(1, [11]), (2, [10, 11]), (12, list(range(12)))])
def test_last_takes_the_end(count, expected):
    assert last(Demand(EQUAL, count)) == tuple(expected)


def test_last_takes_no_site_that_is_not_needed():
    assert last(Demand(UNEQUAL, 5.0)) == (2, 3)
    assert last(Demand((4.0, 1.0, 3.0, 1.0), 6.0)) == (0, 2)  # the last one was taken before what is enough without it


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [11]), (3, [3, 7, 11]), (5, [1, 3, 6, 8, 11]), (12, list(range(12)))]
)
def test_uniform_spreads_over_the_depth(count, expected):
    assert uniform(Demand(EQUAL, count)) == tuple(expected)


def test_uniform_takes_as_few_as_are_enough_when_spread():
    assert uniform(Demand(UNEQUAL, 4.0)) == (3,)
    assert uniform(Demand(UNEQUAL, 4.5)) == (1, 3)
    assert uniform(Demand(UNEQUAL, 6.5)) == (0, 1, 3)  # four thirds, eight thirds and four
    assert uniform(Demand(UNEQUAL, 7.5)) == (0, 1, 2, 3)


@pytest.mark.parametrize("savings", [EQUAL, UNEQUAL])
def test_shuffled_draws_what_its_seed_fixes(savings):
    demand = Demand(savings, 4.0)
    drawn = [shuffled(seed)(demand) for seed in range(20)]
    assert drawn == [shuffled(seed)(demand) for seed in range(20)]
    assert set(drawn) <= set(demand.choices())
    assert len(set(drawn)) > 2
    selector = shuffled(3)
    assert selector(demand) == selector(demand)


def test_least_takes_what_does_least_harm():
    assert least([0.3, 0.1, 0.2, 0.4])(Demand((1.0,) * 4, 2.0)) == (1, 2)
    assert least([0.1, 0.1, 0.1, 0.1])(Demand((1.0,) * 4, 2.0)) == (0, 1)  # of equal ones the first


def test_least_weighs_harm_by_what_is_saved():
    assert least([1.0, 1.5])(Demand((1.0, 3.0), 1.0)) == (1,)
    # The third saves most for its harm, and with it the first is not needed any more.
    assert least([0.1, 9.0, 1.0])(Demand((0.2, 4.0, 5.0), 5.0)) == (2,)


def test_least_of_additive_harm_is_the_best_of_all_where_all_save_alike():
    generator = random.Random(0)
    for _ in range(20):
        harms = [generator.random() for _ in range(8)]
        best = min(combinations(range(8), 3), key=lambda choice: sum(harms[i] for i in choice))
        assert least(harms)(Demand((2.0,) * 8, 6.0)) == best


def test_what_does_infinite_harm_is_closed_last():
    assert least([math.inf, 0.5, 0.1])(Demand((9.0, 1.0, 1.0), 2.0)) == (1, 2)
    assert least([math.inf, 0.5, math.inf])(Demand((1.0,) * 3, 2.0)) == (0, 1)
    assert least([math.inf, 0.5, 0.1])(Demand((1.0,) * 3, 3.0)) == (0, 1, 2)


def test_fittest_is_what_the_search_finds():
    demand = Demand((1.0,) * 30, 10.0)

    def fitness(choices):
        return [-float(sum(choice)) for choice in choices]

    settings = {"population": 40, "generations": 40}
    assert sum(fittest(fitness, **settings)(demand)) < sum(fittest(fitness, population=40, generations=0)(demand))
    assert fittest(fitness)(Demand((1.0,) * 6, 2.0)) == (0, 1)
    assert fittest(fitness, **settings, seed=1)(demand) == fittest(fitness, **settings, seed=1)(demand)
    with pytest.raises(ValueError, match="population"):
        fittest(fitness, population=1)(demand)


@pytest.mark.parametrize(
    "selector", [last, uniform, shuffled(0), least([1.0, 2.0, 3.0])], ids=["last", "uniform", "shuffled", "least"]
)
def test_a_demand_that_nothing_meets_is_refused(selector):
    with pytest.raises(PlanError, match=r"3.*4"):
        selector(Demand((1.0,) * 3, 4.0))


# by gradients


def importances_by_hand(model, sites, batches, labels):
    network = copy.deepcopy(model).eval().requires_grad_(True)
    logits = torch.cat([logits_of(network, {"pixel_values": batch["pixel_values"]}) for batch in batches])
    F.cross_entropy(logits, torch.cat(labels)).backward()
    return [
        sum(
            float((parameter.detach() * parameter.grad).abs().sum())
            for name, parameter in network.named_parameters()
            if name.startswith(tuple(f"{slot}." for slot in site.slots))
        )
        for site in sites
    ]


@pytest.mark.parametrize("form", ["merge", "attention-drop"])
@pytest.mark.parametrize("labelled", [True, False])
def test_taylor_is_the_sum_of_gradient_times_weight(form, labelled):
    model = tiny_model("vit")
    sites = named_sites("vit", form)
    batches = [example_inputs_of(model, size, seed) for seed, size in enumerate((5, 2))]
    with torch.no_grad():
        predicted = [logits_of(model, batch).argmax(-1) for batch in batches]
    labels = [(classes + 1) % 5 for classes in predicted] if labelled else predicted
    if labelled:
        batches = [{**batch, "labels": own} for batch, own in zip(batches, labels, strict=True)]
    found = taylor_importances(model, sites, batches)
    assert found == pytest.approx(importances_by_hand(model, sites, batches, labels), rel=1e-4)
    assert len(set(found)) == 3


def test_taylor_takes_images_that_are_mere_tensors():
    model = vit()
    sites = sites_of(model, "merge")
    images = RandomImages().images
    found = taylor_importances(model, sites, images.split(8))
    assert found == pytest.approx(taylor_importances(model, sites, [{"pixel_values": images}]), rel=1e-4)


def test_taylor_is_deterministic_to_the_last_bit():
    model = vit()
    sites = sites_of(model, "merge")
    assert len({tuple(taylor_importances(model, sites, [RandomImages().images])) for _ in range(8)}) == 1


def test_taylor_finds_a_site_whose_weights_are_zero():
    model = tiny_model("vit")
    for parameter in model.vit.layers[1].mlp.parameters():
        parameter.data.zero_()
    for parameter in model.vit.layers[1].layernorm_after.parameters():
        parameter.data.zero_()
    sites = sites_of(model, "merge")
    found = taylor_importances(model, sites, batches_for(model))
    assert found[1] == 0.0 < min(found[0], found[2])
    assert selector_by_name("taylor", model, sites, batches_for(model))(Demand((1.0,) * 3, 1.0)) == (1,)


def test_taylor_leaves_gradients_modes_and_frozen_parameters_alone():
    model = vit(dropout=0.3).train()
    sites = sites_of(model, "merge")
    images = [RandomImages().images]
    expected = taylor_importances(model, sites, images)
    frozen, trained = model.vit.layers[0].mlp.fc1.weight.requires_grad_(False), model.vit.layers[0].mlp.fc2.weight
    trained.grad = torch.full_like(trained, 5.0)
    state, modules = state_of(model), list(model.modules())
    assert taylor_importances(model, sites, images) == pytest.approx(expected, rel=1e-5)
    assert not frozen.requires_grad
    assert frozen.grad is None
    assert torch.equal(trained.grad, torch.full_like(trained, 5.0))
    assert all(module.training for module in model.modules())
    assert is_as_before(model, state, modules)


def test_taylor_looks_into_blocks_that_were_pruned_before():
    model = vit()
    gate_(model, Plan(sites_of(model, "merge")[:1], end_activation="relu"))
    calibrate_(model, [RandomImages().images])
    close_(model)
    pruned = merge(model)
    sites = require_sites(pruned, "attention-drop")
    found = taylor_importances(pruned, sites, [RandomImages().images])
    assert len(found) == 3
    assert min(found) > 0


# by what closing does


@pytest.mark.parametrize(
    ("harmless", "form", "start"),
    [
        (0, "merge", "fit"),
        (1, "merge", "inherit"),
        (2, "merge", "inherit"),
        (1, "branch-fit", "fit"),
        (2, "merge-keep-norm", "fit"),
    ],
)
def test_sensitivities_tell_the_harmless_site(harmless, form, start):
    """An FFN that returns a constant, which a Linear can do as well."""
    model = tiny_model("vit")
    model.vit.layers[harmless].mlp.fc2.weight.data.zero_()
    sites = named_sites("vit", form)
    harms = sensitivities(model, sites, batches_for(model), start=start)
    assert abs(harms[harmless]) < 1e-12
    assert all(harm > 1e-5 for index, harm in enumerate(harms) if index != harmless)
    assert least(harms)(Demand((1.0,) * 3, 1.0)) == (harmless,)
    assert harmless in least(harms)(Demand((1.0,) * 3, 2.0))


@pytest.mark.parametrize("start", ["fit", "inherit"])
def test_sensitivities_are_deterministic_and_leave_the_model_alone(start):
    model = tiny_model("vit").train()
    sites = named_sites("vit")
    state, modules = state_of(model), list(model.modules())
    first, second = (sensitivities(model, sites, batches_for(model), start=start) for _ in range(2))
    assert first == second
    assert min(first) > 0
    assert is_as_before(model, state, modules)
    assert all(module.training for module in modules)


def test_a_fit_does_less_harm_than_the_weights_inherited():
    model = tiny_model("vit")
    sites = named_sites("vit")
    fitted, inherited = (sensitivities(model, sites, batches_for(model), start=start) for start in ("fit", "inherit"))
    assert sum(fitted) < 0.7 * sum(inherited)


@pytest.mark.parametrize("name", ["swinv2", pytest.param("timm-swinv2", marks=pytest.mark.slow)])
def test_harm_is_measured_where_the_norm_stands_behind_the_branch(name):
    model = tiny_model(name)
    sites = named_sites(name)[-2:]
    harms = sensitivities(model, sites, batches_for(model))
    assert len(harms) == len(sites)
    assert min(harms) > 0


@pytest.mark.parametrize("name", ["sensitivity", "greedy"])
def test_harm_of_dropping_is_measured(name):
    model = tiny_model("vit")
    model.vit.layers[1].attention.o_proj.weight.data.zero_()
    model.vit.layers[1].attention.o_proj.bias.data.zero_()
    sites = named_sites("vit", "attention-drop")
    assert selector_by_name(name, model, sites, batches_for(model))(Demand((1.0,) * 3, 1.0)) == (1,)


@pytest.mark.parametrize(("harmful", "form"), [(0, "merge"), (1, "branch-fit"), (2, "merge")])
def test_greedy_finds_two_harmless_sites(harmful, form):
    model = tiny_model("vit")
    harmless = tuple(index for index in range(3) if index != harmful)
    for index in harmless:
        model.vit.layers[index].mlp.fc2.weight.data.zero_()
    selector = greedy(model, named_sites("vit", form), batches_for(model))
    assert selector(Demand((1.0,) * 3, 2.0)) == harmless
    assert selector(Demand((1.0,) * 3, 2.0)) == harmless  # it remembers nothing


def test_greedy_weighs_harm_by_what_is_saved():
    model = tiny_model("vit")
    sites = named_sites("vit")
    harms = sensitivities(model, sites, batches_for(model))
    best = harms.index(min(harms))
    others = [index for index in range(3) if index != best]
    for dear in others:
        savings = tuple(2 * harms[dear] / min(harms) if index == dear else 1.0 for index in range(3))
        assert greedy(model, sites, batches_for(model))(Demand(savings, 1.0)) == (dear,)
    assert greedy(model, sites, batches_for(model))(Demand((1.0,) * 3, 1.0)) == (best,)


def test_a_site_that_overflows_when_it_is_closed_does_infinite_harm():
    model = tiny_model("vit")
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.bias.fill_(-1e200)  # of which the activation leaves nothing
        model.vit.layers[0].mlp.fc2.weight.fill_(1e200)
    inherited, fitted = (
        sensitivities(model, named_sites("vit"), batches_for(model), start=start) for start in ("inherit", "fit")
    )
    assert inherited[0] == math.inf
    assert max(inherited[1:]) < math.inf
    assert least(inherited)(Demand((9.0, 1.0, 1.0), 2.0)) == (1, 2)
    assert abs(fitted[0]) < 1e-12


def test_greedy_leaves_the_model_alone_and_is_deterministic():
    model = tiny_model("vit").train()
    sites = named_sites("vit")
    state, modules = state_of(model), list(model.modules())
    selector = greedy(model, sites, batches_for(model))
    demand = Demand((1.0,) * 3, 2.0)
    assert selector(demand) == selector(demand) == greedy(model, sites, batches_for(model))(demand)
    assert is_as_before(model, state, modules)
    assert all(module.training for module in modules)


class Block(nn.Module):
    """A residual block that adds some number to each channel, and a little of what it reads."""

    def __init__(self, adds, reads):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU()
        with torch.no_grad():
            self.conv2.weight.mul_(reads)
            self.conv2.bias.copy_(torch.tensor(adds))

    def forward(self, x):
        return x + self.conv2(self.act(self.conv1(x)))


class Saturated(nn.Module):
    """Of the last two blocks one is enough: either lifts the first channel to where the last activation is flat.

    The first one does a little, the second one much.
    """

    def __init__(self):
        super().__init__()
        lifts = [20.0, 0.0, 0.0, 0.0]
        self.stem = nn.Conv2d(3, 4, 2, stride=2)
        self.blocks = nn.ModuleList(Block(*kind) for kind in (([0.0] * 4, 0.5), ([2.0] * 4, 3), (lifts, 0), (lifts, 0)))
        self.act = nn.Hardtanh(-1.0, 6.0)
        self.head = nn.Linear(4, 3)
        self.img_size = 8

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.act(x).mean((2, 3)))


def test_greedy_sees_that_two_sites_are_harmless_only_one_at_a_time():
    model = Saturated().double().eval()
    sites = sites_of(model, "block-drop")
    assert [site.block for site in sites] == [f"blocks.{index}" for index in range(4)]
    batches = [example_inputs_of(model, 16)]
    demand = Demand((1.0,) * 4, 2.0)
    harms = sensitivities(model, sites, batches)
    assert abs(harms[2]) < 1e-12
    assert abs(harms[3]) < 1e-12
    assert 1e-6 < harms[0] < harms[1]
    alone, together = least(harms)(demand), greedy(model, sites, batches)(demand)
    assert alone == (2, 3)
    assert together == (0, 2)
    gate_(model, Plan(sites))
    score = closeness(model, batches)
    assert score(together) > 0.1 * score(alone)
    assert score(together) == max(score(choice) for choice in combinations(range(4), 2))


def test_greedy_does_no_more_harm_than_taking_sites_by_themselves():
    model = vit()
    images = [RandomImages().images]
    sites = sites_of(model, "merge-keep-norm")
    demand = Demand((1.0,) * 3, 2.0)
    together = greedy(model, sites, images)(demand)
    alone = least(sensitivities(model, sites, images))(demand)

    def harm(choice):
        gated = copy.deepcopy(model)
        gate_(gated, Plan(tuple(sites[index] for index in choice), start="fit"))
        score = closeness(gated, images)
        calibrate_(gated, images)
        return -score(range(len(choice)))

    assert harm(together) <= harm(alone)


# by name


def test_there_are_six_that_need_no_training():
    assert SELECTORS == ("sensitivity", "greedy", "taylor", "uniform", "last", "random")


def test_an_unknown_selector_is_refused():
    model = vit()
    sites = sites_of(model, "merge")
    expected = r"^The selector is 'best', expected one of \['sensitivity', 'greedy', .*'random'\]"
    with pytest.raises(ValueError, match=expected):
        selector_by_name("best", model, sites, [RandomImages().images])


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_asks_for_images(name):
    with pytest.raises(ValueError, match="no calibration batches"):
        selector_by_name(name, vit(), (), [])


def test_a_name_stands_for_its_selector():
    model = vit()
    sites, images = sites_of(model, "merge"), [RandomImages().images]
    demand = Demand((1.0,) * 3, 2.0)
    for name, selector in {
        "sensitivity": least(sensitivities(model, sites, images)),
        "greedy": greedy(model, sites, images),
        "taylor": least(taylor_importances(model, sites, images)),
        "uniform": uniform,
        "last": last,
        "random": shuffled(5),
    }.items():
        assert selector_by_name(name, model, sites, iter(images), seed=5)(demand) == selector(demand), name
    drawn = {selector_by_name("random", model, sites, images, seed=seed)(demand) for seed in range(20)}
    assert len(drawn) == 3


@pytest.fixture(scope="module")
def candidates():
    """Models with the sites of which it is chosen."""
    models = {build.__name__: build() for build in (vit, resnet, mobilenet)}
    return {
        name: (model, require_sites(model, "merge", structure=structure_of(model))[-6:])
        for name, model in models.items()
    }


@pytest.mark.parametrize("model", slow_but(["vit", "resnet", "mobilenet"], "resnet"))
@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_meets_demands_on_macs_and_parameters(candidates, model, name):
    network, found = candidates[model]
    selector = selector_by_name(name, network, found, [RandomImages(8).images])
    for given in ("macs", "parameters"):
        saved = sum(site.saving.macs if given == "macs" else site.saving.parameters for site in found)
        total = costs_of(network)[given]
        sites, demand = demand_of(network, found, Budget(**{given: 1 - 0.25 * saved / total}))
        assert sites == found
        choice = selector(demand)
        assert demand.is_met(choice)
        assert choice == tuple(sorted(set(choice)))
        assert choice[-1] < len(sites)
        if name != "uniform":  # which spreads as many as are enough
            assert not any(demand.is_met([i for i in choice if i != index]) for index in choice)


def costs_of(model):
    return {"macs": count_macs(model, example_inputs_of(model)), "parameters": count_parameters(model)}
