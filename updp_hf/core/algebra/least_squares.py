"""Closed forms: the affine map nearest to what a module does, by least squares on calibration data."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "fit_linear", "fit_scale", "statistics_of_fit"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over samples of inputs x and outputs y and of their products, in float64. Sums of batches can be added."""

    count: int
    x: Tensor  # (in,)
    y: Tensor  # (out,)
    xx: Tensor  # (in, in), or (in,) per channel
    xy: Tensor  # (in, out), or (in,) per channel

    @classmethod
    def joint(cls, x: Tensor, y: Tensor) -> "Moments":
        """Sum over all but the last axis of `x` (..., in) and `y` (..., out), with all products of channels."""
        x, y = _samples(x), _samples(y)
        return cls(x.shape[0], x.sum(0), y.sum(0), x.T @ x, x.T @ y)

    @classmethod
    def per_channel(cls, x: Tensor, y: Tensor) -> "Moments":
        """Sum over all but the last axis of `x` and `y`, both (..., channels), with each channel's own products."""
        x, y = _samples(x), _samples(y)
        return cls(x.shape[0], x.sum(0), y.sum(0), x.square().sum(0), (x * y).sum(0))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count, self.x + other.x, self.y + other.y, self.xx + other.xx, self.xy + other.xy
        )


def fit_linear(moments: Moments, ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Return the weight (out, in) and bias (out,) that minimise the mean of |W x + b - y|² + ridge · v |W|².

    v is the mean variance of x, so that `ridge` has no unit. With few images the tokens do not span all directions.
    """
    mean_x, mean_y = moments.x / moments.count, moments.y / moments.count
    covariance = _covariance(moments)
    cross = moments.xy / moments.count - torch.outer(mean_x, mean_y)
    rounding = torch.finfo(covariance.dtype).eps * moments.xx.diagonal().mean() / moments.count
    damping = ridge * covariance.diagonal().mean() + rounding + torch.finfo(covariance.dtype).tiny
    covariance.diagonal().add_(damping)
    weight = torch.linalg.solve(covariance, cross).T
    return weight, mean_y - weight @ mean_x


def statistics_of_fit(moments: Moments, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of `weight` x + `bias`, each (out,), over the samples of x."""
    mean = weight @ (moments.x / moments.count) + bias
    return mean, ((weight @ _covariance(moments)) * weight).sum(1).clamp_min(0.0)


def fit_scale(moments: Moments, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean and variance of x, and the BatchNorm weight and bias that bring x nearest to y, each (channels,).

    Per channel, the mean of |weight · x̂ + bias - y|² with x̂ = (x - mean) / sqrt(variance + eps) is least.
    """
    mean, bias = moments.x / moments.count, moments.y / moments.count
    variance = (moments.xx / moments.count - mean.square()).clamp_min(0.0)
    covariance = moments.xy / moments.count - mean * bias
    weight = covariance * torch.sqrt(variance + eps) / variance.clamp_min(torch.finfo(mean.dtype).tiny)
    return mean, variance, torch.where(variance > 0, weight, torch.zeros_like(weight)), bias


def _covariance(moments: Moments) -> Tensor:
    mean = moments.x / moments.count
    return moments.xx / moments.count - torch.outer(mean, mean)


def _samples(x: Tensor) -> Tensor:
    return x.detach().flatten(0, -2).double()
