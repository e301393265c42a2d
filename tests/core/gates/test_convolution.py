"""The gates of convolutions: the checkpoint at one end, one merged kernel at the other, and no jump between."""

import copy

import pytest
import torch
from compiling import assert_follows_lambda_without_recompiling
from rings import slow_but
from torch import nn
from torch.testing import assert_close

from updp_hf.core.algebra.affine import apply, fold
from updp_hf.core.algebra.kernels import move_padding
from updp_hf.core.algebra.modules import read
from updp_hf.core.depth.run_gates import annealing_gates
from updp_hf.core.gates.convolution import ConvGate, FillGate
from updp_hf.core.gates.detour import Bypass, Landing, Shortcut
from updp_hf.core.gates.gate import Gate, gates, set_lambda_
from updp_hf.model.layout_updp import set_slot


def conv(*args, **kwargs):
    module = nn.Conv2d(*args, **kwargs).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def run_of(*modules, cropped=(), value=0.0):
    """Chain `modules` with the gates that close them to one map, those `cropped` on their way to their centres."""
    run = nn.Sequential(*modules)
    slots = dict(run.named_children())
    for slot, gate in annealing_gates(slots, {}, (), [list(slots)[i] for i in cropped]).items():
        set_slot(run, slot, gate)
    set_lambda_(run, value)
    return run


RUNS = {
    "3x3, 3x3": lambda: ([conv(2, 3, 3, padding=1), conv(3, 2, 3, padding=1)], ()),
    "first cropped": lambda: ([conv(2, 3, 3, padding=1), conv(3, 2, 5, padding=2)], (0,)),
    "last cropped": lambda: ([conv(2, 3, 3, padding=1), conv(3, 2, 3, padding=1)], (1,)),
    "strides": lambda: ([conv(2, 3, 3, padding=1, stride=2), conv(3, 2, 3, padding=1, stride=(2, 1))], ()),
    "strides, cropped": lambda: ([conv(2, 3, 3, padding=1, stride=2), conv(3, 2, 3, padding=1, stride=2)], (1,)),
    "stride of what is cropped": lambda: ([conv(2, 3, 3, padding=1, stride=2), conv(3, 2, 5, padding=2)], (0,)),
    "dilation": lambda: ([conv(2, 3, 3, padding=2, dilation=2), conv(3, 2, 3, padding=1)], ()),
    "dilation, cropped": lambda: ([conv(2, 3, 3, padding=1), conv(3, 2, 3, padding=2, dilation=2)], (0,)),
    "dilated one cropped": lambda: ([conv(2, 3, 5, padding=2), conv(3, 2, 3, padding=(2, 1), dilation=(2, 1))], (1,)),
    "not square": lambda: ([conv(2, 3, (1, 5), padding=(0, 2), stride=(2, 1)), conv(3, 2, (3, 1), padding=(1, 0))], ()),
    "depthwise": lambda: ([conv(2, 4, 1), conv(4, 4, 3, padding=1, groups=4, bias=False), conv(4, 2, 1)], ()),
    "three": lambda: (
        [conv(2, 4, 3, padding=1), conv(4, 4, 3, padding=1, groups=2, stride=2), conv(4, 2, 3, padding=1)],
        (),
    ),
    "three, one cropped": lambda: (
        [conv(2, 4, 3, padding=1), conv(4, 4, 5, padding=2, groups=2, stride=2), conv(4, 2, 3, padding=1)],
        (2,),
    ),
    "three, two cropped": lambda: (
        [conv(2, 4, 3, padding=1), conv(4, 4, 5, padding=2, groups=2, stride=2), conv(4, 2, 3, padding=1)],
        (0, 2),
    ),
    "1x1, 3x3": lambda: ([conv(2, 3, 1), conv(3, 2, 3, padding=1, stride=2)], ()),
    "1x1, 3x3, 3x3": lambda: ([conv(2, 3, 1), conv(3, 3, 3, padding=1), conv(3, 2, 3, padding=1)], ()),
    "1x1 with a stride, 3x3": lambda: ([conv(2, 3, 1, stride=(1, 2)), conv(3, 2, (3, 5), padding=(1, 2))], ()),
    "1x1, dilation": lambda: ([conv(2, 3, 1), conv(3, 2, 3, padding=(2, 0), dilation=2)], ()),
}
SIZES = [(9, 12), (7, 7), (8, 5)]
EACH_RUN = pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)


def images():
    return [torch.randn(2, 2, *size).double() for size in SIZES]


@EACH_RUN
def test_an_open_convolution_is_the_original_bit_for_bit(make):
    modules, cropped = make()
    run = run_of(*modules, cropped=cropped)
    assert all(torch.equal(run(x), nn.Sequential(*modules)(x)) for x in images())


@EACH_RUN
@pytest.mark.parametrize("value", [1e-12, 1e-6])
def test_near_zero_a_run_is_near_the_original(make, value):
    modules, cropped = make()
    run = run_of(*modules, cropped=cropped, value=value)
    for x in images():
        expected = nn.Sequential(*modules)(x)
        assert_close(run(x), expected, rtol=0, atol=10 * value * float(expected.detach().abs().max()))


@EACH_RUN
@pytest.mark.parametrize("value", [1 - 2**-24, 1 - 2**-20])
def test_near_one_a_run_is_near_the_closed_one(make, value):
    modules, cropped = make()
    run, closed = run_of(*modules, cropped=cropped, value=value), run_of(*modules, cropped=cropped, value=1.0)
    for x in images():
        expected = closed(x)
        scale = float(nn.Sequential(*modules)(x).detach().abs().max())
        assert_close(run(x), expected, rtol=0, atol=10 * (1 - value) * scale)


@EACH_RUN
def test_at_one_a_run_is_one_map(make):
    modules, cropped = make()
    run = run_of(*modules, cropped=cropped, value=1.0)
    closed = [module.closed() if isinstance(module, Gate) else module for module in run]
    moved, _ = move_padding([read(module) for module in closed])
    for x in images():
        assert_close(run(x), apply(fold(moved), x), rtol=1e-11, atol=1e-11)
        assert run(x).shape == nn.Sequential(*modules)(x).shape
        assert not torch.allclose(run(x), nn.Sequential(*modules)(x))


@EACH_RUN
def test_a_closed_gate_computes_its_closed_module(make):
    modules, cropped = make()
    found = [gate for _, gate in gates(run_of(*modules, cropped=cropped, value=1.0)) if isinstance(gate, ConvGate)]
    for gate in found:
        x = torch.randn(2, gate.original.in_channels, 9, 8).double()
        assert torch.equal(gate(x), gate.closed()(x))


def test_a_convolution_that_closes_to_itself_has_no_gate():
    run = run_of(conv(2, 3, 3, padding=1), nn.ReLU(), conv(3, 2, 1))
    assert list(gates(run)) == []
    run = run_of(conv(2, 3, 1), nn.ReLU(), conv(3, 2, 3, padding=1))
    assert [type(module) for module in run] == [nn.Conv2d, nn.ReLU, FillGate]
    run = run_of(conv(2, 3, 3, padding=1), conv(3, 3, 3, padding=1), conv(3, 2, 3, padding=1))
    assert [type(module) for module in run] == [ConvGate, ConvGate, ConvGate]


@pytest.mark.parametrize("value", [0.25, 0.999])
def test_between_the_ends_ring_and_outer_taps_fade(value):
    first, then = conv(2, 3, 3, padding=1), conv(3, 2, 3, padding=1)
    x = images()[0]
    value = float(torch.tensor(value))
    hidden = nn.functional.conv2d(x, first.weight, first.bias, padding=2)
    ring = torch.full_like(hidden, value)
    ring[..., 1:-1, 1:-1] = 1
    expected = nn.functional.conv2d(hidden * ring, then.weight, then.bias)
    assert_close(run_of(first, then, value=value)(x), expected)
    taps = torch.full_like(then.weight, 1 - value)
    taps[..., 1, 1] = 1
    expected = nn.functional.conv2d(first(x), then.weight * taps, then.bias, padding=1)
    assert_close(run_of(first, then, cropped=(1,), value=value)(x), expected)


@pytest.mark.parametrize("value", [0.25, 0.999, 1.0])
def test_a_padding_is_filled_with_what_the_closed_front_makes_of_zeros(value):
    first, norm, act = conv(2, 3, 1), nn.BatchNorm2d(3, eps=0.1).double(), nn.ReLU()
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(tensor)
    then = conv(3, 2, 3, padding=(1, 2), stride=2)
    run = nn.Sequential(first, norm, act, then).eval()
    for slot, gate in annealing_gates(dict(run.named_children()), {}, ["2"], ()).items():
        set_slot(run, slot, gate)
    set_lambda_(run, value)
    constant = norm(first(torch.zeros(1, 2, 1, 1).double()))
    x = images()[0]
    hidden = norm(first(x))
    hidden = torch.lerp(hidden.relu(), hidden, torch.tensor(value).double())
    filled = torch.zeros(2, 3, x.shape[2] + 2, x.shape[3] + 4).double() + torch.tensor(value).double() * constant
    filled[..., 1:-1, 2:-2] = hidden
    assert_close(run(x), nn.functional.conv2d(filled, then.weight, then.bias, stride=2))
    statistics = norm.running_mean.clone()
    run.train()(x)
    assert_close(norm.running_mean, 0.9 * statistics + 0.1 * first(x).mean((0, 2, 3)))  # of the image alone


def test_what_the_ring_and_the_outer_taps_teach():
    modules = [conv(2, 3, 3, padding=1), conv(3, 2, 3, padding=1)]
    run = run_of(*modules, cropped=(1,), value=0.25)
    run(images()[0]).square().sum().backward()
    half_open = modules[1].weight.grad.clone()
    run.zero_grad()
    set_lambda_(run, 1.0)
    run(images()[0]).square().sum().backward()
    centre = torch.zeros(3, 3, dtype=torch.bool)
    centre[1, 1] = True
    assert half_open.abs().min() > 0
    assert modules[1].weight.grad[..., centre].abs().min() > 0
    assert not modules[1].weight.grad[..., ~centre].any()
    assert modules[0].weight.grad.abs().min() > 0


def test_a_closed_convolution_has_dtype_mode_and_weights_of_its_own():
    gate = run_of(conv(4, 6, 3, padding=2, dilation=2, groups=2, bias=False).float().eval(), cropped=(0,))[0]
    closed = gate.closed()
    assert (closed.training, closed.bias, closed.weight.dtype) == (False, None, torch.float32)
    assert (closed.kernel_size, closed.padding, closed.dilation, closed.groups) == ((1, 1), (0, 0), (1, 1), 2)
    nn.init.zeros_(closed.weight)
    assert gate.original.weight.any()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["three, one cropped", "1x1, 3x3, 3x3"])
def test_a_run_of_convolutions_survives_autocast_casts_copies_and_state_dicts(name, value):
    modules, cropped = RUNS[name]()
    run = run_of(*modules, cropped=cropped, value=value)
    x = images()[0]
    twin = copy.deepcopy(run)
    fresh = run_of(*RUNS[name]()[0], cropped=cropped)
    fresh.load_state_dict(run.state_dict())
    assert torch.equal(fresh(x), run(x))
    set_lambda_(run, 0.75)
    for module in modules:
        nn.init.zeros_(module.weight)
        nn.init.ones_(module.bias)
    assert torch.equal(twin(x), fresh(x))
    assert twin.float()(x.float()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        half = twin(x.float())
    assert half.dtype == torch.bfloat16
    assert_close(half.double(), fresh(x), rtol=0, atol=0.05 * float(fresh(x).detach().abs().max()))
    assert twin.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", slow_but(["last cropped", "1x1, 3x3", "1x1, 3x3, 3x3"], "1x1, 3x3"))
def test_compiled_runs_follow_lambda_without_recompiling(name):
    modules, cropped = RUNS[name]()
    assert_follows_lambda_without_recompiling(run_of(*modules, cropped=cropped), images()[0])


@pytest.mark.parametrize("training", [True, False])
def test_gates_of_a_run_take_over_the_mode_of_their_slots(training):
    run = nn.Sequential(conv(2, 2, 1), nn.ReLU(), conv(2, 2, 1)).train(training)
    first = Shortcut(run[0], conv(2, 2, 1).train(not training).float())
    last = Landing(run[2], first, nn.BatchNorm2d(2).train(not training))
    found = [first, Bypass(run[1]), last, ConvGate(run[0], (0,) * 4, (0,) * 4, False, (0,) * 4)]
    assert {module.training for gate in found for module in gate.modules()} == {training}
    assert first.pruned.weight.dtype == torch.float64
