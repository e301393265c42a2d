"""Costs, counted by hand."""

import pytest
import torch
from torch import nn

from updp_hf.core.cost import count_macs, count_parameters, macs_by_module, measure_latency

B, N, C, H = 2, 5, 8, 2


def test_linear():
    assert count_macs(nn.Linear(3, 7), {"input": torch.randn(B, N, 3)}) == B * N * 3 * 7


@pytest.mark.parametrize(
    ("conv", "macs"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), 11 * 14 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), 6 * 7 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, (3, 5), groups=2), 9 * 10 * 6 * 2 * 15),
        (nn.Conv2d(4, 4, 7, padding=3, groups=4), 11 * 14 * 4 * 49),
        (nn.Conv2d(4, 6, 3, dilation=2, bias=False), 7 * 10 * 6 * 4 * 9),
    ],
    ids=["dense", "stride", "groups", "depthwise", "dilation"],
)
def test_conv2d(conv, macs):
    assert count_macs(conv, {"input": torch.randn(B, 4, 11, 14)}) == B * macs


def test_conv1d():
    assert count_macs(nn.Conv1d(4, 6, 3, stride=2), {"input": torch.randn(B, 4, 11)}) == B * 5 * 6 * 4 * 3


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, H, C // H)).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Explicit(Fused):
    def attend(self, q, k, v):
        return (q @ k.mT).softmax(-1) @ v


class Torch(nn.Module):
    """The module of torch, which in evaluation mode is one operation."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(C, H, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("attention", [Fused, Explicit, Torch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_with_its_products(attention, dtype):
    projections, products = B * N * (3 * C * C + C * C), B * H * 2 * N * N * (C // H)
    assert count_macs(attention().to(dtype), {"x": torch.randn(B, N, C, dtype=dtype)}) == projections + products


def test_activations_and_norms_are_free():
    model = nn.Sequential(nn.LayerNorm(3), nn.GELU(), nn.BatchNorm1d(3))
    assert count_macs(model, {"input": torch.randn(B, 3)}) == 0


def test_each_module_knows_its_own():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6)))
    macs = macs_by_module(model, {"input": torch.randn(B, 3)})
    expected = {"": 62, "0": 12, "1": 50, "1.0": 20, "1.2": 30}
    assert {path: n for path, n in macs.items() if n} == {path: B * n for path, n in expected.items()}


def test_counting_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    model[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = torch.backends.mha.get_fastpath_enabled()
    count_macs(model, {"input": torch.randn(B, 3)})
    assert [module.training for module in model.modules()] == [True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() is fused


def test_parameters_are_counted_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4)})
    assert count_parameters(model) == 16 + 16 + 8
    model["b"].weight = model["a"].weight
    assert count_parameters(model) == 16 + 4 + 8
    model["c"] = model["a"]
    assert count_parameters(model) == 16 + 4 + 8


class Counted(nn.Module):
    """Write down in which order models are called, and with how many images."""

    def __init__(self, name, log):
        super().__init__()
        self.name, self.log = name, log

    def forward(self, x):
        self.log.append((self.name, len(x), torch.is_inference_mode_enabled()))
        return x


def test_latency_is_one_number_for_each_model_and_input():
    log = []
    models = {name: Counted(name, log) for name in ("before", "after")}
    inputs = [{"x": torch.randn(batch, 3)} for batch in (1, 4, 2)]
    latency = measure_latency(models, inputs, rounds=3, warm_up=2)
    assert list(latency) == ["before", "after"]
    assert all(len(seconds) == 3 and all(s >= 0 for s in seconds) for seconds in latency.values())
    assert log == [(name, batch, True) for batch in (1, 4, 2) for _ in range(3 + 2) for name in models]


def test_latency_is_the_median_without_the_warm_up(monkeypatch):
    seconds = iter([100.0, 100.0, 3.0, 30.0, 1.0, 10.0, 2.0, 20.0])
    monkeypatch.setattr("updp_hf.core.cost.forward_seconds", lambda model, batch: next(seconds))
    models = {"before": nn.Identity(), "after": nn.Identity()}
    latency = measure_latency(models, [{"input": torch.randn(1)}], rounds=3, warm_up=1)
    assert latency == {"before": [2.0], "after": [20.0]}
