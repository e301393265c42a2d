"""The configuration of a pruned model: the stock configuration, and the layout of the slots that differ from it."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .checks_updp import check_document, data_fields, unreadable
from .layout_updp import short

__all__ = ["UPDPConfig"]


@strict
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

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read a `config.json`: see `PreTrainedConfig.get_config_dict`.

        Raises:
            ValueError: the file holds no configuration.
        """
        try:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise unreadable(f"of {pretrained_model_name_or_path} ", error) from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of what a file held: see `PreTrainedConfig.from_dict`.

        Raises:
            ValueError: it is not one that `save_pretrained` wrote, or it asks for what no merged model needs.
        """
        if not isinstance(config_dict, Mapping):
            raise unreadable("", TypeError(f"it is {short(config_dict)}, expected fields by their names"))
        check_document(config_dict)
        document = {name: value for name, value in data_fields(cls, config_dict).items() if name != "auto_map"}
        if isinstance(auto_map := config_dict.get("auto_map"), dict):
            # The code that travels with the model lies beside it; what lies in another repository is not its code.
            document["auto_map"] = {k: v for k, v in auto_map.items() if isinstance(v, str) and "--" not in v}
        try:
            return super().from_dict(document, **kwargs)
        except (AttributeError, IndexError, StrictDataclassError, TypeError, ValueError) as error:
            raise unreadable("", error) from error
