"""What is built before its weights are there takes neither memory nor time worth mentioning."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, SwinConfig, ViTConfig

from updp_hf.errors import UPDPError
from updp_hf.model.bounds_updp import MAX_MODULES, MAX_OPERATIONS, MAX_VALUES, small_skeleton

LARGE = {
    "zeros": lambda: torch.zeros(2**40, device="cpu"),
    "rates": lambda: torch.linspace(0, 0.1, 2**40, device="cpu"),
    "counting": lambda: torch.arange(2**40, device="cpu"),
    "repeated": lambda: torch.ones(10, device="cpu").repeat(2**36),
    "a product": lambda: torch.ones(2**15, 1, device="cpu") * torch.ones(2**15, device="cpu"),
    "joined": lambda: torch.cat([torch.ones(MAX_VALUES, device="cpu")] * 2),
}


@pytest.mark.parametrize("compute", LARGE.values(), ids=LARGE)
def test_a_large_tensor_is_stopped_before_it_is_allocated(compute):
    with torch.device("meta"), pytest.raises(UPDPError, match=r"computes a tensor of \d+ values"), small_skeleton():
        compute()


def test_what_lies_on_meta_may_have_any_size():
    with torch.device("meta"), small_skeleton():
        assert nn.Linear(2**20, 2**20).weight.numel() == 2**40


def test_small_tensors_are_what_they_are_without_bounds():
    with torch.device("meta"), small_skeleton():
        rates = [rate.item() for rate in torch.linspace(0, 1, 5, device="cpu")]
    assert rates == [0, 0.25, 0.5, 0.75, 1]


def test_operations_are_counted():
    with torch.device("meta"), pytest.raises(UPDPError, match="operations"), small_skeleton():
        [torch.zeros(1) for _ in range(MAX_OPERATIONS + 1)]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_modules_are_counted(device):
    with torch.device(device), pytest.raises(UPDPError, match="modules"), small_skeleton():
        nn.ModuleList(nn.Identity() for _ in range(MAX_MODULES + 1))


def test_what_is_built_with_its_weights_may_have_any_size():
    with small_skeleton():
        assert torch.ones(2 * MAX_VALUES).sum() == 2 * MAX_VALUES


@pytest.mark.parametrize(
    "config",
    [ViTConfig(num_hidden_layers=48, hidden_size=1664, num_attention_heads=16), SwinConfig(depths=[2, 2, 18, 2])],
    ids=["vit", "swin"],
)
def test_real_models_stay_far_below(config):
    with torch.device("meta"), small_skeleton():
        model = AutoModelForImageClassification.from_config(config)
    assert 8 * sum(1 for _ in model.modules()) < MAX_MODULES
