import copy

import pytest
import torch
from tiny_models import close_, tiny_model

from updp_hf import Form, Plan, UPDPForImageClassification, find_sites, gate_, merge, prune
from updp_hf.core.plan import PlanError
from updp_hf.inputs import example_inputs_of, logits_of
from updp_hf.selection import last


def batches_for(model):
    return [example_inputs_of(model, 32, seed) for seed in range(3)]


@torch.no_grad()
def damage(checkpoint, pruned):
    """Return the share of the logits' spread over held-out images that pruning changes."""
    inputs = example_inputs_of(checkpoint, 64, seed=9)
    expected = logits_of(checkpoint, inputs)
    return float((logits_of(pruned, inputs) - expected).norm() / (expected - expected.mean(0)).norm())


@pytest.mark.parametrize("form", [Form.BRANCH_FIT, Form.MERGE, Form.MERGE_KEEP_NORM, Form.ATTENTION_DROP])
def test_pruning_without_training(form, tmp_path):
    model = tiny_model("vit")
    state, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    pruned = prune(model, batches_for(model), 2, form=form)
    assert type(pruned) is UPDPForImageClassification
    assert len(Plan.from_dict(pruned.config.plan).sites) == 2
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    pruned.save_pretrained(tmp_path)
    loaded = copy.deepcopy(UPDPForImageClassification.from_pretrained(tmp_path))
    inputs = example_inputs_of(model, 3)
    with torch.no_grad():
        assert torch.equal(logits_of(loaded, inputs), logits_of(pruned, inputs))


@pytest.mark.parametrize("name", ["vit", "timm-deit3", "swin"])
def test_fit_does_less_damage_than_closing_as_it_is(name):
    model = tiny_model(name)
    fitted = prune(model, batches_for(model), 2, form=Form.MERGE_KEEP_NORM, selector=last)
    inherited = copy.deepcopy(model)
    gate_(inherited, Plan(find_sites(model, [Form.MERGE_KEEP_NORM]).sites[-2:]))
    close_(inherited)
    assert damage(model, fitted) < 0.7 * damage(model, merge(inherited))


def test_timm_model_is_pruned_to_a_timm_model():
    model = tiny_model("timm-vit")
    assert type(prune(model, batches_for(model), 1)) is type(model)


def test_dropped_blocks_leave_the_stock_class():
    model = tiny_model("vit")
    pruned = prune(model, batches_for(model), 1, form="block-drop")
    assert type(pruned) is type(model)
    assert pruned.config.num_hidden_layers == 2


@pytest.mark.parametrize("count", [0, 4])
def test_impossible_counts_are_refused(count):
    model = tiny_model("vit")
    with pytest.raises(PlanError, match=f"^{count} blocks are to be pruned, but the model has 3 sites"):
        prune(model, batches_for(model), count)


def test_pruning_without_images_is_refused():
    with pytest.raises(ValueError, match="no calibration batches"):
        prune(tiny_model("vit"), [], 1)


def test_form_that_the_model_lacks_is_refused():
    model = tiny_model("timm-eva02")
    with pytest.raises(PlanError, match="has no site of the form 'merge'"):
        prune(model, batches_for(model), 1, form="merge")
