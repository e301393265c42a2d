import copy

import pytest
import torch
from tiny_models import tiny_model

from updp_hf import find_sites
from updp_hf.core.plan import PlanError
from updp_hf.inputs import example_inputs_of
from updp_hf.selection import damages, last, least_damage, uniform

SITES = tuple(f"site {i}" for i in range(12))


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [11]),
        (2, [10, 11]),
        (12, list(range(12))),
    ],
)
def test_last_takes_the_end(count, expected):
    assert last(SITES, count) == tuple(SITES[i] for i in expected)


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [11]), (3, [3, 7, 11]), (5, [1, 3, 6, 8, 11]), (12, list(range(12)))]
)
def test_uniform_spreads_over_the_depth(count, expected):
    assert uniform(SITES, count) == tuple(SITES[i] for i in expected)


@pytest.mark.parametrize("selector", [last, uniform])
@pytest.mark.parametrize("count", [0, -1, 13])
def test_impossible_counts_are_refused(selector, count):
    with pytest.raises(PlanError, match=f"^{count} blocks are to be pruned, but the model has 12 sites"):
        selector(SITES, count)


@pytest.mark.parametrize("selector", [last, uniform])
def test_nothing_to_select_from_is_refused(selector):
    with pytest.raises(PlanError, match="no site of this form"):
        selector((), 1)


@pytest.fixture(params=[0, 1, 2])
def planted(request):
    """A model one FFN of which returns a constant, which a Linear can do as well."""
    model = tiny_model("vit")
    model.vit.layers[request.param].mlp.fc2.weight.data.zero_()
    return model, request.param


def batches_for(model):
    return [example_inputs_of(model, 16, seed) for seed in (1, 2)]


@pytest.mark.parametrize("form", ["merge", "branch-fit"])
def test_least_damage_picks_the_harmless_site(planted, form):
    model, harmless = planted
    sites = find_sites(model, [form]).sites
    selector = least_damage(model, batches_for(model))
    assert selector(sites, 1) == (sites[harmless],)
    two = selector(sites, 2)
    assert sites[harmless] in two
    assert list(two) == [site for site in sites if site in two]


def test_least_damage_is_deterministic_and_leaves_the_model_alone():
    model = tiny_model("vit").train()
    sites = find_sites(model, ["merge"]).sites
    state = copy.deepcopy(model.state_dict())
    modules = list(model.modules())
    first, second = (damages(model, sites, batches_for(model)) for _ in range(2))
    assert first == second
    assert min(first) > 0
    assert list(model.modules()) == modules
    assert all(module.training for module in modules)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["swinv2", "timm-swinv2"])
def test_damage_is_measured_where_the_norm_stands_behind_the_branch(name):
    model = tiny_model(name)
    sites = find_sites(model, ["merge"]).sites
    damage = damages(model, sites, batches_for(model))
    assert len(damage) == len(sites)
    assert min(damage) > 0


def test_damage_of_dropping_is_measured():
    model = tiny_model("vit")
    model.vit.layers[1].attention.o_proj.weight.data.zero_()
    model.vit.layers[1].attention.o_proj.bias.data.zero_()
    sites = find_sites(model, ["attention-drop"]).sites
    assert least_damage(model, batches_for(model))(sites, 1) == (sites[1],)


def test_selection_without_images_is_refused():
    with pytest.raises(ValueError, match="no calibration batches"):
        least_damage(tiny_model("vit"), [])


@pytest.mark.parametrize("count", [0, 4])
def test_least_damage_refuses_impossible_counts(count):
    model = tiny_model("vit")
    with pytest.raises(PlanError, match=f"^{count} blocks are to be pruned, but the model has 3 sites"):
        least_damage(model, batches_for(model))(find_sites(model).sites, count)
