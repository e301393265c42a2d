"""From a budget to what a choice has to save, which is what merging saves; a speed-up is asked for until it is met."""

import copy
import math
import random
import re
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model
from tiny_training import mobilenet, resnet, vit

from updp_hf import Budget, Plan, close_, gate_, merge
from updp_hf.core.cost import count_macs, count_parameters
from updp_hf.core.plan.budget import Demand
from updp_hf.errors import PlanError
from updp_hf.selection.choose import ATTEMPTS, demand_of, measure_merged, select
from updp_hf.selection.selectors import last, least, shuffled
from updp_hf.surgery.find import require_sites
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
    return {name: (model, require_sites(model, form)) for name, (model, form) in built.items()}


def cost_of(model, given):
    return count_macs(model, example_inputs_of(model)) if given == "macs" else count_parameters(model)


def merged_with(model, sites):
    gated = copy.deepcopy(model)
    gate_(gated, Plan(tuple(sites)))
    close_(gated)
    return merge(gated, tolerance=math.inf)


# what a choice has to save


@pytest.mark.parametrize("name", CASES)
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


@pytest.mark.parametrize("name", ["vit", "resnet", "mobilenet"])
@pytest.mark.parametrize("given", ["macs", "parameters"])
def test_the_merged_model_keeps_to_the_budget(candidates, name, given):
    model, sites = candidates[name]
    total = cost_of(model, given)
    possible = 1 - sum(s.saving.macs if given == "macs" else s.saving.parameters for s in sites) / total
    budget = Budget(**{given: 0.6 * possible + 0.4})
    kept, demand = demand_of(model, sites, budget)
    assert demand.required == pytest.approx(total * (0.6 - 0.6 * possible))
    chosen = select(model, kept, demand, shuffled(2))
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
    assert len(select(model, kept, demand, last)) == count


@pytest.mark.parametrize("given", ["macs", "parameters"])
def test_sites_that_save_nothing_are_left_out(candidates, given):
    model, sites = candidates["vit"]
    field = "macs_saved" if given == "macs" else "params_saved"
    changed = (replace(sites[0], **{field: 0}), sites[1], replace(sites[2], **{field: -7}))
    kept, demand = demand_of(model, changed, Budget(**{given: 0.99}))
    assert kept == (sites[1],)
    assert demand.savings == (float(getattr(sites[1], field)),)
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
        PlanError, match=r"^The budget is 4 blocks, but the model has 3 sites: ask for no more than that"
    ):
        demand_of(model, sites, Budget(num_blocks=4))
    demand_of(model, sites, Budget(num_blocks=3))


def drawn_sites(sites, given, total, seed):
    """Return `sites` as if they saved random amounts, one of them less than nothing."""
    generator = random.Random(seed)
    field = "macs_saved" if given == "macs" else "params_saved"
    savings = [generator.randint(1, total // 4), generator.randint(1, total // 4), -generator.randint(1, total // 50)]
    return tuple(replace(site, **{field: saving}) for site, saving in zip(sites, savings, strict=True))


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


@pytest.fixture
def latencies(monkeypatch):
    def install(before, saved):
        found = Latencies(before, saved)
        monkeypatch.setattr("updp_hf.selection.choose.measure_merged", found)
        return found

    return install


def test_the_latency_that_all_save_is_shared_out_by_what_was_measured_of_each(candidates, latencies):
    model, sites = candidates["vit"]
    timed = tuple(replace(site, seconds_saved=seconds) for site, seconds in zip(sites, (1.0, 2.0, 5.0), strict=True))
    found = latencies(10.0, lambda chosen: 4.0)
    kept, demand = demand_of(model, timed, Budget(speed_up=1.25), batch_size=8)
    assert found.measured == [(timed, 8)]
    assert kept == timed
    assert demand.savings == pytest.approx((0.5, 1.0, 2.5))
    assert demand.required == pytest.approx(2.0)


def test_the_latency_that_all_save_is_shared_out_by_their_macs_otherwise(candidates, latencies):
    model, sites = candidates["vit"]
    counted = tuple(replace(site, macs_saved=macs) for site, macs in zip(sites, (100, 200, 500), strict=True))
    latencies(10.0, lambda chosen: 4.0)
    _, demand = demand_of(model, counted, Budget(speed_up=1.25))
    assert demand.savings == pytest.approx((0.5, 1.0, 2.5))


@pytest.mark.parametrize("after", [6.0, 7.0, 9.99, 3.3, 8.62])
def test_the_speed_up_that_a_refusal_says_is_possible_is_accepted(candidates, latencies, after):
    model, sites = candidates["vit"]
    latencies(10.0, lambda chosen: 10.0 - after)
    with pytest.raises(PlanError) as refusal:
        demand_of(model, sites, Budget(speed_up=4.0))
    message = r"The budget is a speed-up of 4×, but .* all 3 sites .* ([\d.]+)× as fast: ask for no more"
    found = re.match(message, str(refusal.value))
    if float(found[1]) > 1:
        kept, demand = demand_of(model, sites, Budget(speed_up=float(found[1])))
        assert demand.is_met(range(len(kept)))
    assert demand_of(model, sites, Budget(speed_up=10.0 / after))[1].is_met([0, 1, 2])
    with pytest.raises(PlanError):
        demand_of(model, sites, Budget(speed_up=10.0 / after + 0.011))


@pytest.mark.parametrize(("saved", "factor"), [(0.0, "1.00"), (-1.0, "0.9")])
def test_merging_that_makes_nothing_faster_is_refused(candidates, latencies, saved, factor):
    model, sites = candidates["vit"]
    latencies(10.0, lambda chosen: saved)
    with pytest.raises(PlanError, match=rf"all 3 sites .* {factor}\d?× as fast"):
        demand_of(model, sites, Budget(speed_up=1.01))


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


def test_without_a_speed_up_nothing_is_measured(latencies):
    found, asked = latencies(20.0, len), Asked()
    assert select(None, SITES, DEMAND, asked) == SITES[-4:]
    assert found.measured == []
    assert asked.demands == [DEMAND]


def test_a_choice_that_is_fast_enough_is_measured_once(latencies):
    found, asked = latencies(20.0, len), Asked()
    assert select(None, SITES, DEMAND, asked, speed_up=1.25, batch_size=3) == SITES[-4:]
    assert found.measured == [(SITES[-4:], 3)]
    assert asked.demands == [DEMAND]


def test_sites_are_returned_in_order_of_execution(latencies):
    latencies(20.0, len)
    assert select(None, SITES, DEMAND, least([float(-index) for index in range(12)]), speed_up=1.25) == SITES[-4:]
    assert select(None, SITES, DEMAND, shuffled(0)) == tuple(SITES[index] for index in shuffled(0)(DEMAND))


def test_as_much_more_is_asked_for_as_was_lacking(latencies):
    found, asked = latencies(20.0, lambda chosen: 0.5 * len(chosen)), Asked()
    assert select(None, SITES, DEMAND, asked, speed_up=1.25) == SITES[-8:]
    assert [demand.required for demand in asked.demands] == pytest.approx([4.0, 8.0])
    assert [demand.savings for demand in asked.demands] == [DEMAND.savings] * 2
    assert [len(chosen) for chosen, _ in found.measured] == [4, 8]


def test_what_is_chosen_is_fast_enough_when_sites_save_less_the_more_are_closed(latencies):
    found, asked = latencies(20.0, lambda chosen: 2.2 * len(chosen) ** 0.5), Asked()
    chosen = select(None, SITES, DEMAND, asked, speed_up=1.4)
    assert 20.0 / (20.0 - found.saved(chosen)) >= 1.4
    required = [demand.required for demand in asked.demands]
    assert required == sorted(set(required))
    assert 2 <= len(required) <= ATTEMPTS


def test_if_little_is_lacking_something_changes_all_the_same(latencies):
    # Each choice is a hair too slow, so that asking for that hair alone would give the same choice again.
    found, asked = latencies(20.0, lambda chosen: 3.999 if len(chosen) < 6 else 4.0), Asked()
    assert select(None, SITES, DEMAND, asked, speed_up=1.25) == SITES[-6:]
    assert [len(chosen) for chosen, _ in found.measured] == [4, 5, 6]


def test_a_choice_is_made_so_often_and_no_more_and_it_is_said_that_it_falls_short(latencies, monkeypatch):
    told = []
    monkeypatch.setattr("updp_hf.selection.choose.logger.warning", told.append)
    found, asked = latencies(20.0, lambda chosen: 3.8), Asked()
    assert select(None, SITES, DEMAND, asked, speed_up=1.25) == SITES[-4 - ATTEMPTS + 1 :]
    assert len(asked.demands) == ATTEMPTS
    assert len(found.measured) <= ATTEMPTS
    assert told == ["A speed-up of 1.25× was asked for, and 1.23× was measured at last."]


@pytest.mark.parametrize("saved", [0.0, -3.0])
def test_where_nothing_was_saved_all_is_asked_for(latencies, saved):
    found, asked = latencies(20.0, lambda chosen: saved), Asked()
    assert select(None, SITES, DEMAND, asked, speed_up=1.25) == SITES
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

    monkeypatch.setattr("updp_hf.selection.choose.measure_latency", measured)
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
    chosen = select(model, kept, demand, last, speed_up=speed_up)
    assert total / count_parameters(merged_with(model, chosen)) >= speed_up
    assert len(chosen) < len(sites)
