"""What the roofline counts of a forward, and what it makes of it: all numbers are worked out by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from recipes.benchmarks.latency import roofline
from updp_hf.core.cost import count_macs

FLOAT = 4  # bytes


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def costs(model: nn.Module, x: Tensor) -> list[tuple[int, float]]:
    """The MACs, and the elements moved, of each operator."""
    return [(found.macs, found.bytes / x.element_size()) for found in roofline.operators_of(model.eval(), {"x": x})]


def test_a_linear_layer_reads_images_weight_and_bias_and_writes_its_output() -> None:
    x = torch.randn(2, 3, 5)
    expected = [(2 * 3 * 5 * 7, 2 * 3 * 5 + 5 * 7 + 7 + 2 * 3 * 7)]
    assert costs(Function(nn.Linear(5, 7)), x) == expected


def test_a_convolution_with_groups() -> None:
    convolution = nn.Conv2d(4, 8, kernel_size=3, stride=2, padding=1, groups=2)
    macs = 2 * 8 * 3 * 3 * (4 // 2) * 9  # images, channels, positions, channels of a group, taps
    moved = 2 * 4 * 5 * 5 + 8 * 2 * 9 + 8 + 2 * 8 * 3 * 3
    assert costs(Function(convolution), torch.randn(2, 4, 5, 5)) == [(macs, moved)]


def test_attention_counts_both_products_and_no_matrix_of_scores() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8).unbind()  # (batch, heads, tokens, width)
    attention = Function(lambda x: functional.scaled_dot_product_attention(x, k, v))
    ((macs, moved),) = costs(attention, q)
    assert macs == 2 * (2 * 4 * 6 * 6 * 8)
    assert moved == 4 * (2 * 4 * 6 * 8) + 2 * 4 * 6  # a sum for each row of scores comes out too


@pytest.mark.parametrize(
    ("function", "moved"),
    [
        (lambda x: x.relu(), 60 + 60),
        (lambda x: x.clone().relu_(), 2 * (60 + 60)),
        (lambda x: x + torch.ones(5), 5 + (60 + 5 + 60)),
        (lambda x: x * x, 60 + 60),
        (lambda x: x + x[:1].expand(3, 4, 5), 60 + 20 + 60),
        (lambda x: torch.cat([x, x.sum(0, keepdim=True)]), (60 + 20) + (60 + 20 + 80)),
    ],
    ids=["relu", "in place", "fresh", "twice the same", "expanded", "list"],
)
def test_an_elementwise_operator_has_no_macs_and_moves_what_it_touches(
    function: Callable[[Tensor], Tensor], moved: int
) -> None:
    found = costs(Function(function), torch.randn(3, 4, 5))
    assert all(macs == 0 for macs, _ in found)
    assert sum(elements for _, elements in found) == moved


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(12, 5).transpose(0, 1)[:, 1:].unsqueeze(0).expand(3, -1, -1),
        lambda x: x.flatten().split(20),
        lambda x: functional.dropout(x.contiguous().detach(), training=False),
    ],
    ids=["one", "several", "nothing to do"],
)
def test_views_move_nothing(function: Callable[[Tensor], Any]) -> None:
    assert roofline.operators_of(Function(function), {"x": torch.randn(3, 4, 5)}) == []


def test_a_narrower_dtype_moves_less() -> None:
    (operator,) = roofline.operators_of(Function(torch.relu), {"x": torch.randn(3, 4, dtype=torch.bfloat16)})
    assert operator == roofline.Operator("aten.relu", macs=0, bytes=2 * 2 * 12)


@pytest.mark.parametrize(
    "options",
    [
        {"model_name": "resnet18"},
        {"model_name": "vit_tiny_patch16_224", "img_size": 32, "depth": 2},
        {"model_name": "convnext_atto"},
    ],
    ids=lambda options: options["model_name"],
)
def test_the_macs_of_a_net_are_those_of_the_package(options: dict[str, Any]) -> None:
    model, inputs = timm.create_model(**options).eval(), {"x": torch.randn(2, 3, 32, 32)}
    found = roofline.operators_of(model, inputs)
    assert sum(operator.macs for operator in found) == count_macs(model, inputs) > 0
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert sum(operator.bytes for operator in found) > FLOAT * weights


def test_each_operator_takes_as_long_as_the_peak_that_it_reaches_first() -> None:
    peaks = roofline.Peaks(macs_per_second=10.0, bytes_per_second=100.0)
    computes, moves = roofline.Operator("computes", 50, 100), roofline.Operator("moves", 0, 200)
    assert roofline.least_seconds([computes, moves], peaks) == 5.0 + 2.0


def test_peaks_are_those_of_the_fastest_product_and_of_a_sum() -> None:
    def seconds(function: Any, tensors: dict[str, Tensor], rounds: int) -> float:
        side = tensors["input"].shape[-1]
        return {torch.mm: side**3 / 100.0, torch.conv2d: 7225344.0, torch.add: 0.25}[function] * rounds

    def peaks(images: int) -> Any:
        return roofline.measure_peaks(
            "cpu", torch.bfloat16, roofline.Sizes((4, 8), images, elements=8), rounds=2, seconds=seconds
        )

    moved = 3 * 8 * 2 / (0.25 * 2)
    assert peaks(images=1) == roofline.Peaks(macs_per_second=100.0 / 2, bytes_per_second=moved)
    assert peaks(images=3) == roofline.Peaks(macs_per_second=3 * 64.0 / 2, bytes_per_second=moved)


def test_peaks_of_this_machine_can_be_measured() -> None:
    found = roofline.measure_peaks("cpu", torch.float32, roofline.Sizes((64,), images=1, elements=2**10), rounds=1)
    assert 0 < found.macs_per_second < math.inf
    assert 0 < found.bytes_per_second < math.inf
