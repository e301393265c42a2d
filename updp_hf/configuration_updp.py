"""The configuration of a pruned model: the stock configuration, and the layout of the slots that differ from it."""

from typing import Any

from transformers import PreTrainedConfig

__all__ = ["UPDPConfig"]


class UPDPConfig(PreTrainedConfig):
    """Configuration of `UPDPForImageClassification`.

    Args:
        base_config: the stock configuration of the checkpoint that was pruned, with its `model_type`.
        layout: path of a slot to what a merged model holds there; empty in a training checkpoint.
        plan: the plan that was followed, as `Plan.to_dict` writes it.
        is_gated: whether the weights beside this file are those of an unfinished training, gates and all.
        merge_error: largest difference between the logits of the closed and the merged model, divided by the largest
            logit; None if it was not measured.
        architecture: name by which `timm.create_model` finds what loads our networks; always the same.
    """

    model_type = "updp"

    base_config: dict[str, Any] | None = None
    layout: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    is_gated: bool = False
    merge_error: float | None = None
    architecture: str = "updp"

    def __getattr__(self, name: str) -> Any:
        # Image size, channels and the like: users and pipelines ask the configuration of any image classifier.
        base = self.__dict__.get("base_config")
        if base and not name.startswith("_") and name in base:
            return base[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
