"""What a layout may say, what stands in the slots afterwards, and what an untrusted file may not do."""

import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from updp_hf.core.gates.gate import Blend
from updp_hf.model.layout_updp import MAX_FEATURES, MAX_KERNEL, apply_layout_, get_slot, layout_of, set_slot
from updp_hf.model.modules_updp import (
    ChannelBatchNorm,
    EndActivation,
    LetPass,
    PassNext,
    Skip,
    Zero,
    batch_norm,
    first_tensor,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(4), nn.Linear(4, 4)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(4, 8), "act": nn.GELU(), "fc2": nn.Linear(8, 4)})

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp["fc2"](self.mlp["act"](self.mlp["fc1"](self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.unused = None

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(3, 5, 4)
LINEAR = {"kind": "linear", "in_features": 4, "out_features": 4, "bias": True}
CONV = {"kind": "conv2d", "in_channels": 4, "out_channels": 8, "kernel_size": [3, 5], "stride": [2, 1]}
CONV |= {"padding": [1, 0], "dilation": [1, 2], "groups": 2, "bias": True}
END = {"kind": "end", "channels": 4, "eps": 1e-5, "channel_axis": -1, "activation": "relu"}


# slots


def test_a_slot_is_where_the_stock_architecture_has_it():
    net = Net()
    assert get_slot(net, "blocks.0.mlp.fc1") is net.blocks[0].mlp["fc1"]
    linear = nn.Linear(4, 8)
    set_slot(net, "blocks.0.mlp.fc1", linear)
    assert net.blocks[0].mlp["fc1"] is linear


def test_gates_and_wrappers_on_the_way_are_looked_through():
    net = Net()
    fc1 = net.blocks[1].mlp["fc1"]
    set_slot(net, "blocks.1.mlp", Blend(net.blocks[1].mlp, nn.Linear(4, 4)))
    set_slot(net, "blocks.1", EndActivation(Blend(net.blocks[1], Skip()), nn.ReLU()))
    assert get_slot(net, "blocks.1.mlp.fc1") is fc1
    set_slot(net, "blocks.1.mlp.fc1", nn.Identity())
    assert isinstance(net.blocks[1].block.original.mlp.original["fc1"], nn.Identity)


def test_at_the_end_of_the_path_a_gate_is_what_stands_in_the_slot():
    net = Net()
    gate = Blend(net.blocks[0].norm, ChannelBatchNorm(4))
    set_slot(net, "blocks.0.norm", gate)
    assert get_slot(net, "blocks.0.norm") is gate
    set_slot(net, "blocks.0.norm", nn.Identity())
    assert isinstance(net.blocks[0].norm, nn.Identity)


def test_a_stock_module_with_a_child_of_that_name_is_no_wrapper():
    net = nn.ModuleDict({"stage": nn.ModuleDict({"block": nn.Linear(2, 2), "original": nn.Linear(2, 2)})})
    assert get_slot(net, "stage.block") is net["stage"]["block"]
    with pytest.raises(KeyError):
        get_slot(net, "stage.weight")


@pytest.mark.parametrize("path", ["", "blocks.2", "blocks.0.mlp.fc3", "blocks.0.norm.weight", "unused", ".", "forward"])
def test_a_slot_that_is_not_there_is_refused(path):
    with pytest.raises(KeyError):
        get_slot(Net(), path)


@pytest.mark.parametrize("path", ["blocks.2", "blocks.0.norm.weight", "nowhere.else"])
def test_nothing_is_put_where_there_is_no_slot(path):
    net = Net()
    before = repr(net)
    with pytest.raises(KeyError):
        set_slot(net, path, nn.Identity())
    assert repr(net) == before


# what stands in them


@pytest.mark.parametrize("outputs", [0, 1, 2])
def test_zero_and_skip_return_what_the_replaced_module_would(outputs):
    zero, skip = Zero(outputs)(X, mask=None), Skip(outputs)(None, hidden_states=X)
    if outputs:
        assert zero[1:] == skip[1:] == (None,) * (outputs - 1)
        zero, skip = zero[0], skip[0]
    assert torch.equal(zero, torch.zeros_like(X))
    assert skip is X


def test_the_first_tensor_is_the_activation():
    assert first_tensor((None, X), {"mask": torch.ones(1)}) is X
    assert first_tensor((), {"flag": True, "hidden_states": X}) is X


def test_channel_batch_norm_normalises_the_last_axis():
    x = torch.randn(64, 4, 4).double() * 2 + 3  # as many tokens as channels
    y = ChannelBatchNorm(4, eps=1e-12).double()(x)
    assert_close(y, (x - x.mean((0, 1))) / x.std((0, 1), correction=0))


def test_a_batch_norm_normalises_the_channels_of_its_axis():
    x = torch.randn(64, 4, 4, 4).double() * 2 + 3
    for axis, others in ((1, (0, 2, 3)), (-1, (0, 1, 2))):
        expected = (x - x.mean(others, keepdim=True)) / x.std(others, correction=0, keepdim=True)
        assert_close(batch_norm(4, 1e-12, axis).double()(x), expected)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.Sequential(nn.SiLU(inplace=True))], ids=repr)
def test_of_an_activation_called_twice_one_call_may_be_pruned_as_by_release_0_1(act):
    net = nn.ModuleDict({"norm": nn.BatchNorm2d(4), "act": act})
    apply_layout_(net, {"norm": {"kind": "mark"}, "act": {"kind": "unless_marked"}})
    if isinstance(act, nn.Sequential):
        assert get_slot(net, "act.0") is act[0]  # the slots of the stock architecture stay where they are
    expected = act(X.clone())
    for change in (lambda x: x, torch.clone):  # what is between the two, as a hook that copies, changes nothing
        x = X.clone()
        assert torch.equal(net["act"](change(net["norm"](x))), X)
        assert torch.equal(x, X)  # what passes stays as it is
        assert torch.equal(net["act"](X.clone()), expected)  # one call passes, and the next does not


def test_an_end_activation_follows_the_block_and_takes_over_its_mode():
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(5).train()).eval()
    block[1].train()
    wrapper = EndActivation(block, nn.Sequential(nn.ReLU()))
    assert not wrapper.training
    assert not wrapper.end[0].training
    assert block[1].training
    assert torch.equal(EndActivation(nn.Identity(), nn.ReLU())(X), X.relu())
    first, rest = EndActivation(Skip(2), nn.ReLU())(X)
    assert torch.equal(first, X.relu())
    assert rest is None


# layouts


CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 8, 3, padding=1),
    "not square": lambda: nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(0, 3), dilation=(1, 2)),
    "groups": lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(8, 8, 7, padding=3, groups=8),
    "largest": lambda: nn.Conv2d(1, 1, MAX_KERNEL, padding=MAX_KERNEL, stride=MAX_KERNEL, dilation=MAX_KERNEL),
    "linear": lambda: nn.Linear(4, 8),
    "linear without bias": lambda: nn.Linear(4, 8, bias=False),
}


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_what_a_layout_says_of_a_module_builds_its_like(make):
    module, net = make(), Net()
    spec = json.loads(json.dumps(layout_of(module)))
    apply_layout_(net, {"blocks.0.mlp.fc1": spec})
    built = net.blocks[0].mlp["fc1"]
    assert repr(built) == repr(module)
    built.load_state_dict(module.state_dict())
    assert layout_of(built) == layout_of(module)
    if isinstance(module, nn.Conv2d) and module.kernel_size[0] < MAX_KERNEL:
        x = torch.randn(2, module.in_channels, 11, 12)
        assert torch.equal(built(x), module(x))


@pytest.mark.parametrize("module", [nn.Identity(), Zero(2), Skip(), Skip(1)], ids=repr)
def test_what_a_layout_says_of_a_module_without_weights_builds_its_like(module):
    net = Net()
    apply_layout_(net, {"blocks.0.mlp": json.loads(json.dumps(layout_of(module)))})
    built = net.blocks[0].mlp
    assert (type(built), vars(built).get("outputs")) == (type(module), vars(module).get("outputs"))


def test_of_a_module_that_no_layout_knows_it_says_so():
    with pytest.raises(ValueError, match=r"no kind for LayerNorm, expected one of .*'conv2d'"):
        layout_of(nn.LayerNorm(4))


def test_a_layout_says_which_axis_the_channels_of_a_block_s_end_are_on():
    net = Net()
    apply_layout_(net, {"blocks.0": END, "blocks.1": END | {"channel_axis": 1}})
    assert isinstance(net.blocks[0].end[0], ChannelBatchNorm)
    assert isinstance(net.blocks[1].end[0], nn.BatchNorm2d)
    assert net.blocks[1].end[0].num_features == 4


@pytest.mark.parametrize("order", [1, -1])
def test_a_layout_of_release_0_1_says_which_call_an_activation_lets_pass(order):
    net = Net()
    layout = {"blocks.0.norm": {"kind": "mark"}, "blocks.0.mlp.act": {"kind": "unless_marked"}}
    apply_layout_(net, dict(list(layout.items())[::order]))
    assert isinstance(net.blocks[0].norm, PassNext)
    assert isinstance(net.blocks[0].mlp["act"], LetPass)
    assert isinstance(net.blocks[0].mlp["act"].activation, nn.GELU)


LAYOUT = {
    "blocks.0": END,
    "blocks.0.norm": {"kind": "identity"},
    "blocks.0.mlp.fc1": LINEAR | {"bias": False},
    "blocks.0.mlp.act": {"kind": "identity"},
    "blocks.0.mlp.fc2": {"kind": "identity"},
    "blocks.0.attention": {"kind": "zero", "outputs": 0},
    "blocks.1": {"kind": "skip", "outputs": 0},
}


@pytest.mark.parametrize("order", [list(LAYOUT), sorted(LAYOUT), sorted(LAYOUT, reverse=True)])
def test_a_layout_exchanges_the_slots_in_whatever_order_it_comes(order):
    net = Net()
    apply_layout_(net, json.loads(json.dumps({path: LAYOUT[path] for path in order})))
    block = net.blocks[0].block
    assert isinstance(net.blocks[0].end[0], ChannelBatchNorm)
    assert isinstance(net.blocks[0].end[1], nn.ReLU)
    assert all(isinstance(m, nn.Identity) for m in (block.norm, block.mlp["act"], block.mlp["fc2"]))
    assert isinstance(block.attention, Zero)
    assert isinstance(net.blocks[1], Skip)
    assert block.mlp["fc1"].weight.shape == (4, 4)
    assert block.mlp["fc1"].bias is None
    assert net(X).shape == X.shape


def test_an_empty_layout_is_the_stock_model():
    net = Net()
    before = repr(net)
    apply_layout_(net, {})
    assert repr(net) == before


HOSTILE = {
    "unknown kind": {"blocks.0.norm": {"kind": "pickle"}},
    "no kind": {"blocks.0.norm": {}},
    "kind of no kind": {"blocks.0.norm": {"kind": ["identity"]}},
    "no mapping": {"blocks.0.norm": "identity"},
    "nothing": {"blocks.0.norm": None},
    "missing field": {"blocks.0.mlp.fc1": {"kind": "linear", "in_features": 4, "out_features": 4}},
    "extra field": {"blocks.0.norm": {"kind": "identity", "code": "import os"}},
    "text for a number": {"blocks.0.mlp.fc1": LINEAR | {"in_features": "4"}},
    "fraction": {"blocks.0.mlp.fc1": LINEAR | {"in_features": 4.0}},
    "flag for a number": {"blocks.0.mlp.fc1": LINEAR | {"in_features": True}},
    "number for a flag": {"blocks.0.mlp.fc1": LINEAR | {"bias": 1}},
    "no channels": {"blocks.0.mlp.fc1": LINEAR | {"out_features": 0}},
    "negative": {"blocks.0.mlp.fc1": LINEAR | {"out_features": -4}},
    "kernel of one number": {"blocks.0.mlp.fc1": CONV | {"kernel_size": 3}},
    "kernel of three": {"blocks.0.mlp.fc1": CONV | {"kernel_size": [3, 3, 3]}},
    "kernel of fractions": {"blocks.0.mlp.fc1": CONV | {"kernel_size": [3, 3.0]}},
    "kernel of flags": {"blocks.0.mlp.fc1": CONV | {"kernel_size": [True, True]}},
    "kernel of nothing": {"blocks.0.mlp.fc1": CONV | {"kernel_size": [3, 0]}},
    "stride of nothing": {"blocks.0.mlp.fc1": CONV | {"stride": [0, 1]}},
    "negative padding": {"blocks.0.mlp.fc1": CONV | {"padding": [-1, 0]}},
    "padding as text": {"blocks.0.mlp.fc1": CONV | {"padding": "same"}},
    "dilation of nothing": {"blocks.0.mlp.fc1": CONV | {"dilation": [1, 0]}},
    "groups that do not divide": {"blocks.0.mlp.fc1": CONV | {"groups": 3}},
    "valid numbers of an absurd product": {
        "blocks.0.mlp.fc1": CONV | {"in_channels": 2**16, "out_channels": 2**16, "groups": 1, "kernel_size": [99, 99]}
    },
    "an axis that is true": {"blocks.0": END | {"channel_axis": True}},
    "groups that divide the input only": {"blocks.0.mlp.fc1": CONV | {"out_channels": 3}},
    "groups that divide the output only": {"blocks.0.mlp.fc1": CONV | {"in_channels": 3}},
    "no groups": {"blocks.0.mlp.fc1": CONV | {"groups": 0}},
    "padding mode": {"blocks.0.mlp.fc1": CONV | {"padding_mode": "reflect"}},
    "end without an axis": {"blocks.0": {name: value for name, value in END.items() if name != "channel_axis"}},
    "end of another axis": {"blocks.0": END | {"channel_axis": 0}},
    "end of no axis": {"blocks.0": END | {"channel_axis": None}},
    "many outputs": {"blocks.1": {"kind": "skip", "outputs": 10**9}},
    "negative outputs": {"blocks.1": {"kind": "zero", "outputs": -1}},
    "unknown activation": {"blocks.0": END | {"activation": "eval"}},
    "activation of no kind": {"blocks.0": END | {"activation": {"a": 1}}},
    "eps of zero": {"blocks.0": END | {"eps": 0.0}},
    "eps of nan": {"blocks.0": END | {"eps": float("nan")}},
    "missing slot": {"blocks.7.norm": {"kind": "identity"}},
    "slot of a parameter": {"blocks.0.norm.weight": {"kind": "identity"}},
    "no path": {"": {"kind": "identity"}},
    "slot that is None": {"unused": {"kind": "identity"}},
    "inside what is replaced": {"blocks.1": {"kind": "skip", "outputs": 0}, "blocks.1.norm": {"kind": "identity"}},
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_a_layout_that_is_not_right_is_refused_and_nothing_has_changed(hostile):
    net = Net()
    before = repr(net)
    with pytest.raises(ValueError, match="layout"):
        apply_layout_(net, {"blocks.0.mlp.act": {"kind": "identity"}, **hostile})
    assert repr(net) == before


@pytest.mark.parametrize(
    ("path", "absurd"),
    [
        ("blocks.0.mlp.fc1", LINEAR | {"in_features": MAX_FEATURES + 1, "out_features": 10**12}),
        ("blocks.0.mlp.fc1", LINEAR | {"out_features": 10**12}),
        ("blocks.0", END | {"channels": 10**12}),
        ("blocks.0", END | {"channels": 10**12, "channel_axis": 1}),
        ("blocks.0.mlp.fc1", CONV | {"in_channels": 10**12}),
        ("blocks.0.mlp.fc1", CONV | {"out_channels": MAX_FEATURES + 2}),
        ("blocks.0.mlp.fc1", CONV | {"kernel_size": [10**6, 10**6]}),
        ("blocks.0.mlp.fc1", CONV | {"kernel_size": [3, MAX_KERNEL + 1]}),
        ("blocks.0.mlp.fc1", CONV | {"padding": [10**12, 0]}),
        ("blocks.0.mlp.fc1", CONV | {"dilation": [1, 10**12]}),
    ],
)
def test_an_absurd_size_is_refused_before_anything_is_allocated(monkeypatch, path, absurd):
    def built(*args, **kwargs):
        raise AssertionError("something was built")

    net = Net()
    monkeypatch.setattr("updp_hf.model.layout_updp._build", built)
    monkeypatch.setattr("updp_hf.model.layout_updp.batch_norm_and_activation", built)
    with pytest.raises(ValueError, match="layout"):
        apply_layout_(net, {"blocks.1.norm": {"kind": "identity"}, path: absurd})


def test_a_refusal_says_what_is_known():
    with pytest.raises(ValueError, match=r"'conv3d'.*knows the kinds .*'identity', 'linear'"):
        apply_layout_(Net(), {"blocks.0.norm": {"kind": "conv3d"}})
    with pytest.raises(ValueError, match=r"'blocks.9', which Net does not have"):
        apply_layout_(Net(), {"blocks.9": {"kind": "identity"}})
