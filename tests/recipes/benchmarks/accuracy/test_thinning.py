"""Torch-Pruning, as the benchmark of accuracy uses it."""

import pytest
import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from recipes.benchmarks.accuracy.thinning import thinned
from updp_hf.core.cost import count_macs


def vit() -> TimmWrapperForImageClassification:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=5, image_size=16)
    )


def resnet() -> TimmWrapperForImageClassification:
    sizes = {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 16)}
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="resnet18", model_args=sizes, num_labels=5, image_size=16)
    )


@pytest.mark.parametrize("build", [vit, resnet])
def test_torch_pruning_leaves_a_narrower_network_that_runs(build):
    pytest.importorskip("torch_pruning")
    model, images = build().eval(), {"pixel_values": torch.randn(3, 3, 16, 16)}
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    pruned = thinned(model, 0.5)
    assert pruned(**images).logits.shape == (3, 5)
    assert count_macs(pruned, images) < 0.6 * count_macs(model, images)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
