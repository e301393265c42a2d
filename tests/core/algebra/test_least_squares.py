"""Closed forms against torch's least squares."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from updp_hf.core.algebra.least_squares import Moments, fit_linear, fit_scale, statistics_of_fit


def tokens(*shape):
    """Draw tokens that are neither centred nor white."""
    mix = torch.randn(shape[-1], shape[-1]).double()
    return torch.randn(*shape).double() @ mix + torch.randn(shape[-1]).double() * 3


@pytest.mark.parametrize("out", [3, 7])
def test_an_affine_map_is_recovered(out):
    module = nn.Linear(5, out).double()
    x = tokens(2, 50, 5)
    weight, bias = fit_linear(Moments.joint(x, module(x)), ridge=0.0)
    assert_close(weight, module.weight.data, rtol=0, atol=1e-9)
    assert_close(bias, module.bias.data, rtol=0, atol=1e-9)


def test_the_fit_is_the_least_squares_solution():
    x, y = tokens(80, 5), tokens(80, 4)
    weight, bias = fit_linear(Moments.joint(x, y), ridge=0.0)
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(80, 1).double()], 1), y).solution
    assert_close(torch.cat([weight, bias[:, None]], 1), expected.T, rtol=0, atol=1e-9)


def test_the_ridge_is_what_it_says():
    x, y, ridge = tokens(80, 5), tokens(80, 4), 0.3
    weight, bias = fit_linear(Moments.joint(x, y), ridge)
    v = x.var(0, unbiased=False).mean()
    rows = torch.cat([x - x.mean(0), (80 * ridge * v).sqrt() * torch.eye(5).double()])
    expected = torch.linalg.lstsq(rows, torch.cat([y - y.mean(0), torch.zeros(5, 4).double()])).solution.T
    assert_close(weight, expected, rtol=0, atol=1e-10)
    assert_close(x.mean(0) @ weight.T + bias, y.mean(0))


def test_the_fit_does_not_depend_on_the_unit_of_the_input():
    x, y = tokens(80, 5), tokens(80, 4)
    (weight, bias), (small, same) = (fit_linear(Moments.joint(s * x, y)) for s in (1.0, 1e-3))
    assert_close(small * 1e-3, weight)
    assert_close(same, bias)


def test_the_ridge_makes_input_of_deficient_rank_harmless():
    module = nn.Linear(12, 4).double()
    x = torch.randn(6, 12).double()
    x = torch.cat([x, torch.zeros(6, 12).double()]).index_fill(1, torch.tensor(3), 2.0)  # fewer tokens than channels
    weight, bias = fit_linear(Moments.joint(x, module(x)))
    assert weight.isfinite().all()
    assert weight.norm() < 2 * module.weight.norm()
    assert_close(x @ weight.T + bias, module(x).detach(), rtol=0, atol=1e-2)


def test_the_statistics_of_a_fit_are_those_of_what_it_gives():
    x, y = tokens(3, 40, 5), tokens(3, 40, 4)
    moments = Moments.joint(x, y)
    weight, bias = fit_linear(moments)
    given = (x @ weight.T + bias).flatten(0, 1)
    mean, variance = statistics_of_fit(moments, weight, bias)
    assert_close(mean, given.mean(0), rtol=0, atol=1e-9)
    assert_close(variance, given.var(0, unbiased=False), rtol=1e-9, atol=0)


@pytest.mark.parametrize("constant", [0.0, 0.1, 2.0])
def test_input_that_never_changes_leaves_the_mean(constant):
    y = tokens(64, 3)
    weight, bias = fit_linear(Moments.joint(torch.full((64, 5), constant).double(), y))
    assert weight.abs().max() * constant < 10 * y.abs().max()  # what is left is rounding
    assert_close(weight.sum(1) * constant + bias, y.mean(0))


@pytest.mark.parametrize("of", [Moments.joint, Moments.per_channel])
def test_moments_of_batches_add_up(of):
    x, y = tokens(6, 5, 4), tokens(6, 5, 4)
    total = of(x[:1], y[:1]) + of(x[1:4], y[1:4]) + of(x[4:], y[4:])
    whole = of(x, y)
    assert total.count == whole.count == 30
    for name in ("x", "y", "xx", "xy"):
        assert_close(getattr(total, name), getattr(whole, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_summed_in_float64_and_without_a_graph(dtype):
    x = torch.randn(4, 3).to(dtype).requires_grad_()
    moments = Moments.joint(x, x)
    assert moments.xx.dtype == torch.float64
    assert not moments.xx.requires_grad
    assert_close(moments.xx, x.detach().double().T @ x.detach().double())


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.1])
def test_the_fitted_batch_norm_is_the_least_squares_solution_of_each_channel(eps):
    x, y = tokens(4, 25, 3), tokens(4, 25, 3)
    norm = nn.BatchNorm1d(3, eps=eps).double().eval()
    for tensor, value in zip(
        (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data),
        fit_scale(Moments.per_channel(x, y), eps),
        strict=True,
    ):
        tensor.copy_(value)
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    assert_close(norm.running_mean, x.mean(0))
    assert_close(norm.running_var, x.var(0, unbiased=False))
    for channel in range(3):
        columns = torch.stack([x[:, channel], torch.ones(100).double()], 1)
        expected = columns @ torch.linalg.lstsq(columns, y[:, channel]).solution
        assert_close(norm(x)[:, channel].detach(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_a_batch_norm_is_recovered(eps):
    norm = nn.BatchNorm1d(4, eps=eps).double().train()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = tokens(50, 4)
    moments = Moments.per_channel(x, norm(x))
    mean, variance, weight, bias = fit_scale(moments, eps)
    assert_close(weight, norm.weight.data)
    assert_close(bias, norm.bias.data)
    assert_close(norm.eval()(x).shape, x.shape)
    assert_close(mean, x.mean(0))
    assert (variance > 0).all()


def test_a_channel_that_never_changes_keeps_the_mean_and_nothing_else():
    x, y = tokens(64, 3), tokens(64, 3)
    x[:, 1] = 2.0
    mean, variance, weight, bias = fit_scale(Moments.per_channel(x, y), 1e-5)
    assert (variance[1], weight[1]) == (0.0, 0.0)
    assert all(t.isfinite().all() for t in (mean, variance, weight, bias))
    assert_close(bias, y.mean(0))
