"""Channels left out by Torch-Pruning."""

import copy
import warnings

from torch import nn
from transformers import PreTrainedModel

from updp_hf.surgery.model_io import example_inputs_of

ROUND_TO = 4
"""Channels that are left are a multiple of it, as the documentation of Torch-Pruning advises."""


def thinned(model: PreTrainedModel, ratio: float) -> PreTrainedModel:
    """Return a copy of `model` without `ratio` of its channels, as Torch-Pruning's documentation has it.

    The scores are the norms of groups of weights, the classifier is ignored, and timm's attentions are told their new
    sizes.

    Raises:
        ImportError: it is not installed.
    """
    import torch_pruning as tp  # of this benchmark alone

    pruned = copy.deepcopy(model).train()
    labels = model.config.num_labels
    heads = {module.qkv: module.num_heads for module in pruned.modules() if hasattr(module, "qkv")}
    images = next(iter(example_inputs_of(model, 2).values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on parameters that are no module's weight
        pruner = tp.pruner.BasePruner(
            pruned,
            images,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[m for m in pruned.modules() if isinstance(m, nn.Linear) and m.out_features == labels],
            round_to=ROUND_TO,
            num_heads=heads,
            output_transform=lambda output: output.logits,
        )
        pruner.step()
    for module in pruned.modules():
        if hasattr(module, "qkv"):
            module.num_heads = pruner.num_heads[module.qkv]
            module.attn_dim = module.qkv.out_features // 3
            module.head_dim = module.attn_dim // module.num_heads
    return pruned.eval()
