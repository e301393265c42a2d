"""Who feeds whom, read off small models whose answer is plain to see."""

import pytest
import torch
from torch import nn

from updp_hf.core.gates.contexts import evaluation, open_gates
from updp_hf.core.gates.gate import Blend
from updp_hf.core.graph.calls import stock_modules, trace
from updp_hf.errors import ExportError
from updp_hf.model.modules_updp import EndActivation

X = {"x": torch.randn(2, 5, 4)}


class Ffn(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.drop, self.fc2 = nn.Linear(4, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Residual(nn.Module):
    """An embedding, a residual branch, and an addition that belongs to nobody's leaf."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.ffn = nn.Linear(4, 4), nn.LayerNorm(4), Ffn()

    def forward(self, x):
        x = self.embed(x)
        return x + self.ffn(self.norm(x))


def calls_by_path(graph):
    return {call.path: call for call in graph.calls}


def test_calls_come_in_order_with_those_who_feed_and_use_them():
    graph = trace(Residual(), X)
    assert [call.path for call in graph.calls] == ["embed", "norm", "ffn.fc1", "ffn.act", "ffn.fc2", ""]
    calls = calls_by_path(graph)
    assert calls["embed"].users == [calls["norm"], calls[""]]
    assert calls["ffn.fc2"].inputs == [calls["ffn.act"]]  # dropout does nothing in evaluation mode
    assert calls[""].inputs == [calls["embed"], calls["ffn.fc2"]]
    assert [call.path for call in graph.calls if call.is_output] == [""]
    assert [call.path for call in graph.calls if not call.is_leaf] == [""]


def test_a_call_knows_its_operations_parameters_and_shape():
    fc1 = calls_by_path(trace(Residual(), X))["ffn.fc1"]
    assert fc1.targets == [torch.ops.aten.linear.default]
    assert fc1.parameters == ["ffn.fc1.weight", "ffn.fc1.bias"]
    assert fc1.shape == (2, 5, 8)


class Composite(nn.Module):
    """Several operations in the forward of one leaf."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def test_all_operations_of_a_leaf_are_one_call():
    model = Residual()
    model.ffn.act = Composite()
    calls = calls_by_path(trace(model, X))
    assert len(calls["ffn.act"].targets) == 3
    assert calls["ffn.act"].inputs == [calls["ffn.fc1"]]
    assert calls["ffn.fc1"].users == [calls["ffn.act"]]


def test_an_atomic_module_is_one_call_with_all_that_is_inside():
    graph = trace(Residual(), X, is_atomic=lambda module: isinstance(module, Ffn))
    assert [call.path for call in graph.calls] == ["embed", "norm", "ffn", ""]
    assert len(calls_by_path(graph)["ffn"].targets) == 3


class Calls(nn.Module):
    """Call one module as often as it is told to."""

    def __init__(self, times):
        super().__init__()
        self.times, self.embed, self.act = times, nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        x = self.embed(x)
        for _ in range(self.times):
            x = self.act(x + 1)
        return x


@pytest.mark.parametrize("times", [1, 2, 3])
def test_calls_of_a_module_are_counted(times):
    graph = trace(Calls(times), X)
    assert graph.call_counts["act"] == times
    assert graph.call_counts["embed"] == 1
    assert sum(call.path == "act" for call in graph.calls) == times


class WithTable(nn.Module):
    """Add a table that does not depend on the input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(1, 5, 4))

    def forward(self, x):
        return self.embed(x) + self.table.tanh()


def test_what_does_not_depend_on_the_input_says_so():
    tanh, total = [call for call in trace(WithTable(), X).calls if not call.is_leaf]
    assert (tanh.depends_on_input, total.depends_on_input) == (False, True)
    assert tanh.parameters == ["table"]


def gated(model, value=1.0):
    model.ffn.act = Blend(model.ffn.act, nn.Identity())
    model.norm = Blend(model.norm, nn.BatchNorm1d(5))
    model.ffn = EndActivation(model.ffn, nn.Sequential(nn.ReLU()))
    for gate in (model.norm, model.ffn.block.act):
        gate.set_lambda_(value)
    return model


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_gated_model_has_the_calls_of_the_stock_model(value):
    stock, found = trace(Residual(), X), trace(gated(Residual(), value), X)
    leaves = [call.path for call in stock.calls if call.is_leaf]
    assert [call.path for call in found.calls if call.is_leaf] == leaves
    assert {path: found.call_counts[path] for path in leaves} == dict.fromkeys(leaves, 1)


def test_gates_and_wrappers_leave_no_name_in_stock_paths():
    stock, model = Residual(), gated(Residual())
    found = stock_modules(model)
    assert [path for path, _ in found.values()] == [path for path, _ in stock.named_modules()]
    assert found["ffn.block.act.original"] == ("ffn.act", model.ffn.block.act.original)
    assert all(model.get_submodule(real) is module for real, (_, module) in found.items())


def test_tracing_leaves_the_model_as_it_was():
    model = gated(Residual(), 0.5).train()
    model.norm.original.eval()
    modes = {path: module.training for path, module in model.named_modules()}
    trace(model, X)
    assert {path: module.training for path, module in model.named_modules()} == modes
    assert [gate.stage for gate in (model.norm, model.ffn.block.act)] == [0.5, 0.5]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_modes_and_stages_come_back_after_an_error():
    model = gated(Residual()).train()
    seen = []
    model.norm.original.register_forward_hook(lambda module, *_: seen.append((module.training, model.norm.stage)))
    with pytest.raises(RuntimeError), evaluation(model), open_gates(model):
        model(x=X["x"][..., :3])
    with evaluation(model), open_gates(model):
        model(**X)
    assert seen == [(False, 0.0)]
    assert all(module.training for module in model.modules())
    assert model.norm.stage == 1.0


class Stubborn(nn.Module):
    """Decide by what is in the tensor, which cannot be exported."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)

    def forward(self, x):
        return self.embed(x) if x.sum().item() > 0 else x


@pytest.mark.parametrize(
    ("model", "inputs", "found"),
    [
        (Stubborn(), X, "Stubborn"),
        (Residual(), {"pixels": X["x"]}, r"pixels.*\(2, 5, 4\)"),
        (Residual(), {"x": torch.randn(2, 5, 3)}, r"x.*\(2, 5, 3\)"),
    ],
    ids=["control flow", "name", "shape"],
)
def test_a_failed_export_says_what_failed_and_what_was_given(model, inputs, found):
    model.train()
    with pytest.raises(ExportError, match=found) as caught:
        trace(model, inputs)
    assert "example_inputs" in str(caught.value)
    assert caught.value.__cause__ is not None
    assert model.training
