"""The networks of the benchmark of training, and which of their sites are gated."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from recipes.benchmarks.training.arguments import TrainingBenchmarkArguments
from updp_hf import find_sites
from updp_hf.core.plan.budget import Demand
from updp_hf.core.plan.site import Site
from updp_hf.selection.selectors import uniform

CLASSES = 1000


class Network(NamedTuple):
    """The classes of a network, its shape, and that of a tiny one of its kind."""

    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    shape: dict[str, Any]
    tiny: dict[str, Any]


NETWORKS = {
    "deit_small": Network(
        DeiTForImageClassification,
        DeiTConfig,
        {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
        {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 3},
    ),
    "convnext_tiny": Network(
        ConvNextForImageClassification, ConvNextConfig, {}, {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 32, 64]}
    ),
}


def model_of(name: str, options: TrainingBenchmarkArguments) -> nn.Module:
    """Build the network `name` with random weights."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    shape = network.tiny if options.quick else network.shape
    return network.model(network.config(image_size=options.image_size, num_labels=CLASSES, **shape))


def sites_of(model: nn.Module, form: str) -> tuple[Site, ...]:
    """Return the candidates: what a supernet gates."""
    return tuple(site for site in find_sites(model, [form]).sites if site.saves_compute)


def spread(sites: tuple[Site, ...], count: int) -> tuple[Site, ...]:
    """Return `count` of `sites`, or all, spread evenly over the depth."""
    demand = Demand((1.0,) * len(sites), min(count, len(sites)))
    return tuple(sites[index] for index in uniform(demand))
