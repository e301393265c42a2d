"""What each leaf is to a run, read off its operations."""

import pytest
import torch
from timm.layers import (
    BatchNormAct2d,
    EcaModule,
    EffectiveSEModule,
    GroupNorm1,
    LayerNorm2d,
    LayerScale2d,
    SqueezeExcite,
)
from timm.layers.cbam import CbamModule, LightSpatialAttn, SpatialAttn
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.testing import assert_close
from torchvision.ops import SqueezeExcitation
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN

from updp_hf.core.graph import roles as closable
from updp_hf.core.graph.calls import trace
from updp_hf.core.graph.roles import Role, close_activation, close_norm, is_registered, part_of, register_closable
from updp_hf.model.modules_updp import ChannelBatchNorm
from updp_hf.surgery.find import read

CHANNELS = 6
SIZES = [(5, 7), (CHANNELS, CHANNELS), (2, 2), (1, 1)]


def part(module, *shape):
    """Return the part of `module` behind a Linear, on tokens of `CHANNELS` channels."""
    model = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), module)
    graph = trace(model, {"input": torch.randn(2, *shape, CHANNELS)}, is_registered)
    return next(part_of(module, call) for call in graph.calls if call.path == "1")


def role(module, *shape):
    found = part(module, *shape)
    return None if found is None else found.role


def image_part(module, size=(5, 7), axis=1):
    """Return the part of `module`, children and all, between convolutions or, on the last axis, Linears."""
    shape = (2, CHANNELS, *size) if axis == 1 else (2, *size, CHANNELS)
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1) if axis == 1 else nn.Linear(CHANNELS, CHANNELS), module)
    structure = read(model.eval(), {"input": torch.randn(shape)})
    return next((part for call, part in structure.parts.items() if call.path == "1"), None)


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


class ScaledLinear(nn.Linear):
    """Its weight is not what it multiplies with."""

    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight, self.bias)


class Mixed(nn.Module):
    """Not pointwise, so that only its author knows that it can be closed."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CHANNELS))

    def forward(self, x):
        return torch.maximum(self.scale * x, x.mean(-1, keepdim=True))


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
    StarRelu(),
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
        (SubLinear(CHANNELS, 3), Role.DENSE),
    ],
    ids=str,
)
def test_affine_modules_and_norms_have_their_role(module, expected):
    assert part(module, 5) == (expected, -1)


@pytest.mark.parametrize(
    "module",
    [
        nn.Softmax(-1),
        nn.LayerNorm((5, CHANNELS)),
        nn.GLU(),
        nn.GroupNorm(5, 5),
        TokenMean(),
        TanhLinear(),
        Mixed(),
        Shift(CHANNELS),
        Scale(1),  # one factor for all channels has no place in a map of channels
        Scale(5, 1),
        nn.Conv1d(5, 5, 1),
        ScaledLinear(CHANNELS, CHANNELS),
    ],
    ids=repr,
)
def test_what_is_not_known_to_close_has_no_role(module):
    assert role(module, 5) is None


@pytest.mark.parametrize("tokens", [5, CHANNELS])
def test_batch_norm_of_the_token_axis_is_not_a_map_of_channels(tokens):
    assert role(nn.BatchNorm1d(tokens), tokens) is None
    assert part(nn.BatchNorm1d(CHANNELS)) == (Role.DIAGONAL, -1)


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
    assert part_of(model.times, call) is None


@pytest.fixture
def registered(monkeypatch):
    """Undo what a test registers."""
    monkeypatch.setattr(closable, "_REGISTERED", dict(closable._REGISTERED))


@pytest.mark.usefixtures("registered")
def test_a_registered_class_is_an_activation_and_its_subclass_is_not():
    class Twin(Mixed):
        pass

    register_closable(Mixed)
    assert is_registered(Mixed())
    assert not is_registered(Twin())
    assert part(Mixed(), 5) == (Role.ACTIVATION, None)
    assert part(Twin(), 5) is None
    assert isinstance(close_activation(Mixed()), nn.Identity)


@pytest.mark.usefixtures("registered")
def test_a_registered_class_may_have_children():
    block = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.Tanh())
    register_closable(nn.Sequential)
    model = nn.ModuleDict({"fc": nn.Linear(CHANNELS, CHANNELS), "act": block})
    model.forward = lambda x: model["act"](model["fc"](x))
    graph = trace(model, {"x": torch.randn(2, CHANNELS)}, is_registered)
    assert [(call.path, part_of(model[call.path], call)) for call in graph.calls][1] == (
        "act",
        (Role.ACTIVATION, None),
    )


@pytest.mark.usefixtures("registered")
def test_a_registered_closing_builds_the_affine_module():
    register_closable(StarRelu, lambda module: nn.Linear(CHANNELS, CHANNELS))
    assert close_activation(StarRelu()).out_features == CHANNELS
    assert isinstance(close_activation(nn.GELU()), nn.Identity)


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_closes_to_a_batch_norm_over_its_channels_with_its_eps(norm, eps):
    closed = close_norm(norm(CHANNELS, eps=eps), CHANNELS, -1)
    assert type(closed) is ChannelBatchNorm
    assert (closed.norm.num_features, closed.norm.eps) == (CHANNELS, eps)


def test_the_closed_norm_normalises_channels_also_with_as_many_tokens():
    closed = close_norm(nn.LayerNorm(CHANNELS, eps=1e-12), CHANNELS, -1).double().train()
    y = closed(torch.randn(32, CHANNELS, CHANNELS).double() * 3 + 1)
    assert_close(y.mean((0, 1)), torch.zeros(CHANNELS).double(), atol=1e-10, rtol=0)
    assert_close(y.var((0, 1), unbiased=False), torch.ones(CHANNELS).double())
    assert y.mean((0, 2)).abs().max() > 1e-3  # tokens are not


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_a_norm_of_an_image_closes_to_a_batch_norm_of_its_channels(eps):
    closed = close_norm(LayerNorm2d(CHANNELS, eps=eps), CHANNELS, 1)
    assert type(closed) is nn.BatchNorm2d
    assert (closed.num_features, closed.eps) == (CHANNELS, eps)
    assert close_norm(SqueezeExcite(CHANNELS), CHANNELS, 1).eps == 1e-5  # which has none of its own


# images


CONVOLUTIONS = {
    "1x1": lambda: nn.Conv2d(CHANNELS, 3, 1),
    "3x3": lambda: nn.Conv2d(CHANNELS, 3, 3, padding=1, stride=2),
    "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
    "same": lambda: nn.Conv2d(CHANNELS, 3, 3, padding="same"),
    "linear": lambda: nn.Linear(7, 3),
}


@pytest.mark.parametrize("size", SIZES)
def test_convolutions_mix_channels_on_axis_1_and_linears_on_the_last(size):
    for name, make in CONVOLUTIONS.items():
        if name == "linear":
            assert image_part(nn.Linear(CHANNELS, 3), size, axis=-1) == (Role.DENSE, -1)
            assert image_part(nn.Linear(size[1], 3), size) == (Role.DENSE, -1)
        else:
            assert image_part(make(), size) == (Role.DENSE, 1), name


def test_a_convolution_of_one_image_without_a_batch_axis_is_none():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    call = trace(model, {"input": torch.randn(3, 5, 5)}).calls[1]
    assert part_of(model[1], call) is None


DIAGONALS = {
    "batch norm": (lambda: nn.BatchNorm2d(CHANNELS), 1),
    "batch norm without weights": (lambda: nn.BatchNorm2d(CHANNELS, affine=False), 1),
    "batch norm with an activation inside": (lambda: BatchNormAct2d(CHANNELS), 1),
    "batch norm that could have one": (lambda: BatchNormAct2d(CHANNELS, apply_act=False), 1),
    "timm's layer scale": (lambda: LayerScale2d(CHANNELS), 1),
    "layer scale": (lambda: Scale(CHANNELS, 1, 1), None),
    "layer scale of the last axis": (lambda: Scale(CHANNELS), -1),
}


@pytest.mark.parametrize(("make", "axis"), DIAGONALS.values(), ids=DIAGONALS)
@pytest.mark.parametrize("size", SIZES)
def test_what_scales_each_channel_is_found_with_its_axis(make, axis, size):
    # A parameter of three dimensions is no vector: it is not read.
    assert image_part(make(), size, axis or 1) == (None if axis is None else (Role.DIAGONAL, axis))


def test_an_activation_inside_a_batch_norm_is_a_part_of_its_own():
    norm = BatchNormAct2d(CHANNELS, act_layer=nn.SiLU)
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), norm).eval()
    structure = read(model, {"input": torch.randn(2, 3, 5, 5)})
    found = {call.path: part for call, part in structure.parts.items()}
    assert found["1"] == (Role.DIAGONAL, 1)
    assert found["1.act"] == (Role.ACTIVATION, None)


class TanhBatchNorm(nn.BatchNorm2d):
    """A BatchNorm that does something else."""

    def forward(self, x):
        return super().forward(x).tanh()


class TwiceBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(super().forward(x))


@pytest.mark.parametrize("norm", [TanhBatchNorm(CHANNELS), TwiceBatchNorm(CHANNELS)], ids=["tanh", "twice"])
def test_a_batch_norm_that_does_more_has_no_part(norm):
    assert image_part(norm) is None


NORMS = {
    "timm's LayerNorm2d": (lambda: LayerNorm2d(CHANNELS), 1),
    "GroupNorm of one group": (lambda: GroupNorm1(CHANNELS), 1),
    "GroupNorm": (lambda: nn.GroupNorm(3, CHANNELS), 1),
    "transformers' ConvNext": (lambda: ConvNextLayerNorm(CHANNELS, data_format="channels_first"), 1),
    "LayerNorm": (lambda: nn.LayerNorm(CHANNELS), -1),
    "RMSNorm": (lambda: nn.RMSNorm(CHANNELS), -1),
}


@pytest.mark.parametrize(("make", "axis"), NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("size", SIZES)
def test_norms_of_images_are_found_with_their_axis(make, axis, size):
    assert image_part(make(), size, axis) == (Role.NORM, axis)


@pytest.mark.parametrize("size", SIZES)
def test_a_norm_of_each_row_is_none_of_channels(size):
    assert image_part(nn.LayerNorm((CHANNELS, *size)), size) is None
    if size[0] > 1:
        assert image_part(nn.LayerNorm(size), size) is None


class SqueezeTokens(nn.Module):
    """Squeeze-excite for `(batch, height, width, channels)`."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x):
        return x * self.fc(x.mean((1, 2), keepdim=True)).sigmoid()


class Pooled(nn.Module):
    """Squeeze-excite with modules for all it does."""

    def __init__(self, pool=nn.AdaptiveAvgPool2d):
        super().__init__()
        self.pool, self.fc = pool(1), nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(self.pool(x))


RECALIBRATIONS = {
    "squeeze-excite": (lambda: SqueezeExcite(CHANNELS, rd_channels=2), 1),
    "squeeze-excite with a norm": (lambda: SqueezeExcite(CHANNELS, rd_channels=2, norm_layer=nn.BatchNorm2d), 1),
    "squeeze-excite with a maximum": (lambda: SqueezeExcite(CHANNELS, rd_channels=2, add_maxpool=True), 1),
    "torchvision's squeeze-excite": (lambda: SqueezeExcitation(CHANNELS, 2), 1),
    "effective squeeze-excite": (lambda: EffectiveSEModule(CHANNELS), 1),
    "ECA": (lambda: EcaModule(CHANNELS), 1),
    "timm's GRN": (lambda: GlobalResponseNorm(CHANNELS, channels_last=False), 1),
    "timm's GRN of tokens": (lambda: GlobalResponseNorm(CHANNELS, channels_last=True), -1),
    "transformers' GRN": (lambda: ConvNextV2GRN(CHANNELS), -1),
    "of tokens": (SqueezeTokens, -1),
    "of modules": (Pooled, 1),
    "of maxima": (lambda: Pooled(nn.AdaptiveMaxPool2d), 1),
}


@pytest.mark.parametrize(("make", "axis"), RECALIBRATIONS.values(), ids=RECALIBRATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_what_multiplies_channels_by_what_all_their_means_say_is_found_with_its_axis(make, axis, size):
    assert image_part(make(), size, axis) == (Role.RECALIBRATION, axis)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(3))

    def forward(self, x):
        q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
        return x + ((q.mT @ k).softmax(-1) @ v.mT).mT.view(x.shape)


class ConvBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU()

    def forward(self, x):
        return x + self.act(self.norm(self.conv(x)))


class RowMean(nn.Module):
    """Multiply by the means of rows, which leaves one axis of positions."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x):
        return x * self.fc(x.mean(3, keepdim=True)).sigmoid()


class ChannelMean(nn.Module):
    """Multiply each position by what its channels say."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return x * self.fc(x.mean(1, keepdim=True)).sigmoid()


class Grid(nn.Module):
    """Pool to a grid of 2 x 2."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x):
        pooled = self.fc(nn.functional.adaptive_avg_pool2d(x, 2))
        return x * nn.functional.interpolate(pooled, x.shape[2:])


class SqueezeConv(nn.Module):
    """Squeeze-excite that convolves the image, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.se = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), SqueezeExcite(CHANNELS, rd_channels=2)

    def forward(self, x):
        return self.se(self.conv(x))


OTHERS = {
    "self-attention": SelfAttention,
    "spatial attention": SpatialAttn,
    "spatial attention, lighter": LightSpatialAttn,
    "CBAM": lambda: CbamModule(CHANNELS, rd_channels=2),
    "convolutional block": ConvBlock,
    "rows": RowMean,
    "channels": ChannelMean,
    "grid": Grid,
    "with a convolution": SqueezeConv,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("size", SIZES)
def test_what_works_on_positions_recalibrates_no_channels(make, size):
    assert image_part(make(), size) is None
