"""Gates of convolutions: what happens to padding and to outer taps on the way to one merged kernel."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from updp_hf.core.gates.gate import Gate
from updp_hf.model.modules_updp import unwrap

__all__ = ["ConvGate", "FillGate"]


class ConvGate(Gate):
    """A convolution of a run whose padding moves to the front of the run, or whose outer taps go to zero.

    Zero padding in the middle of a run has no place in the merged convolution: the padding is moved to the run's first
    convolution, and what its outer ring feeds into the later ones is multiplied by λ, so that at λ → 0 they see the
    zeros that they would have padded. The taps around a cropped kernel's centre are multiplied by 1 - λ.

    Args:
        original: the convolution.
        padding: what it pads while 0 < λ < 1, in the order of `F.pad`.
        ring: width of the ring of its input that is not there in the checkpoint, in the order of `F.pad`.
        is_cropped: whether its outer taps close.
        closed_padding: what it pads at λ = 1.
    """

    def __init__(
        self,
        original: nn.Conv2d,
        padding: tuple[int, ...],
        ring: tuple[int, ...],
        is_cropped: bool,
        closed_padding: tuple[int, ...],
    ):
        super().__init__(original)
        self.original: nn.Conv2d
        self.padding, self.ring, self.closed_padding = padding, ring, closed_padding
        self.is_cropped = is_cropped

    def forward_between(self, x: Tensor) -> Tensor:
        weight = self.original.weight
        if self.is_cropped:
            outer = torch.ones_like(weight)
            outer[_centre(weight)] = 0
            weight = self.lerp(weight, weight - weight * outer)
        if any(self.ring):
            left, right, top, bottom = self.ring
            inside = x.new_ones(x.shape[-2] - top - bottom, x.shape[-1] - left - right)
            inside = F.pad(inside, self.ring)
            x = x * self.lerp(inside, torch.ones_like(inside))
        return self._convolve(x, weight, self.padding, self.original.dilation)

    def forward_closed(self, x: Tensor) -> Tensor:
        weight = self.original.weight
        if self.is_cropped:
            return self._convolve(x, weight[_centre(weight)], self.closed_padding, (1, 1))
        return self._convolve(x, weight, self.closed_padding, self.original.dilation)

    def _convolve(self, x: Tensor, weight: Tensor, padding: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
        conv = self.original
        left, right, top, bottom = padding
        if (left, top) != (right, bottom):
            x, left, top = F.pad(x, padding), 0, 0
        return F.conv2d(x, weight, conv.bias, conv.stride, (top, left), dilation, conv.groups)

    def closed(self) -> nn.Module:
        conv = self.original
        left, right, top, bottom = self.closed_padding
        assert (left, top) == (right, bottom), "a run that would need other padding is no site"
        weight = conv.weight[_centre(conv.weight)] if self.is_cropped else conv.weight
        closed = nn.utils.skip_init(
            nn.Conv2d,
            conv.in_channels,
            conv.out_channels,
            tuple(weight.shape[2:]),
            stride=conv.stride,
            padding=(top, left),
            dilation=(1, 1) if self.is_cropped else conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            closed.weight.copy_(weight)
            if conv.bias is not None:
                closed.bias.copy_(conv.bias)
        return closed.train(conv.training)


class FillGate(Gate):
    """A padded convolution of a run in which only pointwise maps come before it.

    With the padding at the front of the run, as the merged convolution has it, the run's pointwise maps turn its zeros
    into a constant for each channel. Here the convolution pads with λ times that constant, so that nothing moves, and
    the statistics of a BatchNorm on the way see the image alone.

    Args:
        original: the convolution.
        padding: what it pads, in the order of `F.pad`.
        front: what stands in the run's slots before it, in order.
    """

    def __init__(self, original: nn.Conv2d, padding: tuple[int, ...], front: Sequence[nn.Module]):
        super().__init__(original)
        self.original: nn.Conv2d
        self.padding = padding
        self.front = tuple(front)  # in a tuple, for these are no parts of this slot

    def forward_between(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.lam.to(x.dtype) * self._constant(x))

    def forward_closed(self, x: Tensor) -> Tensor:
        return self._convolve(x, self._constant(x))

    def _convolve(self, x: Tensor, constant: Tensor) -> Tensor:
        conv = self.original
        inside = F.pad(x.new_ones(x.shape[-2:]), self.padding)
        filled = F.pad(x, self.padding) + (1 - inside) * constant
        return F.conv2d(filled, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)

    def _constant(self, x: Tensor) -> Tensor:
        """Return what the closed front makes of zeros in evaluation mode, (1, channels, 1, 1)."""
        channels = next(conv.in_channels for conv in map(unwrap, self.front) if isinstance(conv, nn.Conv2d))
        value = x.new_zeros(1, channels, 1, 1)
        for module in self.front:
            closed = module.closed() if isinstance(module, Gate) and not isinstance(module, ConvGate) else module
            if isinstance(closed, nn.modules.batchnorm._BatchNorm):
                assert closed.running_mean is not None
                assert closed.running_var is not None
                # Of copies: training goes on to change the statistics before the gradients are computed.
                mean, variance = closed.running_mean.clone(), closed.running_var.clone()
                value = F.batch_norm(value, mean, variance, closed.weight, closed.bias, eps=closed.eps)
            else:
                value = closed(value)
        return value.to(x.dtype)

    def closed(self) -> nn.Module:
        return self.original


def _centre(kernel: Tensor) -> tuple[slice, ...]:
    """Return the index of the centre tap of `kernel`, (out, in, *size) with odd sizes."""
    return (slice(None), slice(None), *(slice(size // 2, size // 2 + 1) for size in kernel.shape[2:]))
