"""What happens to kernels before they have one common kernel, on whole maps, borders included."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.testing import assert_close

from updp_hf.core.algebra.affine import InexactMerge, apply, fold
from updp_hf.core.algebra.kernels import can_crop, crop, largest, move_padding
from updp_hf.core.algebra.modules import read

SIZES = [(11, 14), (15, 15), (16, 13)]


def conv(*args, **kwargs):
    module = nn.Conv2d(*args, **kwargs).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


CHAINS = {
    "3x3, 3x3": lambda: [conv(3, 4, 3, padding=1), conv(4, 2, 3, padding=1)],
    "stride in front": lambda: [conv(3, 4, 3, padding=1, stride=2), conv(4, 2, 3, padding=1)],
    "stride behind": lambda: [conv(3, 4, 3, padding=1), conv(4, 2, 5, padding=2, stride=2)],
    "both strides": lambda: [conv(3, 4, 5, padding=2, stride=2), conv(4, 2, 3, padding=1, stride=2)],
    "dilation": lambda: [conv(3, 4, 3, padding=2, dilation=2), conv(4, 2, 3, padding=3, dilation=3)],
    "even kernels": lambda: [conv(3, 4, 4, padding=2), conv(4, 2, 2, padding=1, stride=2)],
    "not square": lambda: [conv(3, 4, (1, 5), padding=(0, 2), stride=(2, 1)), conv(4, 2, (3, 1), padding=(2, 0))],
    "same": lambda: [conv(3, 4, (4, 2), padding="same"), conv(4, 2, (3, 4), padding="same")],
    "same behind a stride": lambda: [conv(3, 4, 3, padding=1, stride=(2, 1)), conv(4, 2, (4, 3), padding="same")],
    "1x1 with bias": lambda: [conv(3, 4, 1), conv(4, 2, 3, padding=1)],
    "inverted residual": lambda: [conv(3, 6, 1), conv(6, 6, 3, padding=1, stride=2, groups=6), conv(6, 3, 1)],
    "three": lambda: [
        conv(3, 4, 3, padding=1, stride=2),
        conv(4, 4, 3, padding=2, dilation=2),
        conv(4, 2, 3, padding=1),
    ],
    "three strides": lambda: [
        conv(4, 4, 3, padding=1, stride=2, groups=2),
        conv(4, 4, 5, padding=2, stride=(1, 2)),
        conv(4, 2, 3, padding=1, stride=2),
    ],
    "nothing to move": lambda: [conv(3, 4, 3, padding=1), conv(4, 2, 1)],
}
MANY = pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
EVEN = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's word on even kernels


def without_ring(x, ring):
    """Return `x` with zeros in its outermost `ring`, in the order of `F.pad`."""
    return F.pad(F.pad(x, [-width for width in ring]), ring)


@EVEN
@MANY
def test_with_zeros_in_the_rings_the_moved_maps_are_the_chain(make):
    modules = make()
    moved, rings = move_padding([read(module) for module in modules])
    for size in SIZES:
        x = torch.randn(2, modules[0].in_channels, *size).double()
        found, expected = x, nn.Sequential(*modules)(x)
        for map, ring in zip(moved, rings, strict=True):
            found = apply(map, without_ring(found, ring))
        assert_close(found, expected, rtol=1e-11, atol=1e-11)


@EVEN
@MANY
def test_the_moved_maps_have_one_map_borders_included(make):
    moved, _ = move_padding([read(module) for module in make()])
    for size in SIZES:
        x = torch.randn(2, moved[0].in_channels, *size).double()
        expected = x
        for map in moved:
            expected = apply(map, expected)
        assert_close(apply(fold(moved), x), expected, rtol=1e-11, atol=1e-11 * float(expected.abs().max()))


@EVEN
@MANY
def test_only_the_first_map_pads_and_its_input_has_no_ring(make):
    maps = [read(module) for module in make()]
    moved, rings = move_padding(maps)
    assert not any(any(map.padding) for map in moved[1:])
    assert not any(rings[0])
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(maps, moved, strict=True))


def test_away_from_the_border_nothing_has_changed():
    modules = CHAINS["3x3, 3x3"]()
    moved, rings = move_padding([read(module) for module in modules])
    x = torch.randn(2, 3, 12, 13).double()
    expected, found = nn.Sequential(*modules)(x), apply(fold(moved), x)
    assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=1e-11, atol=1e-11)
    assert (found - expected)[..., 0, :].abs().max() > 0.1
    assert rings[1] == (1, 1, 1, 1)


def test_the_rings_follow_the_formula():
    maps = [
        read(conv(3, 3, 3, padding=(1, 2), stride=(2, 3))),
        read(conv(3, 3, 5, padding=(3, 1), stride=(4, 5))),
        read(conv(3, 3, 3, padding=(1, 2))),
    ]
    moved, rings = move_padding(maps)
    assert rings == [(0,) * 4, (1 + 5 * 2,) * 2 + (3 + 4 * 1,) * 2, (2, 2, 1, 1)]
    assert moved[0].padding == (2 + 3 * 11,) * 2 + (1 + 2 * 7,) * 2


def test_unmoved_such_a_chain_has_no_one_map():
    with pytest.raises(InexactMerge):
        fold([read(module) for module in CHAINS["3x3, 3x3"]()])


# crop

CROPPED = {
    "3x3": lambda: conv(4, 6, 3, padding=1),
    "stride": lambda: conv(4, 6, 3, padding=1, stride=2),
    "unequal": lambda: conv(4, 6, (5, 1), padding=(2, 0), stride=(1, 2)),
    "dilation": lambda: conv(4, 6, (3, 5), padding=(2, 6), dilation=(2, 3)),
    "groups": lambda: conv(4, 6, 3, padding=1, groups=2),
    "depthwise": lambda: conv(4, 4, 7, padding=3, groups=4),
    "same": lambda: conv(4, 6, (3, 7), padding="same", dilation=(1, 2)),
}


@pytest.mark.parametrize("make", CROPPED.values(), ids=CROPPED)
def test_a_cropped_map_is_the_one_whose_outer_taps_are_zero(make):
    module = make()
    map = crop(read(module))
    height, width = module.kernel_size
    outer = torch.ones(module.kernel_size, dtype=torch.bool)
    outer[height // 2, width // 2] = False
    assert (map.kernel, map.padding, map.dilation) == ((1, 1), (0,) * 4, (1, 1))
    for size in SIZES:
        x = torch.randn(2, 4, *size).double()
        whole = module(x)
        zeroed = read(module)
        zeroed.weight[..., outer] = 0
        assert_close(apply(map, x), apply(zeroed, x), rtol=0, atol=1e-12)
        assert apply(map, x).shape == whole.shape
        assert not torch.allclose(apply(map, x), whole)


NOT_CROPPED = {
    "1x1": lambda: conv(3, 3, 1),
    "valid": lambda: conv(3, 3, 3),
    "more padding": lambda: conv(3, 3, 3, padding=2),
    "1x1 with padding": lambda: conv(3, 3, 1, padding=1),
    "even": lambda: conv(3, 3, 2, padding=1),
    "even, same": lambda: conv(3, 3, 4, padding="same"),
    "odd and even": lambda: conv(3, 3, (3, 2), padding=(1, 0)),
    "other padding": lambda: conv(3, 3, 5, padding=(2, 1)),
    "padding without the dilation": lambda: conv(3, 3, 3, padding=1, dilation=2),
    "patch embedding": lambda: conv(3, 3, 4, stride=4),
    "linear": lambda: nn.Linear(3, 3),
}


@EVEN
@pytest.mark.parametrize("make", NOT_CROPPED.values(), ids=NOT_CROPPED)
def test_what_has_no_centre_or_would_change_size_is_not_cropped(make):
    map = read(make())
    assert not can_crop(map)
    with pytest.raises(ValueError, match="centre"):
        crop(map)


# largest


@pytest.mark.parametrize(
    ("makes", "expected"),
    [
        ([lambda: conv(2, 2, 1), lambda: conv(2, 2, 3), lambda: conv(2, 2, 1)], 1),
        ([lambda: conv(2, 2, 3), lambda: conv(2, 2, 3)], 0),
        ([lambda: conv(2, 2, 3), lambda: conv(2, 2, 5), lambda: conv(2, 2, 5)], 1),
        ([lambda: conv(2, 2, 5), lambda: conv(2, 2, 3, dilation=3)], 1),
        ([lambda: conv(2, 2, 1), lambda: conv(2, 2, (1, 3))], 1),
        ([lambda: conv(2, 2, 1), lambda: conv(2, 2, 1)], 0),
        ([lambda: nn.Linear(2, 9), lambda: nn.Linear(9, 2)], 0),
    ],
)
def test_the_largest_kernel_is_that_which_reaches_furthest(makes, expected):
    assert largest([read(make()) for make in makes]) == expected
