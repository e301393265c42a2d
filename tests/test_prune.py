"""Pruning without training: budgets, selectors, and corrections that are kept only if they pay."""

import copy
import importlib
from functools import cache
from itertools import pairwise

import pytest
import tiny_training
import torch
import torch.nn.functional as F  # noqa: N812
from rings import slow_but
from tiny_models import close_, tiny_model
from tiny_training import RandomImages, mobilenet, resnet, sites_of, structure_of, vit

import updp_hf
from updp_hf import Budget, Form, Plan, UPDPForImageClassification, find_sites, gate_, merge
from updp_hf.core.cost import count_macs, count_parameters
from updp_hf.core.plan.budget import Demand
from updp_hf.errors import PlanError, UPDPError
from updp_hf.selection.selectors import shuffled
from updp_hf.surgery.model_io import example_inputs_of, logits_of


def prune(model, *args, **options):
    return updp_hf.prune(model, *args, structure=structure_of(model), **options)


def batches_for(model):
    return [example_inputs_of(model, 32, seed) for seed in range(3)]


@torch.no_grad()
def damage(checkpoint, pruned):
    """Return the share of the logits' spread over held-out images that pruning changes."""
    inputs = example_inputs_of(checkpoint, 64, seed=9)
    expected = logits_of(checkpoint, inputs)
    return float((logits_of(pruned, inputs) - expected).norm() / (expected - expected.mean(0)).norm())


@torch.no_grad()
def divergence(checkpoint, pruned, images):
    """Return the mean of KL(checkpoint ‖ pruned) over the images."""
    expected, found = (
        F.log_softmax(logits_of(model.eval(), {"pixel_values": images}).double(), -1) for model in (checkpoint, pruned)
    )
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def are_equal(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# the straight line


@pytest.mark.parametrize(
    "form", slow_but([Form.BRANCH_FIT, Form.MERGE, Form.MERGE_KEEP_NORM, Form.ATTENTION_DROP], Form.BRANCH_FIT)
)
def test_pruning_without_training(form, tmp_path):
    model = tiny_model("vit")
    state, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    pruned = prune(model, batches_for(model), Budget(num_blocks=2), form=form)
    assert type(pruned) is UPDPForImageClassification
    assert len(Plan.from_dict(pruned.config.plan).sites) == 2
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    pruned.save_pretrained(tmp_path)
    loaded = copy.deepcopy(UPDPForImageClassification.from_pretrained(tmp_path))
    inputs = example_inputs_of(model, 3)
    with torch.no_grad():
        assert torch.equal(logits_of(loaded, inputs), logits_of(pruned, inputs))


def test_the_model_is_left_alone():
    model = resnet().train()
    model.config._name_or_path = "someone/net"
    state, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    random_state = torch.get_rng_state()
    pruned = prune(model, [RandomImages().images], Budget(num_blocks=2), form="merge", selector="sensitivity")
    assert list(model.modules()) == modules
    assert all(module.training for module in modules)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert Plan.from_dict(pruned.config.plan).base_model == "someone/net"


def test_pruning_is_deterministic():
    model = vit()
    images = [RandomImages().images]
    one, other = (updp_hf.prune(model, images, Budget(num_blocks=2), selector="sensitivity") for _ in range(2))
    assert are_equal(one, other)


@pytest.mark.parametrize("name", slow_but(["vit", "timm-deit3", "swin"], "vit"))
def test_fit_does_less_damage_than_closing_as_it_is(name):
    model = tiny_model(name)
    budget = Budget(num_blocks=2)
    fitted = prune(model, batches_for(model), budget, form=Form.MERGE_KEEP_NORM, selector="last")
    inherited = copy.deepcopy(model)
    structure = structure_of(model)
    sites = find_sites(model, [Form.MERGE_KEEP_NORM], structure=structure).sites[-2:]
    gate_(inherited, Plan(sites, start="inherit"), structure=structure)
    close_(inherited)
    assert damage(model, fitted) < 0.7 * damage(model, merge(inherited))


def test_timm_model_is_pruned_to_a_timm_model():
    model = tiny_model("timm-vit")
    assert type(prune(model, batches_for(model), Budget(num_blocks=1))) is type(model)


def test_dropped_blocks_leave_the_stock_class():
    model = tiny_model("vit")
    pruned = prune(model, batches_for(model), Budget(num_blocks=1), form="block-drop")
    assert type(pruned) is type(model)
    assert pruned.config.num_hidden_layers == 2


# budgets and selectors


@pytest.mark.parametrize(("build", "given"), [(vit, "macs"), (resnet, "parameters")])
def test_no_more_is_left_than_the_budget_says(build, given):
    model = build()

    def cost(network):
        return count_macs(network, example_inputs_of(network)) if given == "macs" else count_parameters(network)

    saved = sum(
        s.saving.macs if given == "macs" else s.saving.parameters for s in sites_of(model, "merge") if s.saves_compute
    )
    left = 1 - 0.4 * saved / cost(model)
    pruned = prune(model, [RandomImages().images], Budget(**{given: left}), form="merge", selector="taylor")
    assert cost(pruned) / cost(model) <= left
    assert cost(pruned) > cost(model) - saved


def test_the_pruned_model_is_as_much_faster_as_the_budget_says(monkeypatch):
    seen = []

    def by_parameters(model, batch):
        seen.append(next(iter(batch.values())).shape[0])
        return float(count_parameters(model))

    monkeypatch.setattr("updp_hf.core.cost.forward_seconds", by_parameters)
    model = resnet()
    saved = sum(site.saving.parameters for site in sites_of(model, "merge"))
    speed_up = count_parameters(model) / (count_parameters(model) - 0.5 * saved)
    budget = Budget(speed_up=speed_up)
    pruned = prune(model, [RandomImages().images], budget, form="merge", selector="last", batch_size=3)
    assert count_parameters(model) / count_parameters(pruned) >= speed_up
    assert len(Plan.from_dict(pruned.config.plan).sites) < 4
    assert set(seen) == {3}


@pytest.mark.parametrize(("selector", "chosen"), [("last", (1, 2)), ("uniform", (0, 2))])
def test_a_selector_is_taken_by_its_name(selector, chosen):
    pruned = prune(vit(), [RandomImages().images], Budget(num_blocks=2), selector=selector)
    assert Plan.from_dict(pruned.config.plan).blocks == [f"vit.layers.{index}" for index in chosen]


def test_the_seed_is_that_of_random_blocks():
    model = vit()
    drawn = {seed: shuffled(seed)(Demand((1.0,) * 3, 2.0)) for seed in (0, 1, 2, 3)}
    other = next(seed for seed, choice in drawn.items() if choice != drawn[0])
    for seed in (0, other):
        pruned = prune(model, [RandomImages(8).images], Budget(num_blocks=2), selector="random", seed=seed)
        assert Plan.from_dict(pruned.config.plan).blocks == [f"vit.layers.{index}" for index in drawn[seed]]


def test_greedy_is_the_selector_by_default():
    model = tiny_model("vit")
    for index in (0, 2):
        model.vit.layers[index].mlp.fc2.weight.data.zero_()
    pruned = prune(model, batches_for(model), Budget(num_blocks=2))
    assert Plan.from_dict(pruned.config.plan).blocks == ["vit.layers.0", "vit.layers.2"]
    assert damage(model, pruned) < 1e-6


# images


def test_labels_are_of_use_to_taylor_alone(monkeypatch):
    seen = []
    original = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, y, **options: seen.append(y) or original(x, y, **options))
    model = vit()
    images = RandomImages()
    labelled = [{"pixel_values": images.images, "labels": images.labels}]
    options = {"form": "merge", "selector": "last"}
    pruned = [prune(model, given, Budget(num_blocks=1), **options) for given in (labelled, [images.images])]
    assert are_equal(*pruned)
    assert seen == []
    prune(model, labelled, Budget(num_blocks=1), form="merge", selector="taylor")
    assert torch.equal(seen[0], images.labels)


def test_images_come_as_tensors_or_mappings_from_any_iterable():
    model = vit()
    images = RandomImages().images
    options = {"form": "merge-keep-norm", "selector": "last"}
    ways = [images.split(16), ({"pixel_values": batch} for batch in images.split(16))]
    assert are_equal(*[prune(model, way, Budget(num_blocks=2), **options) for way in ways])


@pytest.mark.parametrize(
    ("build", "count"), slow_but([(vit, 1), (vit, 2), (resnet, 1), (mobilenet, 1)], (vit, 1), (resnet, 1))
)
def test_one_or_two_images_are_enough(build, count):
    model = build()
    images = RandomImages(count).images
    form = "merge-keep-norm" if build is vit else "merge"
    pruned = prune(model, [images], Budget(num_blocks=1), form=form, selector="last")
    assert tiny_training.logits(pruned).isfinite().all()


def held_out_by(model, *sizes):
    """Return the images that are fitted to and those held out, of some batches of images that are all different."""
    images = RandomImages(sum(sizes)).images
    fitted, held_out = MODULE._split(model, list(images.split(sizes)))
    return tuple(
        {int((images == one).flatten(1).all(1).nonzero()) for batch in part for one in batch}
        for part in (fitted, held_out)
    )


@pytest.mark.parametrize("sizes", [(32,), (16, 16), (4, 4, 4), (5,), (32, 32, 1), (16, 16, 2)])
def test_some_images_are_not_fitted_to(sizes):
    fitted, held_out = held_out_by(vit(), *sizes)
    assert not fitted & held_out
    assert fitted | held_out == set(range(sum(sizes)))
    assert 0.1 * sum(sizes) <= len(held_out) <= 0.4 * sum(sizes)


def test_a_single_image_is_fitted_to_and_tells_whether_a_correction_pays():
    assert held_out_by(vit(), 1) == ({0}, {0})


# corrections

CORRECTIONS = ("_refit_", "recalibrate_batch_norms_", "correct_head_")
"""In the order in which they are tried."""
MODULE = importlib.import_module("updp_hf.prune")  # the attribute of that name is the function


def nothing(*args, **kwargs):
    """Correct nothing."""


@torch.no_grad()
def harm_(model, *args):
    """Turn every prediction around."""
    for name, parameter in model.named_parameters():
        if "classifier" in name or name.endswith("head.weight"):
            parameter.mul_(-3.0)


def pruned_with(build, **corrections):
    """Prune with some corrections exchanged."""
    with pytest.MonkeyPatch.context() as patched:
        for name, correction in corrections.items():
            patched.setattr(MODULE, name, correction)
        form = "merge-keep-norm" if build is vit else "merge"
        return prune(build(), [RandomImages(64).images], Budget(num_blocks=2), form=form, selector="last")


@cache
def pruned_without(build, *names):
    return pruned_with(build, **dict.fromkeys(names, nothing))


@pytest.mark.parametrize(
    ("build", "name"), [(vit, "_refit_"), (resnet, "recalibrate_batch_norms_"), (vit, "correct_head_")]
)
def test_a_correction_that_does_harm_changes_nothing(build, name):
    assert are_equal(pruned_with(build, **{name: harm_}), pruned_without(build, name))


@pytest.mark.parametrize("build", [vit, resnet])
def test_corrections_never_take_predictions_farther_away_on_held_out_images(build):
    held_out = RandomImages(64).images[-16:]
    tried = [pruned_without(build, *CORRECTIONS[count:]) for count in range(len(CORRECTIONS) + 1)]
    kept = [divergence(build(), pruned, held_out) for pruned in tried]
    assert all(after <= before * (1 + 1e-4) + 1e-9 for before, after in pairwise(kept))
    assert kept[-1] < kept[0]


@pytest.mark.parametrize("build", [vit, resnet])
def test_correcting_the_head_brings_predictions_nearer_on_fresh_images(build):
    fresh = RandomImages(64, seed=5).images
    without, corrected = pruned_without(build, "correct_head_"), pruned_without(build)
    assert not are_equal(corrected, without)
    assert divergence(build(), corrected, fresh) < divergence(build(), without, fresh)


def test_corrections_see_the_images_that_are_fitted_to_alone():
    seen = []
    spies = {name: lambda model, *args, name=name: seen.append((name, args)) for name in CORRECTIONS}
    pruned_with(vit, **spies)
    assert [name for name, _ in seen] == list(CORRECTIONS)
    fitted = RandomImages(64).images[:48]
    for name, args in seen:
        (images,) = args[1] if name == "_refit_" else args[0]
        assert torch.equal(images, fitted)


# what is refused


def test_impossible_counts_are_refused():
    model = tiny_model("vit")
    with pytest.raises(PlanError, match=r"^The budget is 4 sites, but the model has 3 sites: ask"):
        prune(model, batches_for(model), Budget(num_blocks=4))


@pytest.mark.parametrize("budget", [Budget(macs=0.05), Budget(parameters=0.05)], ids=str)
def test_an_impossible_budget_is_refused(budget):
    with pytest.raises(PlanError, match=rf"^The budget is {budget}, but .* all 3 sites .*\d+\.\d%.*: ask for no more"):
        prune(vit(), [RandomImages().images], budget)


def test_pruning_without_images_is_refused():
    with pytest.raises(ValueError, match="no calibration batches"):
        prune(tiny_model("vit"), [], Budget(num_blocks=1))


def test_an_unknown_selector_is_refused():
    with pytest.raises(UPDPError, match=r"^The selector is 'best', expected one of"):
        prune(vit(), [RandomImages().images], Budget(num_blocks=1), selector="best")


def test_form_that_the_model_lacks_is_refused():
    model = tiny_model("timm-eva02")
    with pytest.raises(PlanError, match="has no site of the form 'merge'"):
        prune(model, batches_for(model), Budget(num_blocks=1), form="merge")
