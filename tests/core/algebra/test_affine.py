"""The laws of the algebra, in float64 and on whole maps, borders included."""

import dataclasses

import pytest
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d, StdConv2d
from timm.models.vision_transformer import LayerScale
from torch import nn
from torch.testing import assert_close

from updp_hf.core.algebra.affine import InexactMerge, add, apply, compose, fold, identity
from updp_hf.core.algebra.modules import empty, is_readable, is_writable, read, write
from updp_hf.model.modules_updp import ChannelBatchNorm

SIZES = [(11, 14), (15, 15), (16, 13)]


def randomise(module):
    """Draw every weight, bias and statistic, so that no law holds because something is 0 or 1."""
    module = module.double().eval()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("running_var"):
            tensor.data.uniform_(0.1, 2.0)
        elif tensor.is_floating_point():
            tensor.data.normal_()
    return module


def linear(*args, **kwargs):
    return randomise(nn.Linear(*args, **kwargs))


def conv1d(*args, **kwargs):
    return randomise(nn.Conv1d(*args, **kwargs))


def conv2d(*args, **kwargs):
    return randomise(nn.Conv2d(*args, **kwargs))


def inputs_of(module):
    """Draw inputs for `module`, odd and even in size."""
    match module:
        case nn.Linear():
            return [torch.randn(3, n, module.in_features).double() for n in (1, 5)]
        case nn.Conv1d():
            return [torch.randn(2, module.in_channels, n).double() for n in (11, 14)]
        case nn.Conv2d():
            return [torch.randn(2, module.in_channels, *size).double() for size in SIZES]


def assert_computes(map, module, inputs):
    for x in inputs:
        expected = module(x)
        assert_close(apply(map, x), expected, rtol=0, atol=1e-11 * float(expected.detach().abs().max()))


def assert_equal_maps(left, right):
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, torch.Tensor):
            assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda text, name=field.name: f"{name}: {text}")
        else:
            assert a == b, field.name


# read and apply

MODULES = {
    "linear": lambda: linear(5, 7),
    "linear without bias": lambda: linear(5, 7, bias=False),
    "conv1d": lambda: conv1d(4, 6, 3, padding=1),
    "conv1d, stride, groups": lambda: conv1d(4, 6, 3, stride=2, padding=2, groups=2),
    "conv1d, even kernel, same": lambda: conv1d(4, 6, 4, padding="same"),
    "conv2d": lambda: conv2d(4, 6, 3, padding=1),
    "conv2d, stride": lambda: conv2d(4, 6, 3, stride=2, padding=1),
    "conv2d, unequal": lambda: conv2d(4, 6, (3, 5), stride=(1, 2), padding=(2, 1)),
    "conv2d, dilation": lambda: conv2d(4, 6, 3, padding=2, dilation=2),
    "conv2d, groups": lambda: conv2d(4, 6, 3, groups=2),
    "conv2d, depthwise": lambda: conv2d(4, 4, 7, padding=3, groups=4),
    "conv2d, valid": lambda: conv2d(4, 6, 3, padding="valid", bias=False),
    "conv2d, even kernel, same": lambda: conv2d(4, 6, (4, 2), padding="same", dilation=(1, 2)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's word on even kernels
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_the_map_that_is_read_computes_what_the_module_does(make):
    module = make()
    assert_computes(read(module), module, inputs_of(module))


def test_reading_keeps_stride_padding_dilation_groups_and_axis():
    map = read(conv2d(4, 6, (3, 5), stride=(1, 2), padding=(3, 1), dilation=(2, 1), groups=2))
    assert (map.kernel, map.stride, map.dilation, map.groups) == ((3, 5), (1, 2), (2, 1), 2)
    assert (map.padding, map.channel_axis) == ((1, 1, 3, 3), 1)
    assert (map.in_channels, map.out_channels) == (4, 6)
    assert (read(linear(4, 6)).kernel, read(linear(4, 6)).channel_axis) == ((), -1)


def test_a_map_is_pointwise_if_positions_do_not_mix():
    assert read(linear(3, 3)).is_pointwise
    assert read(conv2d(3, 3, 1)).is_pointwise
    for mixes in (conv2d(3, 3, 3), conv2d(3, 3, 1, stride=2), conv2d(3, 3, 1, padding=1)):
        assert not read(mixes).is_pointwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_map_is_float64_and_a_copy(dtype):
    module = linear(3, 4).to(dtype)
    map = read(module)
    before = map.weight.clone()
    assert map.weight.dtype == map.bias.dtype == torch.float64
    assert torch.equal(before, module.weight.double())
    nn.init.zeros_(module.weight)
    assert torch.equal(map.weight, before)


class Computed(nn.Linear):
    """Its weight is not what it multiplies with."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.tanh(), self.bias)


REFUSED = {
    "subclass of Linear": lambda: Computed(3, 3),
    "computed weight": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    "computed kernel": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 3)),
    "standardised weight": lambda: StdConv2d(3, 3, 3),
    "scaled weight": lambda: ScaledStdConv2d(3, 3, 3),
    "padding at run time": lambda: Conv2dSame(3, 3, 3),
    "reflected padding": lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
    "circular padding": lambda: nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(3, 3, 3),
    "volume": lambda: nn.Conv3d(3, 3, 3),
    "norm over the input": lambda: nn.LayerNorm(3),
    "norm without statistics": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "activation": lambda: nn.GELU(),
    "table": lambda: nn.Embedding(3, 3),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_reading_refuses_what_only_looks_affine(make):
    with pytest.raises(TypeError):
        read(make())


@pytest.mark.parametrize("make", [REFUSED[name] for name in REFUSED if name != "norm without statistics"])
def test_what_is_refused_says_so_beforehand(make):
    assert not is_readable(make())


class Renamed(nn.Conv2d):
    """A subclass that computes what its class does."""


def test_a_subclass_with_the_forward_of_its_class_is_read():
    module = randomise(Renamed(3, 4, 3, padding=1))
    assert_computes(read(module), module, inputs_of(module))


def test_of_a_batch_norm_with_an_activation_inside_the_norm_is_read():
    norm = randomise(BatchNormAct2d(4))
    x = norm_inputs(4, 2)
    map = read(norm, like=read(conv2d(4, 4, 1)))
    assert_close(apply(map, x).relu(), norm(x.clone()), rtol=0, atol=1e-11)


# reading shapes alone


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_on_meta_a_map_has_all_but_values(make):
    module = make()
    whole, shape = read(module), read(module, device="meta")
    assert {tensor.device.type for tensor in (shape.weight, shape.bias)} == {"meta"}
    assert_same_shape(shape, whole)


def assert_same_shape(shape, whole):
    for field in dataclasses.fields(whole):
        a, b = getattr(shape, field.name), getattr(whole, field.name)
        if isinstance(b, torch.Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        else:
            assert a == b, field.name


# diagonal maps


def norm_inputs(channels, axes, n=6):
    return torch.randn(4, channels, *[n] * axes).double()


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-3])
@pytest.mark.parametrize("variance", [0.3, 1e-4, 1e-8])
def test_batch_norm_is_a_diagonal_map_with_its_own_eps(eps, variance):
    norm = randomise(nn.BatchNorm2d(5, eps=eps))
    norm.running_var.fill_(variance)
    map = read(norm, like=read(conv2d(5, 5, 3)))
    assert_computes(map, norm, [norm_inputs(5, 2)])
    assert map.groups == 5
    assert map.is_pointwise


@pytest.mark.parametrize(
    ("make", "like", "axes"),
    [
        (lambda: nn.BatchNorm1d(5), lambda: linear(5, 5), 0),
        (lambda: nn.BatchNorm1d(5), lambda: conv1d(5, 5, 3), 1),
        (lambda: nn.BatchNorm2d(5, affine=False), lambda: conv2d(5, 5, 3), 2),
        (lambda: nn.SyncBatchNorm(5), lambda: conv2d(5, 5, 3), 2),
    ],
)
def test_every_batch_norm_is_read_as_its_neighbour_needs_it(make, like, axes):
    norm = randomise(make())
    assert_computes(read(norm, like=read(like())), norm, [norm_inputs(5, axes)])


def test_channel_batch_norm_acts_on_the_last_axis_also_with_as_many_tokens_as_channels():
    norm = randomise(ChannelBatchNorm(6, eps=1e-6))
    x = torch.randn(2, 6, 6).double()
    assert_computes(read(norm), norm, [x])
    assert_close(norm(x), norm.norm(x.transpose(1, 2)).transpose(1, 2))


def test_batch_norm_is_read_in_evaluation_mode_whatever_its_mode():
    norm = randomise(nn.BatchNorm1d(4))
    expected = read(norm)
    assert_equal_maps(read(norm.train()), expected)


@pytest.mark.parametrize(("before", "axes"), [(lambda: conv2d(4, 5, 3, padding=1), 2), (lambda: linear(4, 5), 0)])
def test_batch_norm_folds_into_what_stands_before_it(before, axes):
    first, norm = before(), randomise(nn.BatchNorm2d(5, eps=1e-6) if axes else nn.BatchNorm1d(5, eps=1e-6))
    x = norm_inputs(4, axes)
    map = read(first)
    assert_computes(compose(map, read(norm, like=map)), lambda x: norm(first(x)), [x])


def test_layer_scale_is_a_diagonal_map():
    first, scale = linear(3, 5), randomise(LayerScale(5))
    assert_computes(read(scale), scale, [torch.randn(2, 4, 5).double()])
    assert_computes(compose(read(first), read(scale)), nn.Sequential(first, scale), inputs_of(first))


# compose

EXACT = {  # the rows of design.md, section 6, that are exact, and more
    "linear, linear": lambda: (linear(5, 7), linear(7, 3)),
    "linear without bias": lambda: (linear(5, 7, bias=False), linear(7, 3)),
    "conv1d": lambda: (conv1d(4, 6, 3, padding=2), conv1d(6, 5, 3)),
    "conv1d, strides": lambda: (conv1d(4, 6, 3, stride=2, padding=3), conv1d(6, 5, 5, stride=3)),
    "3x3 pad 2, 3x3": lambda: (conv2d(4, 6, 3, padding=2), conv2d(6, 5, 3)),
    "3x3 pad 1, 1x1": lambda: (conv2d(4, 6, 3, padding=1), conv2d(6, 5, 1)),
    "1x1 without bias, 3x3 pad 1": lambda: (conv2d(4, 6, 1, bias=False), conv2d(6, 5, 3, padding=1)),
    "1x1 without bias, stride, 3x3 pad 1": lambda: (
        conv2d(4, 6, 1, stride=2, bias=False),
        conv2d(6, 5, 3, padding=1, stride=2),
    ),
    "1x1 without bias, unequal strides": lambda: (
        conv2d(4, 6, 1, stride=(1, 3), bias=False),
        conv2d(6, 5, 3, padding=(1, 2)),
    ),
    "3x3 stride 2 pad 3, 3x3": lambda: (conv2d(4, 6, 3, stride=2, padding=3), conv2d(6, 5, 3)),
    "3x3 pad 2, 3x3 stride 2": lambda: (conv2d(4, 6, 3, padding=2), conv2d(6, 5, 3, stride=2)),
    "3x3 stride 2, 3x3 stride 2": lambda: (conv2d(4, 6, 3, stride=2, padding=3), conv2d(6, 5, 3, stride=2)),
    "3x3 pad 1, 1x1 stride 2": lambda: (conv2d(4, 6, 3, padding=1), conv2d(6, 5, 1, stride=2)),
    "depthwise 7x7, 1x1": lambda: (conv2d(6, 6, 7, padding=3, groups=6), conv2d(6, 5, 1)),
    "1x1, depthwise": lambda: (conv2d(4, 6, 1), conv2d(6, 6, 3, groups=6)),
    "depthwise, depthwise": lambda: (conv2d(6, 6, 3, padding=2, groups=6), conv2d(6, 6, 3, groups=6)),
    "4 groups, 6 groups": lambda: (conv2d(8, 12, 3, padding=2, groups=4), conv2d(12, 6, 3, groups=6)),
    "dilation, 1x1": lambda: (conv2d(4, 6, 3, padding=2, dilation=2), conv2d(6, 5, 1)),
    "1x1, dilation": lambda: (conv2d(4, 6, 1), conv2d(6, 5, 3, dilation=2)),
    "dilation 2, dilation 3": lambda: (conv2d(4, 6, 3, padding=5, dilation=2), conv2d(6, 5, 2, dilation=3)),
    "stride, dilation": lambda: (conv2d(4, 6, 3, padding=3, stride=2), conv2d(6, 5, 3, dilation=(2, 1))),
    "1x1 stride, dilation": lambda: (conv2d(4, 6, 1, stride=2), conv2d(6, 5, 3, dilation=2)),
    "unequal": lambda: (conv2d(4, 6, (1, 5), stride=(1, 2), padding=(1, 4)), conv2d(6, 5, (3, 1))),
    "even kernel, same": lambda: (conv2d(4, 6, (4, 2), padding="same"), conv2d(6, 5, 1)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_the_composed_map_is_both_applied_in_turn(make):
    first, then = make()
    composed = compose(read(first), read(then))
    assert_computes(composed, nn.Sequential(first, then), inputs_of(first))


NEEDS_VALUES = ("1x1 without bias",)  # whether a bias leaks into a padding, shapes do not tell


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("make", [make for name, make in EXACT.items() if not name.startswith(NEEDS_VALUES)])
def test_on_meta_maps_compose_to_the_shapes_of_the_composed_map(make):
    first, then = make()
    composed = compose(read(first, device="meta"), read(then, device="meta"))
    assert composed.weight.is_meta
    assert_same_shape(composed, compose(read(first), read(then)))


def test_composing_follows_the_formula():
    map = compose(read(conv2d(4, 6, (3, 5), stride=2, padding=(3, 4))), read(conv2d(6, 5, 3, stride=(1, 3))))
    assert (map.kernel, map.stride, map.padding) == ((7, 9), (2, 6), (4, 4, 3, 3))
    no_bias = compose(read(conv2d(4, 6, 1, stride=2, bias=False)), read(conv2d(6, 5, 3, padding=1)))
    assert (no_bias.kernel, no_bias.padding) == ((5, 5), (2, 2, 2, 2))


def test_composing_keeps_what_makes_maps_cheap():
    depthwise = read(conv2d(6, 6, 3, padding=2, groups=6))
    assert compose(depthwise, read(conv2d(6, 6, 3, groups=6))).weight.shape == (6, 1, 5, 5)
    dilated = compose(read(conv2d(4, 6, 1)), read(conv2d(6, 5, 3, dilation=2)))
    assert (dilated.kernel, dilated.dilation) == ((3, 3), (2, 2))
    norm = read(randomise(nn.BatchNorm2d(6)), like=depthwise)
    assert compose(depthwise, norm).groups == 6


INEXACT = {
    "3x3 pad 1, 3x3 pad 1": lambda: (conv2d(4, 6, 3, padding=1), conv2d(6, 5, 3, padding=1)),
    "3x3, 3x3 pad 1": lambda: (conv2d(4, 6, 3, bias=False), conv2d(6, 5, 3, padding=1)),
    "1x1 with bias, 3x3 pad 1": lambda: (conv2d(4, 6, 1), conv2d(6, 5, 3, padding=1)),
    "padded 1x1, 3x3 pad 1": lambda: (conv2d(4, 6, 1, padding=1, bias=False), conv2d(6, 5, 3, padding=1)),
    "one side": lambda: (conv2d(4, 6, 1), conv2d(6, 5, 3, padding=(0, 1))),
    "conv1d": lambda: (conv1d(4, 6, 3, padding=1), conv1d(6, 5, 3, padding=1)),
}


@pytest.mark.parametrize("make", INEXACT.values(), ids=INEXACT)
def test_composing_refuses_a_padding_in_the_middle(make):
    first, then = make()
    with pytest.raises(InexactMerge, match="border"):
        compose(read(first), read(then))


def test_a_shift_leaks_into_the_border_but_a_scale_does_not():
    conv, norm = conv2d(4, 5, 3, padding=1), randomise(nn.BatchNorm2d(4))
    like = read(conv2d(4, 4, 1))
    with pytest.raises(InexactMerge):
        compose(read(norm, like=like), read(conv))
    norm.running_mean.zero_()
    nn.init.zeros_(norm.bias)
    composed = compose(read(norm, like=like), read(conv))
    assert_computes(composed, nn.Sequential(norm, conv), inputs_of(conv))


def test_composing_refuses_maps_on_different_axes_or_channels():
    with pytest.raises(InexactMerge, match="axis"):
        compose(read(linear(4, 4)), read(conv2d(4, 4, 1)))
    with pytest.raises(InexactMerge, match="axis"):
        compose(read(conv1d(4, 4, 1)), read(conv2d(4, 4, 1)))
    with pytest.raises(ValueError, match=r"to 4 channels .* from 5"):
        compose(read(linear(4, 4)), read(linear(5, 4)))


TRIPLES = {
    "linear": lambda: (linear(3, 5), linear(5, 4), linear(4, 6)),
    "conv1d": lambda: (conv1d(3, 4, 3, stride=2, padding=7), conv1d(4, 4, 3), conv1d(4, 2, 5, stride=2)),
    "inverted residual": lambda: (
        conv2d(3, 6, 1, padding=1),
        conv2d(6, 6, 3, stride=2, groups=6),
        conv2d(6, 3, 1),
    ),
    "groups": lambda: (conv2d(4, 8, 3, groups=4, padding=3), conv2d(8, 12, 3, groups=2), conv2d(12, 6, 3, groups=6)),
    "strides": lambda: (conv2d(3, 4, 3, stride=2, padding=5), conv2d(4, 4, 2, stride=3), conv2d(4, 2, 2)),
}


@pytest.mark.parametrize("make", TRIPLES.values(), ids=TRIPLES)
def test_composition_is_associative(make):
    modules = make()
    a, b, c = map(read, modules)
    left, right = compose(compose(a, b), c), compose(a, compose(b, c))
    assert_equal_maps(left, right)
    assert_equal_maps(fold([a, b, c]), left)
    assert_computes(left, nn.Sequential(*modules), inputs_of(modules[0]))


def test_association_does_not_matter_to_dilated_maps():
    modules = conv2d(3, 4, 3, dilation=2, padding=4), conv2d(4, 4, 1), conv2d(4, 2, 3, dilation=2)
    a, b, c = map(read, modules)
    for composed in (compose(compose(a, b), c), compose(a, compose(b, c))):
        assert_computes(composed, nn.Sequential(*modules), inputs_of(modules[0]))


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_the_identity_changes_nothing_on_either_side(make):
    map = read(make())
    follower = dataclasses.replace(map, weight=map.weight.new_zeros(1, map.out_channels, *map.kernel), groups=1)
    assert_equal_maps(compose(identity(map), map), map)
    assert_equal_maps(compose(map, identity(follower)), map)


# add


SAME_SHAPE = {
    "linear": lambda: linear(6, 6),
    "conv1d": lambda: conv1d(6, 6, 5, padding=2),
    "conv2d": lambda: conv2d(6, 6, 3, padding=1),
    "unequal": lambda: conv2d(6, 6, (1, 5), padding=(0, 2)),
    "depthwise": lambda: conv2d(6, 6, 7, padding=3, groups=6),
    "groups": lambda: conv2d(6, 6, 3, padding=1, groups=2),
    "dilation": lambda: conv2d(6, 6, 3, padding=2, dilation=2),
}


@pytest.mark.parametrize("make", SAME_SHAPE.values(), ids=SAME_SHAPE)
def test_a_skip_is_the_sum_with_the_identity(make):
    module = make()
    map = read(module)
    assert_computes(add(identity(map), map), lambda x: x + module(x), inputs_of(module))
    assert_equal_maps(add(identity(map), map), add(map, identity(map)))


def test_a_sum_of_maps_of_different_kernels_and_groups():
    wide, narrow = conv2d(6, 6, 5, padding=2, stride=2, groups=3), conv2d(6, 6, (1, 3), padding=(0, 1), stride=2)
    total = add(read(wide), read(narrow))
    assert (total.kernel, total.padding, total.groups) == ((5, 5), (2, 2, 2, 2), 1)
    assert_computes(total, lambda x: wide(x) + narrow(x), inputs_of(wide))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (lambda: conv2d(4, 4, 3, padding=1), lambda: conv2d(4, 4, 3)),
        (lambda: conv2d(4, 4, 3, padding=1, stride=2), lambda: conv2d(4, 4, 3, padding=1)),
        (lambda: conv2d(4, 4, 1), lambda: linear(4, 4)),
        (lambda: conv2d(4, 4, 1), lambda: conv1d(4, 4, 1)),
    ],
    ids=["sizes", "strides", "axes", "dimensions"],
)
def test_maps_with_different_outputs_cannot_be_added(left, right):
    with pytest.raises(InexactMerge):
        add(read(left()), read(right()))


@pytest.mark.parametrize("make", SAME_SHAPE.values(), ids=SAME_SHAPE)
def test_composition_distributes_over_addition(make):
    a, b = read(make()), read(make())
    before = identity(a)
    before = dataclasses.replace(before, weight=torch.randn_like(before.weight))
    assert_equal_maps(compose(before, add(a, b)), add(compose(before, a), compose(before, b)))
    after = identity(a)  # without a bias, which the right side would add twice
    after = dataclasses.replace(after, weight=torch.randn_like(after.weight))
    assert_equal_maps(compose(add(a, b), after), add(compose(a, after), compose(b, after)))


def test_distributivity_on_linears_with_bias():
    a, b, c = read(linear(4, 5)), read(linear(4, 5)), read(linear(5, 3, bias=False))
    assert_equal_maps(compose(add(a, b), c), add(compose(a, c), compose(b, c)))
    before = read(linear(3, 4))
    assert_equal_maps(compose(before, add(a, b)), add(compose(before, a), compose(before, b)))


# write


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_a_written_module_has_dtype_and_mode_of_the_one_it_replaces(dtype, training):
    like = nn.Linear(7, 7, bias=False).to(dtype).train(training)
    map = compose(read(linear(5, 7)), read(linear(7, 3)))
    written = write(map, like)
    assert type(written) is nn.Linear
    assert (written.in_features, written.out_features) == (5, 3)
    assert written.training is training
    assert written.weight.dtype == written.bias.dtype == dtype
    assert torch.equal(written.weight, map.weight.to(dtype))
    assert torch.equal(written.bias, map.bias.to(dtype))
    assert all(parameter.requires_grad for parameter in written.parameters())


WRITTEN = {
    "linear": lambda: read(linear(5, 7)),
    "conv2d": lambda: read(conv2d(4, 6, 3, padding=1)),
    "stride": lambda: read(conv2d(4, 6, 3, stride=(2, 1), padding=1)),
    "not square": lambda: read(conv2d(4, 6, (3, 5), padding=(0, 3), stride=(2, 3))),
    "dilation": lambda: read(conv2d(4, 6, (3, 2), padding=(2, 1), dilation=(2, 3))),
    "groups": lambda: read(conv2d(4, 6, 3, groups=2)),
    "depthwise": lambda: read(conv2d(4, 4, 7, padding=3, groups=4)),
    "same": lambda: read(conv2d(4, 6, (3, 5), padding="same")),
    "norm": lambda: read(randomise(nn.BatchNorm2d(4)), like=read(conv2d(4, 4, 1))),
    "composed": lambda: compose(read(conv2d(4, 6, 3, padding=(2, 3), stride=2)), read(conv2d(6, 4, 3, stride=(1, 2)))),
}


@pytest.mark.parametrize("make", WRITTEN.values(), ids=WRITTEN)
def test_a_written_module_computes_the_map_and_reads_back(make):
    map = make()
    assert is_writable(map)
    written = write(map, like=linear(1, 1))
    assert type(written) is (nn.Conv2d if map.kernel else nn.Linear)
    assert_equal_maps(read(written), map)
    assert_computes(map, written, inputs_of(written))


@pytest.mark.parametrize("make", WRITTEN.values(), ids=WRITTEN)
def test_an_empty_module_has_the_shapes_of_the_written_one(make):
    map = make()
    shape = dataclasses.replace(map, weight=map.weight.to("meta"), bias=map.bias.to("meta"))
    module = empty(shape, dtype=torch.float64)
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    module.load_state_dict(write(map, like=linear(1, 1)).state_dict())
    assert_equal_maps(read(module), map)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_a_written_convolution_has_dtype_and_mode_of_the_one_it_replaces(dtype, training):
    map = read(conv2d(4, 6, 3, padding=1))
    written = write(map, like=nn.Conv2d(4, 4, 1, bias=False).to(dtype).train(training))
    assert written.training is training
    assert written.weight.dtype == written.bias.dtype == dtype
    assert torch.equal(written.weight, map.weight.to(dtype))
    assert torch.equal(written.bias, map.bias.to(dtype))
    assert all(parameter.requires_grad for parameter in written.parameters())


NOT_WRITTEN = {
    "conv1d": lambda: read(conv1d(3, 3, 3)),
    "diagonal": lambda: read(randomise(nn.BatchNorm1d(3))),
    "uneven padding": lambda: read(conv2d(3, 3, (4, 3), padding="same")),
    "uneven padding across": lambda: read(conv2d(3, 3, (3, 2), padding="same")),
}


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("make", NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_writing_refuses_what_is_neither_linear_nor_convolution(make):
    map = make()
    assert not is_writable(map)
    with pytest.raises(TypeError, match="groups is neither a Linear nor a Conv2d"):
        write(map, like=linear(3, 3))
    with pytest.raises(TypeError, match="kernel"):
        empty(map)
