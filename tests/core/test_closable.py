"""What each leaf is to a run, read off its operations."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from updp_hf.core import closable
from updp_hf.core.closable import Role, close_activation, close_norm, is_registered, register_closable, role_of
from updp_hf.core.graph import trace
from updp_hf.layout_updp import ChannelBatchNorm

CHANNELS = 6


def role(module, *shape):
    """Return the role of `module` behind a Linear, on tokens of `CHANNELS` channels."""
    model = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), module)
    graph = trace(model, {"input": torch.randn(2, *shape, CHANNELS)}, is_registered)
    return next(role_of(module, call) for call in graph.calls if call.path == "1")


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class StarRelu(nn.Module):
    """A non-linearity with parameters, as MetaFormer's."""

    def __init__(self):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.scale * x.relu() ** 2 + self.bias


class Scale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(*shape))

    def forward(self, x):
        return x * self.gamma


class Shift(Scale):
    def forward(self, x):
        return x + self.gamma


class TokenMean(nn.Module):
    def forward(self, x):
        return x - x.mean(1, keepdim=True)


class SubLinear(nn.Linear):
    pass


class TanhLinear(nn.Module):
    """Not pointwise, and affine to nobody."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS))

    def forward(self, x):
        return nn.functional.linear(x, self.weight.tanh())


POINTWISE = [
    nn.GELU(),
    nn.GELU("tanh"),
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.SiLU(inplace=True),
    nn.LeakyReLU(),
    nn.ELU(),
    nn.Mish(),
    nn.Hardswish(),
    nn.Hardswish(inplace=True),
    nn.Hardsigmoid(),
    nn.LogSigmoid(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Softplus(),
    nn.PReLU(),
    QuickGelu(),
]


@pytest.mark.parametrize("module", POINTWISE, ids=repr)
def test_every_pointwise_leaf_is_an_activation(module):
    assert role(module, 5) is Role.ACTIVATION


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(CHANNELS, 3), Role.DENSE),
        (Scale(CHANNELS), Role.DIAGONAL),
        (nn.LayerNorm(CHANNELS), Role.NORM),
        (nn.LayerNorm(CHANNELS, elementwise_affine=False), Role.NORM),
        (nn.LayerNorm(CHANNELS, bias=False), Role.NORM),
        (nn.RMSNorm(CHANNELS), Role.NORM),
    ],
    ids=str,
)
def test_affine_modules_and_norms_have_their_role(module, expected):
    assert role(module, 5) is expected


@pytest.mark.parametrize(
    "module",
    [
        nn.Softmax(-1),
        nn.LayerNorm((5, CHANNELS)),
        nn.GLU(),
        nn.GroupNorm(5, 5),
        TokenMean(),
        SubLinear(CHANNELS, CHANNELS),
        TanhLinear(),
        StarRelu(),
        Shift(CHANNELS),
        Scale(1),  # one factor for all channels has no place in a map of channels
        Scale(5, 1),
        nn.Conv1d(5, 5, 1),
    ],
    ids=repr,
)
def test_what_is_not_known_to_close_has_no_role(module):
    assert role(module, 5) is None


@pytest.mark.parametrize("tokens", [5, CHANNELS])
def test_batch_norm_of_the_token_axis_is_not_a_map_of_channels(tokens):
    assert role(nn.BatchNorm1d(tokens), tokens) is None
    assert role(nn.BatchNorm1d(CHANNELS)) is Role.DIAGONAL


class Square(nn.Module):
    """Use a value twice in one leaf, and one beside it."""

    def __init__(self):
        super().__init__()
        self.fc, self.times = nn.Linear(CHANNELS, CHANNELS), Product()

    def forward(self, x):
        x = self.fc(x)
        return self.times(x, x + 1)


class Product(nn.Module):
    def forward(self, left, right):
        return left * right


def test_a_leaf_with_two_inputs_has_no_role():
    model = Square()
    call = next(call for call in trace(model, {"x": torch.randn(2, CHANNELS)}).calls if call.path == "times")
    assert role_of(model.times, call) is None


@pytest.fixture
def registered(monkeypatch):
    """Undo what a test registers."""
    monkeypatch.setattr(closable, "_REGISTERED", dict(closable._REGISTERED))


@pytest.mark.usefixtures("registered")
def test_a_registered_class_is_an_activation_and_its_subclass_is_not():
    class Twin(StarRelu):
        pass

    register_closable(StarRelu)
    assert is_registered(StarRelu())
    assert not is_registered(Twin())
    assert role(StarRelu(), 5) is Role.ACTIVATION
    assert role(Twin(), 5) is None
    assert isinstance(close_activation(StarRelu()), nn.Identity)


@pytest.mark.usefixtures("registered")
def test_a_registered_class_may_have_children():
    block = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.Tanh())
    register_closable(nn.Sequential)
    model = nn.ModuleDict({"fc": nn.Linear(CHANNELS, CHANNELS), "act": block})
    model.forward = lambda x: model["act"](model["fc"](x))
    graph = trace(model, {"x": torch.randn(2, CHANNELS)}, is_registered)
    assert [(call.path, role_of(model[call.path], call)) for call in graph.calls][1] == ("act", Role.ACTIVATION)


@pytest.mark.usefixtures("registered")
def test_a_registered_closing_builds_the_affine_module():
    register_closable(StarRelu, lambda module: nn.Linear(CHANNELS, CHANNELS))
    assert close_activation(StarRelu()).out_features == CHANNELS
    assert isinstance(close_activation(nn.GELU()), nn.Identity)


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_closes_to_a_batch_norm_over_its_channels_with_its_eps(norm, eps):
    closed = close_norm(norm(CHANNELS, eps=eps))
    assert type(closed) is ChannelBatchNorm
    assert (closed.norm.num_features, closed.norm.eps) == (CHANNELS, eps)


def test_the_closed_norm_normalises_channels_also_with_as_many_tokens():
    closed = close_norm(nn.LayerNorm(CHANNELS, eps=1e-12)).double().train()
    y = closed(torch.randn(32, CHANNELS, CHANNELS).double() * 3 + 1)
    assert_close(y.mean((0, 1)), torch.zeros(CHANNELS).double(), atol=1e-10, rtol=0)
    assert_close(y.var((0, 1), unbiased=False), torch.ones(CHANNELS).double())
    assert y.mean((0, 2)).abs().max() > 1e-3  # tokens are not
