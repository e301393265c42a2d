"""What this package relies on of the private parts of other libraries, in one place.

A test compares each entry of `RELIED_ON` with the installed library, and finds private names that are not listed here.
"""

import copy

from torch import nn

__all__ = ["READ_BY", "RELIED_ON", "remove_autocast_", "without_autocast"]

RELIED_ON: dict[str, str | None] = {
    # Written by the Trainer's loop, overridden so that checkpoints are whole and loaded strictly (training/).
    "transformers.Trainer._save": "(self, output_dir, state_dict)",
    "transformers.Trainer._save_checkpoint": "(self, model, trial)",
    "transformers.Trainer._save_rng_state": "(self, output_dir)",
    "transformers.Trainer._load_from_checkpoint": "(self, resume_from_checkpoint, model)",
    "transformers.Trainer._load_best_model": "(self)",
    # What a merged model hands on to the model within it (model/).
    "transformers.PreTrainedModel._set_gradient_checkpointing": None,  # handed on with whatever it is called with
    "transformers.PreTrainedModel._init_weights": "(self, module)",
    # Attributes that are set or read: where a checkpoint came from, and what `save_pretrained` copies (model/).
    "transformers.PreTrainedConfig._auto_class": None,
    # The base class of all BatchNorms, and what `torch.compile` returns (core/, surgery/, training/).
    "torch.nn.modules.batchnorm._BatchNorm": None,
    "torch._dynamo.eval_frame.OptimizedModule": None,
    "torch.nn.Module._modules": None,
    "torch.nn.Module._apply": "(self, fn, recurse)",
    "torch.nn.Module._load_from_state_dict": (
        "(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)"
    ),
    # The shapes that an operation is told (model/bounds_updp.py).
    "torch.ops.aten.relu.default._schema": None,
    # Fused operations whose cost torch before 2.14 does not count (core/cost.py).
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": None,
    # The columns of a stream that does not tell them (data/sources.py).
    "datasets.IterableDataset._resolve_features": "(self)",
}
"""By the path of each name, the parameters that are relied on; None where it only has to be there."""

READ_BY = {
    "_is_hf_initialized": "transformers.modeling_utils",  # a module with weights of its own, which are not drawn anew
    "_original_forward": "accelerate.accelerator",  # `forward` as it was before it trains in bf16 or fp16
}
"""Attributes that another library sets or reads, and the module of it that does."""


def without_autocast(model: nn.Module) -> nn.Module:
    """Return `model` without the autocast that accelerate puts around `forward` to train in bf16 or fp16.

    The model itself stays as it is: of a wrapped one, a copy is returned. `Accelerator.unwrap_model` with
    `keep_fp32_wrapper=False` is the public way, but it also takes away the decorators of transformers' own forward:
    ViT's then fails with `return_dict=False` (accelerate 1.15).
    """
    if "_original_forward" not in model.__dict__:
        return model
    bare = copy.deepcopy(model)
    remove_autocast_(bare)
    return bare


def remove_autocast_(model: nn.Module) -> None:
    """Take away the autocast that accelerate has put around `forward`: see `without_autocast`."""
    for wrapper in ("forward", "_original_forward"):
        model.__dict__.pop(wrapper, None)
