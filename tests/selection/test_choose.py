"""From a budget to what a choice has to save, which is what merging saves; a speed-up is asked for until it is met."""

import copy
import math
import random
import re
from dataclasses import replace

import pytest
import torch
from rings import slow_but
from tiny_models import tiny_model
from tiny_training import RandomImages, gate_, mobilenet, resnet, structure_of, vit
from torch import nn

from updp_hf import Budget, Plan, close_, merge
from updp_hf.core.cost import count_macs, count_parameters
from updp_hf.core.plan.budget import Demand
from updp_hf.core.plan.site import Saving
from updp_hf.errors import PlanError
from updp_hf.selection.choose import ATTEMPTS, choose, select
from updp_hf.selection.demand import demand_of, measure_merged
from updp_hf.selection.selectors import last, least, shuffled
from updp_hf.surgery.find import blocks_of, require_sites
from updp_hf.surgery.model_io import example_inputs_of

CASES = {
    "vit": (vit, "merge"),
    "vit, branch-fit": (vit, "branch-fit"),
    "vit, attention-drop": (vit, "attention-drop"),
    "resnet": (resnet, "merge"),
    "mobilenet": (mobilenet, "merge"),
}


@pytest.fixture(scope="module")
def candidates():
    """Models and their sites; neither is changed by any test."""
    built = {name: (build(), form) for name, (build, form) in CASES.items()}
    return {
        name: (model, require_sites(model, form, structure=structure_of(model)))
        for name, (model, form) in built.items()
    }


def cost_of(model, given):
    return count_macs(model, example_inputs_of(model)) if given == "macs" else count_parameters(model)


def merged_with(model, sites):
    gated = copy.deepcopy(model)
    gate_(gated, Plan(tuple(sites)))
    close_(gated)
    return merge(gated, tolerance=math.inf)


# what a choice has to save


@pytest.mark.parametrize("name", slow_but(CASES, "vit", "resnet"))
def test_what_the_sites_save_is_what_merging_them_saves(candidates, name):
    model, sites = candidates[name]
    generator = random.Random(1)
    subsets = [range(len(sites)), sorted(generator.sample(range(len(sites)), len(sites) // 2))]
    for subset in subsets:
        merged = merged_with(model, [sites[index] for index in subset])
        for given in ("macs", "parameters"):
            kept, demand = demand_of(model, sites, Budget(**{given: 0.99}))
            assert kept == sites
            saved = cost_of(model, given) - cost_of(merged, given)
            assert sum(demand.savings[index] for index in subset) == saved


@pytest.mark.parametrize("name", slow_but(["vit", "resnet", "mobilenet"], "vit", "resnet"))
@pytest.mark.parametrize("given", ["macs", "parameters"])
def test_the_merged_model_keeps_to_the_budget(candidates, name, given):
    model, sites = candidates[name]
    total = cost_of(model, given)
    possible = 1 - sum(s.saving.macs if given == "macs" else s.saving.parameters for s in sites) / total
    budget = Budget(**{given: 0.6 * possible + 0.4})
    kept, demand = demand_of(model, sites, budget)
    assert demand.required == pytest.approx(total * (0.6 - 0.6 * possible))
    chosen, _ = select(model, kept, demand, shuffled(2))
    assert len(chosen) < len(sites)
    left = cost_of(merged_with(model, chosen), given) / total
    assert possible < left <= 0.6 * possible + 0.4


def test_a_budget_that_some_sites_meet_exactly_is_met_by_them(candidates):
    model, sites = candidates["resnet"]
    for given in ("macs", "parameters"):
        total = cost_of(model, given)
        left = cost_of(merged_with(model, sites[1:3]), given) / total
        assert demand_of(model, sites, Budget(**{given: left}))[1].is_met([1, 2])
        assert not demand_of(model, sites, Budget(**{given: left - 1e-6}))[1].is_met([1, 2])


@pytest.mark.parametrize("count", [1, 3])
def test_a_number_of_blocks_is_met_by_so_many_whatever_they_save(candidates, count):
    model, sites = candidates["vit"]
    kept, demand = demand_of(model, sites, Budget(num_blocks=count))
    assert kept == sites
    assert demand == Demand((1.0, 1.0, 1.0), float(count))
    assert len(select(model, kept, demand, last)[0]) == count


@pytest.mark.parametrize("given", ["macs", "parameters"])
def test_sites_that_save_nothing_are_left_out(candidates, given):
    model, sites = candidates["vit"]
    field = given
    changed = (
        replace(sites[0], saving=replace(sites[0].saving, **{field: 0})),
        sites[1],
        replace(sites[2], saving=replace(sites[2].saving, **{field: -7})),
    )
    kept, demand = demand_of(model, changed, Budget(**{given: 0.99}))
    assert kept == (sites[1],)
    assert demand.savings == (float(getattr(sites[1].saving, field)),)
    assert demand_of(model, changed, Budget(num_blocks=3))[0] == changed


def test_merging_may_save_macs_and_cost_parameters():
    model = tiny_model("regnety")
    model.config.image_size = 32
    sites = require_sites(model, "merge")
    assert max(site.saving.parameters for site in sites) <= 0
    assert demand_of(model, sites, Budget(macs=0.99))[0] == sites
    with pytest.raises(PlanError, match=r"^The budget is 99% of the parameters, but .* 100\.0%"):
        demand_of(model, sites, Budget(parameters=0.99))


# what is impossible


def test_more_blocks_than_there_are_is_refused(candidates):
    model, sites = candidates["vit"]
    with pytest.raises(
        PlanError, match=r"^The budget is 4 sites, but the model has 3 sites: ask for no more than that"
    ):
        demand_of(model, sites, Budget(num_blocks=4))
    demand_of(model, sites, Budget(num_blocks=3))


def drawn_sites(sites, given, total, seed):
    """Return `sites` as if they saved random amounts, one of them less than nothing."""
    generator = random.Random(seed)
    field = given
    savings = [generator.randint(1, total // 4), generator.randint(1, total // 4), -generator.randint(1, total // 50)]
    return tuple(
        replace(site, saving=replace(site.saving, **{field: saving}))
        for site, saving in zip(sites, savings, strict=True)
    )


@pytest.mark.parametrize("given", ["macs", "parameters"])
def test_what_a_refusal_says_is_possible_is_accepted(candidates, given):
    model, sites = candidates["vit"]
    noun = "MACs" if given == "macs" else "parameters"
    total = cost_of(model, given)
    for seed in range(10):
        drawn = drawn_sites(sites, given, total, seed)
        with pytest.raises(PlanError) as refusal:
            demand_of(model, drawn, Budget(**{given: 0.1}))
        found = re.match(rf"The budget is 10% of the {noun}, but .* ([\d.]+)%.*: ask for no more", str(refusal.value))
        possible = float(found[1]) / 100
        kept, demand = demand_of(model, drawn, Budget(**{given: possible}))
        assert demand.is_met(range(len(kept)))
        with pytest.raises(PlanError):  # and hardly more is possible
            demand_of(model, drawn, Budget(**{given: possible - 0.0011}))


# latency, which no test measures


class Latencies:
    """A model of how long a merged model takes, in place of measuring it."""

    def __init__(self, before, saved):
        self.before, self.saved = before, saved
        self.measured = []

    def __call__(self, model, sites, batch_size=1):
        self.measured.append((tuple(sites), batch_size))
        return self.before, self.before - self.saved(tuple(sites))


def test_the_latency_that_all_save_is_shared_out_by_what_was_measured_of_each(candidates):
    model, sites = candidates["vit"]
    timed = tuple(
        replace(site, saving=replace(site.saving, seconds=seconds))
        for site, seconds in zip(sites, (1.0, 2.0, 5.0), strict=True)
    )
    found = Latencies(10.0, lambda chosen: 4.0)
    kept, demand = demand_of(model, timed, Budget(speed_up=1.25), batch_size=8, measure=found)
    assert found.measured == [(timed, 8)]
    assert kept == timed
    assert demand.savings == pytest.approx((0.5, 1.0, 2.5))
    assert demand.required == pytest.approx(2.0)


def test_the_latency_that_all_save_is_shared_out_by_their_macs_otherwise(candidates):
    model, sites = candidates["vit"]
    counted = tuple(replace(site, saving=Saving(macs)) for site, macs in zip(sites, (100, 200, 500), strict=True))
    found = Latencies(10.0, lambda chosen: 4.0)
    _, demand = demand_of(model, counted, Budget(speed_up=1.25), measure=found)
    assert demand.savings == pytest.approx((0.5, 1.0, 2.5))


@pytest.mark.parametrize("after", [6.0, 7.0, 9.99, 3.3, 8.62])
def test_the_speed_up_that_a_refusal_says_is_possible_is_accepted(candidates, after):
    model, sites = candidates["vit"]
    measured = Latencies(10.0, lambda chosen: 10.0 - after)
    with pytest.raises(PlanError) as refusal:
        demand_of(model, sites, Budget(speed_up=4.0), measure=measured)
    message = r"The budget is a speed-up of 4×, but .* all 3 sites .* ([\d.]+)× as fast: ask for no more"
    found = re.match(message, str(refusal.value))
    if float(found[1]) > 1:
        kept, demand = demand_of(model, sites, Budget(speed_up=float(found[1])), measure=measured)
        assert demand.is_met(range(len(kept)))
    assert demand_of(model, sites, Budget(speed_up=10.0 / after), measure=measured)[1].is_met([0, 1, 2])
    with pytest.raises(PlanError):
        demand_of(model, sites, Budget(speed_up=10.0 / after + 0.011), measure=measured)


@pytest.mark.parametrize(("saved", "factor"), [(0.0, "1.00"), (-1.0, "0.9")])
def test_merging_that_makes_nothing_faster_is_refused(candidates, saved, factor):
    model, sites = candidates["vit"]
    found = Latencies(10.0, lambda chosen: saved)
    with pytest.raises(PlanError, match=rf"all 3 sites .* {factor}\d?× as fast"):
        demand_of(model, sites, Budget(speed_up=1.01), measure=found)


# asking again

SITES = tuple(f"site {index}" for index in range(12))
DEMAND = Demand((1.0,) * 12, 4.0)
"""Of a model that takes 20, for a speed-up of 1.25."""


class Asked:
    """A selector that writes down what it is asked for."""

    def __init__(self, selector=last):
        self.selector, self.demands = selector, []

    def __call__(self, demand):
        self.demands.append(demand)
        return self.selector(demand)


def test_without_a_speed_up_nothing_is_measured():
    found, asked = Latencies(20.0, len), Asked()
    assert select(None, SITES, DEMAND, asked, measure=found)[0] == SITES[-4:]
    assert found.measured == []
    assert asked.demands == [DEMAND]


def test_a_choice_that_is_fast_enough_is_measured_once():
    found, asked = Latencies(20.0, len), Asked()
    assert select(None, SITES, DEMAND, asked, speed_up=1.25, batch_size=3, measure=found)[0] == SITES[-4:]
    assert found.measured == [(SITES[-4:], 3)]
    assert asked.demands == [DEMAND]


def test_sites_are_returned_in_order_of_execution():
    found = Latencies(20.0, len)
    last_first = least([float(-index) for index in range(12)])
    assert select(None, SITES, DEMAND, last_first, speed_up=1.25, measure=found)[0] == SITES[-4:]
    drawn = tuple(SITES[index] for index in shuffled(0)(DEMAND))
    assert select(None, SITES, DEMAND, shuffled(0), measure=found)[0] == drawn


def test_as_much_more_is_asked_for_as_was_lacking():
    found, asked = Latencies(20.0, lambda chosen: 0.5 * len(chosen)), Asked()
    assert select(None, SITES, DEMAND, asked, speed_up=1.25, measure=found)[0] == SITES[-8:]
    assert [demand.required for demand in asked.demands] == pytest.approx([4.0, 8.0])
    assert [demand.savings for demand in asked.demands] == [DEMAND.savings] * 2
    assert [len(chosen) for chosen, _ in found.measured] == [4, 8]


def test_what_is_chosen_is_fast_enough_when_sites_save_less_the_more_are_closed():
    found, asked = Latencies(20.0, lambda chosen: 2.2 * len(chosen) ** 0.5), Asked()
    chosen, _ = select(None, SITES, DEMAND, asked, speed_up=1.4, measure=found)
    assert 20.0 / (20.0 - found.saved(chosen)) >= 1.4
    required = [demand.required for demand in asked.demands]
    assert required == sorted(set(required))
    assert 2 <= len(required) <= ATTEMPTS


def test_if_little_is_lacking_something_changes_all_the_same():
    # Each choice is a hair too slow, so that asking for that hair alone would give the same choice again.
    found, asked = Latencies(20.0, lambda chosen: 3.999 if len(chosen) < 6 else 4.0), Asked()
    assert select(None, SITES, DEMAND, asked, speed_up=1.25, measure=found)[0] == SITES[-6:]
    assert [len(chosen) for chosen, _ in found.measured] == [4, 5, 6]


def test_a_choice_is_made_so_often_and_no_more_and_it_is_said_that_it_falls_short(monkeypatch):
    told = []
    monkeypatch.setattr("updp_hf.selection.choose.logger.warning", told.append)
    found, asked = Latencies(20.0, lambda chosen: 3.8), Asked()
    assert select(None, SITES, DEMAND, asked, speed_up=1.25, measure=found)[0] == SITES[-4 - ATTEMPTS + 1 :]
    assert len(asked.demands) == ATTEMPTS
    assert len(found.measured) <= ATTEMPTS
    assert told == ["A speed-up of 1.25× was asked for, and 1.23× was measured at last."]


@pytest.mark.parametrize("saved", [0.0, -3.0])
def test_where_nothing_was_saved_all_is_asked_for(saved):
    found, asked = Latencies(20.0, lambda chosen: saved), Asked()
    assert select(None, SITES, DEMAND, asked, speed_up=1.25, measure=found)[0] == SITES
    assert [len(chosen) for chosen, _ in found.measured] == [4]  # all of them were measured for the demand
    assert asked.demands[-1].required == sum(DEMAND.savings)


# measuring


@pytest.fixture
def by_parameters(monkeypatch):
    """Let the number of parameters stand for the latency, and write down what was measured."""
    seen = []

    def measured(models, inputs, rounds):
        seen.append((models, inputs, [model.training for model in models.values()]))
        return {name: [float(count_parameters(model))] * len(inputs) for name, model in models.items()}

    monkeypatch.setattr("updp_hf.selection.demand.measure_latency", measured)
    return seen


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_model_and_its_merged_copy_are_measured(candidates, by_parameters, name):
    model, sites = candidates[name]
    before, after = measure_merged(model, sites[:2], batch_size=5)
    assert before == count_parameters(model)
    assert after == before - sum(site.saving.parameters for site in sites[:2])
    (models, (inputs,), modes) = by_parameters[0]
    assert models["before"] is model
    assert next(iter(inputs.values())).shape == (5, 3, 16, 16)
    assert modes == [False, False]


def test_measuring_leaves_the_model_alone(by_parameters):
    model = vit(dropout=0.1).train()
    sites = require_sites(model, "merge")
    state, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    random_state = torch.get_rng_state()
    measure_merged(model, sites)
    assert by_parameters[0][2] == [False, False]
    assert list(model.modules()) == modules
    assert all(module.training for module in modules)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_values_that_grow_from_block_to_block_are_measured_all_the_same(by_parameters):
    model = vit(num_hidden_layers=6)
    with torch.no_grad():
        for layer in model.vit.layers:
            layer.mlp.fc2.weight.mul_(1e4)
    measure_merged(model, require_sites(model, "merge"))
    merged = by_parameters[0][0]["after"]
    with torch.no_grad():
        assert merged(**example_inputs_of(model)).logits.isfinite().all()


def test_a_budget_of_latency_is_selected_for_end_to_end(candidates, by_parameters):
    model, sites = candidates["resnet"]
    total = count_parameters(model)
    speed_up = total / (total - 0.4 * sum(site.saving.parameters for site in sites))
    kept, demand = demand_of(model, sites, Budget(speed_up=speed_up))
    chosen, _ = select(model, kept, demand, last, speed_up=speed_up)
    assert total / count_parameters(merged_with(model, chosen)) >= speed_up
    assert len(chosen) < len(sites)


# the whole choice


def test_a_selection_tells_what_was_chosen_among_what_and_why_not_elsewhere():
    model = resnet()
    selection = choose(model, Budget(num_blocks=1), [RandomImages(8).images], form="merge", selector="last")
    assert selection.plan.sites == selection.candidates[-1:]
    assert (selection.selector, str(selection.budget)) == ("last", "1 site")
    assert selection.seconds > 0
    assert selection.speed_up is selection.latencies is selection.supernet is None
    without_a_site = set(blocks_of(model)) - {site.block for site in selection.candidates}
    assert set(selection.reasons) == without_a_site


class Plain(nn.Module):
    """All layers in one list, as in a VGG."""

    def __init__(self):
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Tanh())]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(3, 2)
        self.img_size = 8

    def forward(self, x):
        return self.head(self.features(x))


def test_a_number_of_blocks_counts_the_sites_of_a_network_that_is_a_single_block():
    images = [torch.randn(4, 3, 8, 8)]
    selection = choose(Plain(), Budget(num_blocks=2), images, form="merge", selector="last")
    assert len(selection.plan.sites) == 2 < len(selection.candidates)
    assert {site.block for site in selection.candidates} == {"features"}


def test_a_model_is_exported_once_for_a_choice(monkeypatch):
    exports = []
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: exports.append(1) or export(*args, **kwargs))
    choose(vit(), Budget(speed_up=1.01), [RandomImages(8).images], form="merge")
    assert len(exports) == 1
