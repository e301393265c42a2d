"""Whole blocks dropped: the result is a stock model wherever a stock configuration can say it."""

import copy

import pytest
import torch
from rings import slow_but
from tiny_models import close_, tiny_model

from updp_hf import Form, Plan, UPDPForImageClassification, find_sites, gate_, merge
from updp_hf.surgery.model_io import example_inputs_of, logits_of
from updp_hf.surgery.stock import without_blocks

ISOTROPIC = ["vit", "timm-wrapper"]
ALIKE = ["deit", "deit-teacher", "dinov2", "dinov2-swiglu", "beit"]


def dropped(name, numbers):
    """Return the closed model and the merged one, with the blocks of these numbers dropped."""
    model = tiny_model(name)
    if hasattr(model.config, "id2label"):
        model.config.id2label = {i: f"class {i}" for i in range(5)}
        model.config.label2id = {f"class {i}": i for i in range(5)}
    sites = find_sites(model, [Form.BLOCK_DROP]).sites
    gate_(model, Plan(tuple(sites[i] for i in numbers)))
    close_(model)
    return model, merge(model)


def assert_same_logits(expected, found):
    inputs = example_inputs_of(expected, 3, seed=5)
    with torch.no_grad():
        assert torch.allclose(logits_of(expected, inputs), logits_of(found, inputs), rtol=1e-10, atol=1e-12)


def test_blocks_with_names_have_no_configuration_field():
    assert without_blocks(tiny_model("vit"), ["vit.layers.0", "vit.tree2"]) is None


@pytest.mark.parametrize("numbers", slow_but([[0], [1], [0, 2]], [0, 2]), ids=str)
@pytest.mark.parametrize("name", [*ISOTROPIC, *(pytest.param(name, marks=pytest.mark.slow) for name in ALIKE)])
def test_isotropic_model_becomes_a_shallower_stock_model(name, numbers, tmp_path):
    closed, stock = dropped(name, numbers)
    assert type(stock) is type(closed)
    depth = stock.config.model_args["depth"] if name == "timm-wrapper" else stock.config.num_hidden_layers
    assert depth == 3 - len(numbers)
    assert stock.config.id2label == {i: f"class {i}" for i in range(5)}
    assert_same_logits(closed, stock)
    stock.save_pretrained(tmp_path)
    assert_same_logits(closed, type(stock).from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["swin", pytest.param("swinv2", marks=pytest.mark.slow)])
def test_stage_loses_its_last_block(name, tmp_path):
    closed, stock = dropped(name, [1, 3])
    assert type(stock) is type(closed)
    assert stock.config.depths == [1, 1]
    assert_same_logits(closed, stock)
    stock.save_pretrained(tmp_path)
    assert_same_logits(closed, type(stock).from_pretrained(tmp_path))


@pytest.mark.parametrize("numbers", [[0], [0, 1]], ids=["a window would stand elsewhere", "a stage would be empty"])
def test_what_no_configuration_says_keeps_our_class(numbers):
    closed, merged = dropped("swin", numbers)
    assert type(merged) is UPDPForImageClassification
    assert_same_logits(closed, merged)


def test_model_keeps_its_weights_and_configuration():
    model = tiny_model("vit")
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    stock = without_blocks(model, ["vit.layers.1"])
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert torch.equal(stock.vit.layers[1].mlp.fc1.weight, model.vit.layers[2].mlp.fc1.weight)
    assert stock.dtype is torch.float64
    assert not stock.training


def test_dropping_every_block_has_no_stock_configuration():
    model = tiny_model("vit")
    assert without_blocks(model, [f"vit.layers.{i}" for i in range(3)]) is None
