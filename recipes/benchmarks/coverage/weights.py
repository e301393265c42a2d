"""Random weights that hide no errors, and BatchNorms that fit them."""

import math

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from updp_hf.surgery.model_io import logits_of


def randomise_(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter. Fresh ones hide errors: biases are 0, norms are 1, a layer scale is 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            drawn /= math.sqrt(math.prod(parameter.shape[1:]))
        elif "bias" in name.rpartition(".")[2]:
            drawn *= 0.3
        else:
            drawn = torch.rand(parameter.shape, generator=generator) + 0.5
        parameter.copy_(drawn)


def settle_(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Give each BatchNorm the statistics of what comes in, so that nothing explodes or saturates."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    logits_of(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.training, norm.momentum = False, momentum
        if norm.running_var is not None:
            norm.running_var += 0.1  # for channels that are the same everywhere
