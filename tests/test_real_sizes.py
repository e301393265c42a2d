"""Merging at the sizes that are used: every site that pays is closed, on images of 224 by 224 pixels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from tiny_models import close_, distance, observe, randomise_
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from updp_hf import Form, Plan, gate_, merge
from updp_hf.model.layout_updp import get_slot
from updp_hf.model.modules_updp import unwrap
from updp_hf.surgery.find import require_sites
from updp_hf.surgery.model_io import model_inputs

pytestmark = pytest.mark.slow

DEIT_SMALL: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
RESNET34: dict[str, Any] = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [3, 4, 6, 3]}


class RealModel(NamedTuple):
    """A constructor, and how many sites of the form `merge` the model has that pay."""

    name: str
    build: Callable[[], nn.Module]
    sites: int

    def __str__(self) -> str:
        return self.name


REAL_MODELS = (
    RealModel("timm-mobilenetv2", lambda: timm.create_model("mobilenetv2_100"), 16),
    RealModel("resnet34", lambda: ResNetForImageClassification(ResNetConfig(**RESNET34)), 16),
    RealModel("convnext", lambda: ConvNextForImageClassification(ConvNextConfig()), 18),
    RealModel("deit", lambda: DeiTForImageClassification(DeiTConfig(**DEIT_SMALL)), 12),
)


def images(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return two images that differ in their mean, which the average over positions leaves."""
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return model_inputs(model, pixels + torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1))


@pytest.mark.parametrize("row", REAL_MODELS, ids=str)
def test_merged_is_closed_at_real_size(row: RealModel):
    model = row.build().double().eval()
    randomise_(model)
    one = {name: x[:1] for name, x in images(model).items()}
    plan = Plan(require_sites(model, Form.MERGE, one), start="inherit")
    assert len(plan.sites) == row.sites
    gate_(model, plan, example_inputs=one)
    randomise_(model, seed=1)
    with torch.no_grad():  # else sums of so many linear branches grow
        for site in plan.sites:
            for parameter in unwrap(get_slot(model, site.slots[-1])).parameters():
                parameter *= 0.5
    close_(model)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model.to(dtype)
        inputs = images(model)
        merged = merge(model, example_inputs={name: x[:1] for name, x in inputs.items()})
        expected, found = (observe(m, inputs, [*plan.blocks[-2:], plan.sites[-1].slots[-1]]) for m in (model, merged))
        for place, value in expected.items():
            assert 1e-2 < float(value.std()) < 1e2, place  # neither dead nor blown up
            assert distance(value[0], value[1]) > 1e-3, place
            assert distance(value, found[place]) <= tolerance, place
