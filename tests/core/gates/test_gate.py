"""What a gate promises: exact ends, a blend between them, and a λ that survives what happens to models."""

import copy

import pytest
import torch
from compiling import assert_follows_lambda_without_recompiling
from torch import nn
from torch.testing import assert_close

from updp_hf.core.gates.detour import Bypass, Landing, Shortcut
from updp_hf.core.gates.gate import Blend, Gate, gates, set_lambda_


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
    assert_follows_lambda_without_recompiling(linear_gate(), X)


def test_gates_are_named_by_their_path():
    model = nn.ModuleDict({"a": linear_gate(), "b": nn.Sequential(nn.ReLU(), linear_gate())})
    assert [path for path, _ in gates(model)] == ["a", "b.1"]
    assert repr(model["a"]).splitlines()[0] == "Blend("
    assert "lam=0" in repr(model["a"])


# a fitted map for a whole run


class Run(nn.Sequential):
    """Two Linears with something between them."""

    def __init__(self):
        super().__init__(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 4))
        self.double()


def shortcut(value=0.0):
    run, fitted = Run(), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).double()
    first = Shortcut(run[0], fitted[0])
    gated = nn.Sequential(first, Bypass(run[1]), Landing(run[2], first, fitted[1]))
    set_lambda_(gated, value)
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
    nn.init.constant_(fitted[0].bias, poison)
    assert torch.equal(gated(X), run(X))
    gated, run, fitted = shortcut(1.0)
    for linear in (run[0], run[2]):
        nn.init.constant_(linear.bias, poison)
    assert torch.equal(gated(X), fitted(X))


def test_a_closed_shortcut_is_one_map_and_what_lies_behind_it():
    gated, _, fitted = shortcut(1.0)
    closed = [gate.closed() for gate in gated]
    assert (closed[0], closed[2]) == (fitted[0], fitted[1])
    assert isinstance(closed[1], nn.Identity)
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
    assert len(names) == len(set(names)) == 11  # four maps and three λ
    fresh, _, _ = shortcut(1.0)
    fresh.load_state_dict(gated.state_dict())
    assert torch.equal(fresh(X), gated(X))


@pytest.mark.parametrize(("value", "reached"), [(0.0, (True, False)), (0.5, (True, True)), (1.0, (False, True))])
def test_gradients_reach_the_run_and_what_is_fitted_where_they_take_part(value, reached):
    gated, run, fitted = shortcut(value)
    gated(X).square().sum().backward()
    assert (run[0].weight.grad is not None, fitted[0].weight.grad is not None) == reached
    assert (fitted[1].weight.grad is not None) == reached[1]
    assert (run[2].weight.grad is not None) == reached[0]


def test_under_autocast_a_shortcut_keeps_the_dtype_of_the_run():
    gated, run, _ = shortcut(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert gated.float()(X.float()).dtype == run(X.float()).dtype == torch.bfloat16


def test_compiled_shortcuts_follow_lambda_without_recompiling():
    gated, _, _ = shortcut()
    assert_follows_lambda_without_recompiling(gated, X)


def test_every_gate_is_a_gate():
    gated, _, _ = shortcut(0.5)
    assert all(isinstance(gate, Gate) for gate in gated)
    assert [path for path, _ in gates(gated)] == ["0", "1", "2"]
