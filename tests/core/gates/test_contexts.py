"""A temporary state ends, whatever happens in it."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from updp_hf.core.gates.contexts import evaluation, open_gates, stock_statistics_kept
from updp_hf.core.gates.gate import Blend, gates


class Net(nn.Module):
    """A stock BatchNorm of each kind, one inside the original of a gate, and one on a pruned side."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), BatchNormAct2d(4))
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.block = Blend(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.BatchNorm2d(4))
        self.head_norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.head_norm(self.block(self.untracked(self.stem(x))).mean((2, 3)))

    @property
    def own(self):
        return [self.block.pruned]

    @property
    def stock(self):
        norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return [norm for norm in norms if norm is not self.block.pruned]


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def statistics(norms):
    return [copy.deepcopy(dict(norm.named_buffers())) for norm in norms]


def are_equal(found, expected):
    return all(torch.equal(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in b)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_the_checkpoints_statistics_stay_and_those_of_pruned_sides_go_on(value):
    net = Net().train()
    net.block.set_lambda_(value)
    stock, own = statistics(net.stock), statistics(net.own)
    with stock_statistics_kept(net):
        net(IMAGES)
    assert are_equal(statistics(net.stock), stock)
    assert are_equal(statistics(net.own), own) == (value == 0.0)  # which is not computed then
    assert int(net.block.pruned.num_batches_tracked) == (value > 0.0)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_meanwhile_all_normalise_by_the_batch_and_so_do_the_gradients(value):
    net = Net().train()
    net.block.set_lambda_(value)
    expected = net(IMAGES)
    expected.square().mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    with stock_statistics_kept(net):
        found = net(IMAGES)
        assert torch.equal(found, expected)
        found.square().mean().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])
    assert not torch.allclose(net.eval()(IMAGES), expected)  # the running statistics are others


def test_frozen_norms_go_on_using_their_running_statistics():
    net = Net().train()
    for norm in net.stock:
        norm.eval()
    expected = net(IMAGES)
    with stock_statistics_kept(net):
        assert torch.equal(net(IMAGES), expected)


def test_afterwards_the_statistics_are_updated_as_before():
    net = Net().train()
    like = copy.deepcopy(net)
    with stock_statistics_kept(net):
        pass
    assert [m.track_running_stats for m in net.stock] == [m.track_running_stats for m in like.stock]
    for model in (net, like):
        model(IMAGES)
    assert are_equal(statistics(net.stock), statistics(like.stock))
    assert net.state_dict().keys() == like.state_dict().keys()


def test_without_gates_all_statistics_stay():
    net = nn.Sequential(nn.BatchNorm2d(3)).train()
    before = statistics(net)
    with stock_statistics_kept(net):
        net(IMAGES)
    assert are_equal(statistics(net), before)


def state_of(net):
    tracking = [norm.track_running_stats for norm in (*net.stock, *net.own)]
    return tracking, [m.training for m in net.modules()], [(gate.stage, float(gate.lam)) for _, gate in gates(net)]


@pytest.mark.parametrize("state", [evaluation, open_gates, stock_statistics_kept])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_state_ends_even_with_an_error(state, value):
    net = Net().train()
    net.stem.eval()
    net.block.set_lambda_(value)
    before = state_of(net)
    with state(net):
        pass
    assert state_of(net) == before
    with pytest.raises(KeyboardInterrupt), state(net):
        raise KeyboardInterrupt
    assert state_of(net) == before


@pytest.mark.parametrize("state", [evaluation, open_gates, stock_statistics_kept])
def test_a_state_within_the_same_state_ends_with_the_outer_one(state):
    net = Net().train()
    net.block.set_lambda_(1.0)
    outside = state_of(net)
    with state(net):
        inside = state_of(net)
        with state(net):
            assert state_of(net) == inside
        assert state_of(net) == inside
    assert state_of(net) == outside != inside


def test_gates_that_are_opened_compute_the_original_side_and_keep_their_lambda():
    net = Net().eval()
    expected = net(IMAGES)
    net.block.set_lambda_(1.0)
    assert not torch.allclose(net(IMAGES), expected)
    with open_gates(net):
        assert torch.equal(net(IMAGES), expected)
        assert float(net.block.lam) == 1.0
    assert not torch.allclose(net(IMAGES), expected)
