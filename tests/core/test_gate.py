"""What a gate promises: exact ends, a blend between them, and a λ that survives what happens to models."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from updp_hf.core.affine import apply, fold, read
from updp_hf.core.gate import Blend, Bypass, ConvGate, FillGate, Gate, Shortcut, gates
from updp_hf.core.gating import build_gates
from updp_hf.core.kernels import move_padding
from updp_hf.core.sites import Form, Site
from updp_hf.layout_updp import set_slot


class Constant(nn.Module):
    """Return one value everywhere, so that a leak of one side into the other is seen."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full_like(x, self.value)


class Pair(nn.Module):
    """Return a tuple, as attention modules do."""

    def __init__(self, extra):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.extra = extra

    def forward(self, x, *, mask=None):
        return self.linear(x), self.extra


def linear_gate(value=0.0):
    gate = Blend(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    gate.set_lambda_(value)
    return gate


X = torch.linspace(-2, 2, 12, dtype=torch.float64).view(4, 3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_the_ends_are_selected_not_multiplied(poison):
    closed, opened = Blend(Constant(poison), nn.Identity()), Blend(nn.Identity(), Constant(poison))
    closed.set_lambda_(1.0)
    assert torch.equal(closed(X), X)
    assert torch.equal(opened(X), X)


def test_a_new_gate_is_open():
    gate = linear_gate()
    assert float(gate.lam) == 0.0
    assert torch.equal(gate(X), gate.original(X))


@pytest.mark.parametrize("value", [1e-6, 0.25, 0.5, 0.999])
def test_between_the_ends_the_gate_blends(value):
    gate = linear_gate(value)
    assert_close(gate(X), (1 - value) * gate.original(X) + value * gate.pruned(X), rtol=0, atol=1e-7)


@pytest.mark.parametrize("value", [1e-6, 0.25, 0.999])
@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.Sequential(nn.SiLU(inplace=True))], ids=["leaf", "inside"])
def test_a_side_that_works_in_place_does_not_change_the_other_s_input(act, value):
    gate = Blend(act, nn.Identity())
    gate.set_lambda_(value)
    x = X.clone()
    found = gate(x)
    assert torch.equal(x, X)
    assert_close(found, torch.lerp(act(X.clone()), X, torch.tensor(value).double()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_of_a_tuple_the_first_is_blended_and_the_rest_is_handed_on(value):
    gate = Blend(Pair("original"), Pair("pruned")).double()
    gate.set_lambda_(value)
    output, extra = gate(X, mask=None)
    expected = torch.lerp(gate.original.linear(X), gate.pruned.linear(X), value)
    assert_close(output, expected)
    assert extra == ("pruned" if value == 1.0 else "original")


@pytest.mark.parametrize("value", [-0.1, 1.0001, float("nan"), float("inf")])
def test_a_lambda_out_of_range_is_refused_and_changes_nothing(value):
    gate = linear_gate(0.5)
    with pytest.raises(ValueError, match="λ"):
        gate.set_lambda_(value)
    assert float(gate.lam) == gate.stage == 0.5


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda module: module.to(torch.bfloat16)])
def test_lambda_stays_float32_when_the_model_is_cast(cast):
    model = cast(nn.Sequential(linear_gate(0.999)))
    assert model[0].lam.dtype == torch.float32
    assert float(model[0].lam) == pytest.approx(0.999, abs=1e-7)
    assert model[0].stage == 0.5
    assert model[0].original.weight.dtype != torch.float32


def test_lambda_and_output_dtype_are_independent():
    gate = linear_gate(0.999).bfloat16()
    assert gate(X.bfloat16()).dtype == torch.bfloat16


def test_under_autocast_the_output_has_the_dtype_of_the_original():
    gate = Blend(nn.Identity(), nn.Linear(3, 3))
    gate.set_lambda_(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert gate(X.float()).dtype == torch.float32


@pytest.mark.parametrize("before", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_the_state_dict_restores_lambda_and_the_branch_that_is_taken(value, before):
    trained, fresh = nn.Sequential(linear_gate(value)), nn.Sequential(linear_gate(before))
    fresh.load_state_dict(trained.state_dict())
    assert float(fresh[0].lam) == value
    assert fresh[0].stage == trained[0].stage
    assert torch.equal(fresh(X), trained(X))


def test_lambda_is_saved_and_not_trained():
    gate = linear_gate(0.5)
    assert "lam" in gate.state_dict()
    assert "lam" not in dict(gate.named_parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_inserted_takes_over_mode_and_dtype_of_the_slot(training, dtype):
    original = nn.LayerNorm(3).to(dtype).train(training)
    gate = Blend(original, nn.BatchNorm1d(3).train(not training))
    assert {module.training for module in gate.modules()} == {training}
    assert gate.pruned.weight.dtype == gate.pruned.running_mean.dtype == dtype
    assert gate.lam.dtype == torch.float32


def test_what_is_inserted_takes_over_the_device_of_the_slot():
    gate = Blend(nn.Linear(3, 3, device="meta"), nn.Linear(3, 3))
    assert {tensor.device.type for tensor in gate.state_dict().values()} == {"meta"}


def test_gating_leaves_the_modes_inside_the_original_alone():
    original = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval())  # fine-tuning with frozen statistics
    Blend(original, nn.Linear(3, 3))
    assert original.training
    assert not original[1].training


def test_a_copy_has_its_own_lambda():
    gate = linear_gate(0.25)
    twin = copy.deepcopy(gate)
    twin.set_lambda_(1.0)
    assert (float(gate.lam), gate.stage) == (0.25, 0.5)
    assert torch.equal(twin(X), gate.pruned(X))


@pytest.mark.parametrize(("value", "reached"), [(0.0, (True, False)), (0.5, (True, True)), (1.0, (False, True))])
def test_gradients_reach_the_sides_that_take_part(value, reached):
    gate = linear_gate(value)
    gate(X).square().sum().backward()
    assert tuple(side.weight.grad is not None for side in (gate.original, gate.pruned)) == reached


def test_each_side_gets_its_share_of_the_gradient():
    gate = linear_gate(0.25)
    gate(X).sum().backward()
    assert_close(gate.original.bias.grad, torch.full((3,), 0.75 * 4).double())
    assert_close(gate.pruned.bias.grad, torch.full((3,), 0.25 * 4).double())


def test_compiled_gates_follow_lambda_without_recompiling():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    gate = linear_gate(0.25)
    compiled = torch.compile(gate, backend=backend)
    for value in (0.25, 0.5, 0.999):
        gate.set_lambda_(value)
        assert_close(compiled(X), torch.lerp(gate.original(X), gate.pruned(X), gate.lam.double()))
    assert len(graphs) == 1
    for value, side in ((1.0, gate.pruned), (0.0, gate.original)):
        gate.set_lambda_(value)
        assert_close(compiled(X), side(X))


def test_gates_are_named_by_their_path():
    model = nn.ModuleDict({"a": linear_gate(), "b": nn.Sequential(nn.ReLU(), linear_gate())})
    assert [path for path, _ in gates(model)] == ["a", "b.1"]
    assert repr(model["a"]).splitlines()[0] == "Blend("
    assert "lam=0" in repr(model["a"])


# convolutions


def conv(*args, **kwargs):
    module = nn.Conv2d(*args, **kwargs).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def run_of(*modules, cropped=(), value=0.0):
    """Chain `modules` with the gates that close them to one map, those `cropped` on their way to their centres."""
    run = nn.Sequential(*modules)
    slots = tuple(name for name, _ in run.named_children())
    site = Site(Form.MERGE, "", slots, cropped=tuple(slots[i] for i in cropped))
    for slot, gate in build_gates(run, site, "inherit").items():
        set_slot(run, slot, gate)
    set_all_(run, value)
    return run


def set_all_(model, value):
    for _, gate in gates(model):
        gate.set_lambda_(value)


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
    site = Site(Form.MERGE, "", ("0", "1", "2", "3"), activations=("2",))
    for slot, gate in build_gates(run, site, "inherit").items():
        set_slot(run, slot, gate)
    set_all_(run, value)
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
    set_all_(run, 1.0)
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
    set_all_(run, 0.75)
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


# a fitted map for a whole run


class Run(nn.Sequential):
    """Two Linears with something between them."""

    def __init__(self):
        super().__init__(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 4))
        self.double()


def shortcut(value=0.0):
    run, fitted = Run(), nn.Linear(3, 4).double()
    first = Shortcut(run[0], fitted)
    gated = nn.Sequential(first, Bypass(run[1]), Bypass(run[2], first))
    set_all_(gated, value)
    return gated, run, fitted


def test_an_open_shortcut_is_the_run_bit_for_bit():
    gated, run, _ = shortcut()
    assert torch.equal(gated(X), run(X))


@pytest.mark.parametrize("value", [1e-6, 0.25, 0.5, 0.999])
def test_a_shortcut_blends_the_run_with_what_is_fitted(value):
    gated, run, fitted = shortcut(value)
    assert_close(gated(X), (1 - value) * run(X) + value * fitted(X), rtol=0, atol=1e-7)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_the_ends_of_a_shortcut_are_selected_not_multiplied(poison):
    gated, run, fitted = shortcut()
    nn.init.constant_(fitted.bias, poison)
    assert torch.equal(gated(X), run(X))
    gated, run, fitted = shortcut(1.0)
    for linear in (run[0], run[2]):
        nn.init.constant_(linear.bias, poison)
    assert torch.equal(gated(X), fitted(X))


def test_a_closed_shortcut_is_one_map_and_identities():
    gated, _, fitted = shortcut(1.0)
    closed = [gate.closed() for gate in gated]
    assert closed[0] is fitted
    assert all(isinstance(module, nn.Identity) for module in closed[1:])
    assert torch.equal(nn.Sequential(*closed)(X), gated(X))


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_nothing_is_left_behind_after_a_forward(value):
    gated, _, _ = shortcut(value)
    for _ in range(2):
        gated(X)
        assert gated[0].ahead is None
    copy.deepcopy(gated)  # which a tensor with a gradient would not allow


def test_a_copy_of_a_shortcut_blends_its_own_map():
    gated, _, _ = shortcut(0.5)
    twin = copy.deepcopy(gated)
    expected = gated(X)
    nn.init.zeros_(gated[0].pruned.weight)
    assert torch.equal(twin(X), expected)
    assert (gated[0].ahead, twin[0].ahead) == (None, None)
    assert not torch.equal(gated(X), expected)


def test_a_shortcut_is_saved_once_and_restored():
    gated, _, _ = shortcut(0.25)
    names = list(gated.state_dict())
    assert len(names) == len(set(names)) == 9  # three maps and three λ
    fresh, _, _ = shortcut(1.0)
    fresh.load_state_dict(gated.state_dict())
    assert torch.equal(fresh(X), gated(X))


@pytest.mark.parametrize(("value", "reached"), [(0.0, (True, False)), (0.5, (True, True)), (1.0, (False, True))])
def test_gradients_reach_the_run_and_what_is_fitted_where_they_take_part(value, reached):
    gated, run, fitted = shortcut(value)
    gated(X).square().sum().backward()
    assert (run[0].weight.grad is not None, fitted.weight.grad is not None) == reached
    assert (run[2].weight.grad is not None) == reached[0]


def test_under_autocast_a_shortcut_keeps_the_dtype_of_the_run():
    gated, run, _ = shortcut(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert gated.float()(X.float()).dtype == run(X.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["shortcut", "last cropped", "1x1, 3x3, 3x3"])
def test_compiled_runs_follow_lambda_without_recompiling(kind):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    if kind == "shortcut":
        run, x = shortcut()[0], X
    else:
        modules, cropped = RUNS[kind]()
        run, x = run_of(*modules, cropped=cropped), images()[0]
    compiled = torch.compile(run, backend=backend)
    for value in (0.25, 0.5, 0.999):
        set_all_(run, value)
        assert_close(compiled(x), run(x))
    assert len(graphs) == 1
    for value in (1.0, 0.0):
        set_all_(run, value)
        assert_close(compiled(x), run(x))


@pytest.mark.parametrize("training", [True, False])
def test_gates_of_a_run_take_over_the_mode_of_their_slots(training):
    run = nn.Sequential(conv(2, 2, 1), nn.ReLU(), conv(2, 2, 1)).train(training)
    first = Shortcut(run[0], conv(2, 2, 1).train(not training).float())
    found = [first, Bypass(run[1]), Bypass(run[2], first), ConvGate(run[0], (0,) * 4, (0,) * 4, False, (0,) * 4)]
    assert {module.training for gate in found for module in gate.modules()} == {training}
    assert first.pruned.weight.dtype == torch.float64


def test_every_gate_is_a_gate():
    gated, _, _ = shortcut(0.5)
    assert all(isinstance(gate, Gate) for gate in (*gated, *run_of(conv(2, 2, 3), conv(2, 2, 3, padding=1))))
    assert [path for path, _ in gates(gated)] == ["0", "1", "2"]
