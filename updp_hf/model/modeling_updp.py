"""The merged model: a stock architecture with some slots exchanged. Loading it needs neither finder nor algebra."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

from .bounds_updp import small_skeleton
from .checks_updp import check_base_document, check_numbers, data_fields, one_line, unreadable
from .configuration_updp import UPDPConfig
from .layout_updp import UPDPError, apply_layout_, short
from .weights_updp import HUB_ARGUMENTS, check_against_weights, stored_weights

__all__ = ["UPDPForImageClassification", "base_config", "updp_config", "with_layout"]

_LABELS = ("num_labels", "num_classes", "id2label", "label2id", "label_names")


class UPDPForImageClassification(PreTrainedModel):
    """A pruned image classifier.

    Args:
        config: what to build.
        base: the stock model with its slots already exchanged; built from `config` if not given.
        check: called with the model before anything is allocated for its weights; `from_pretrained` gives it.

    Raises:
        ValueError: the configuration is that of an unfinished training, or is not one that can be built.
    """

    config_class = UPDPConfig
    config: UPDPConfig
    base_model_prefix = "base"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True
    _supports_attention_backend = True
    loaded_from: dict[str, Any] | None = None
    """Folder or id on the Hub, with revision and subfolder, that `from_pretrained` was given."""

    push_with_card: ClassVar[Callable[..., Any] | None] = None
    """What `push_to_hub` does where updp_hf is imported: updp_hf sets it."""

    _auto_class = "AutoModelForImageClassification"  # so that the code files are saved beside the weights

    def __init__(
        self,
        config: UPDPConfig,
        base: PreTrainedModel | None = None,
        check: Callable[[PreTrainedModel], None] | None = None,
    ):
        super().__init__(config)
        self.base = build_base(config) if base is None else base
        self.num_labels = self.base.num_labels
        if check is not None:
            check(self)
        self.supports_gradient_checkpointing = self.base.supports_gradient_checkpointing
        self.accepts_loss_kwargs = getattr(self.base, "accepts_loss_kwargs", True)
        if base is not None:
            for module in base.modules():
                module._is_hf_initialized = True  # else `post_init` draws new weights for the exchanged slots
        self.post_init()

    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Classify images of shape `(batch, channels, height, width)`, as the stock model does."""
        output: ImageClassifierOutput | tuple[Tensor, ...] = self.base(
            pixel_values=pixel_values, labels=labels, **kwargs
        )
        return output

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a merged model, strictly: see `PreTrainedModel.from_pretrained` for the arguments.

        The files are not trusted: weights are read from safetensors only, and no memory is taken before the model that
        the configuration describes has been compared with them.

        Raises:
            ValueError: the weights do not fit the layout; nothing is left at random values without a word.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        attention = kwargs.pop("attn_implementation", None)
        place = {name: kwargs[name] for name in ("revision", "subfolder") if kwargs.get(name) is not None}
        if pretrained_model_name_or_path is not None:
            kwargs = _with_config(cls.config_class, pretrained_model_name_or_path, kwargs)
            kwargs["use_safetensors"] = True
            stored = stored_weights(pretrained_model_name_or_path, kwargs)
            kwargs["force_download"] = False  # what was asked for has been done
            is_new_head = bool(kwargs.get("ignore_mismatched_sizes"))
            kwargs["check"] = lambda model: check_against_weights(
                model, stored, pretrained_model_name_or_path, is_new_head=is_new_head
            )
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        wrong = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys") if info[name]}
        # `ignore_mismatched_sizes` is for a new head: what has one row a class, and else the shape it had.
        heads = [tuple(new) == (model.num_labels, *old[1:]) for _, old, new in info["mismatched_keys"]]
        if not all(heads):
            wrong["mismatched_keys"] = [str(key[0]) for key in info["mismatched_keys"]]
        if wrong:
            raise UPDPError(
                f"The weights in {pretrained_model_name_or_path} do not fit its configuration ("
                + "; ".join(f"{name.replace('_', ' ')}: {', '.join(keys[:3])}" for name, keys in wrong.items())
                + "): download the model again, or ask who made it."
            )
        if attention is not None:
            model.base.set_attn_implementation(attention)  # it is the base that has attention
        model.loaded_from = {"path_or_repo_id": pretrained_model_name_or_path, **place}
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save like any transformers model, under the names that the modules have today."""
        state = kwargs.pop("state_dict", None) or self.state_dict()
        kwargs = {"save_original_format": False, "state_dict": _without_sharing(state), **kwargs}
        self.config._auto_class = "AutoConfig"
        super().save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Push like any transformers model; where updp_hf is imported, the card states what was pruned.

        See `updp_hf.hub.push_model` for the arguments.
        """
        if self.push_with_card is None:  # this file came with the model
            return super().push_to_hub(repo_id, **kwargs)
        return self.push_with_card(repo_id, **kwargs)

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        self.base._set_gradient_checkpointing(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the base model's embeddings, None where it has none."""
        embeddings: nn.Module | None = self.base.get_input_embeddings()
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        self.base._init_weights(module)


def _without_sharing(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with a copy for every further name of a tensor: a file of safetensors holds each name's own."""
    seen: set[tuple[int, torch.Size]] = set()
    own = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        own[name] = tensor.clone() if key in seen and tensor.numel() else tensor
        seen.add(key)
    return own


def build_base(config: UPDPConfig) -> PreTrainedModel:
    """Build the stock skeleton of `config` and exchange its slots. Nothing in it holds trained weights.

    Raises:
        UPDPError: the configuration is not one that can be built.
    """
    if config.is_gated:
        raise UPDPError(
            "These are the weights of an unfinished pruning run, not a pruned model: continue it with "
            "`UPDPTrainer.train(resume_from_checkpoint=...)`, then `save_model()`."
        )
    if not config.base_config or config.layout is None:
        raise UPDPError(
            "The configuration has no base_config or no layout, so there is no telling what the model looks like: "
            "was the file written by `save_pretrained`?"
        )
    stock = base_config(config)
    try:
        with small_skeleton():
            base = AutoModelForImageClassification.from_config(stock)
    except Exception as error:  # one of hundreds of architectures, given any numbers: no telling what it raises
        raise UPDPError(
            f"A {stock.model_type!r} cannot be built from the base configuration ({one_line(error)}): does it need "
            "another version of transformers or timm, or is the file damaged?"
        ) from error
    apply_layout_(base, config.layout)
    return base


def base_config(config: UPDPConfig) -> PreTrainedConfig:
    """Return the stock configuration in `config`, with the labels that `config` has now.

    Raises:
        UPDPError: it is not one of an image classifier, or asks for what no image classifier needs.
    """
    document = dict(config.base_config or {})
    model_type = document.pop("model_type", None)
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING and model_type != UPDPConfig.model_type
    if not is_known or CONFIG_MAPPING[model_type] not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise UPDPError(
            f"The base model is of type {short(model_type)}, which this version of transformers does not know as an "
            "image classifier: was the model made with a newer version?"
        )
    config_class = CONFIG_MAPPING[model_type]
    check_base_document(document)
    check_numbers(config_class, document)
    # Labels of its own are not even read: transformers would make a name for each.
    document = {name: value for name, value in data_fields(config_class, document).items() if name not in _LABELS}
    try:
        labels = {name: getattr(config, name) for name in ("num_labels", "id2label", "label2id")}
        base: PreTrainedConfig = config_class.from_dict(document, **labels)
        base.problem_type = config.problem_type
    except (AttributeError, KeyError, StrictDataclassError, TypeError, ValueError) as error:
        raise unreadable("of the base model ", error) from error
    return base


def _with_config(config_class: type[UPDPConfig], source: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return `kwargs` with the configuration in `source`, so that the arguments left are not those of a configuration.

    `from_pretrained` of transformers would let the file's own fields decide which arguments reach the model.
    """
    config = kwargs.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        return {**kwargs, "config": config}
    kept = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "dtype", "torch_dtype") if name in kwargs}
    config, rest = config_class.from_pretrained(
        source if config is None else config, return_unused_kwargs=True, **kwargs
    )
    return {**rest, **kept, "config": config}


def updp_config(base: PreTrainedModel, **fields: Any) -> UPDPConfig:
    """Return the configuration of what was made from `base`, with its labels."""
    document = base.config.to_dict()
    for machine_bound in ("_name_or_path", "auto_map", "transformers_version"):
        document.pop(machine_bound, None)
    document["architectures"] = [type(base).__name__]
    return UPDPConfig(
        base_config=document,
        id2label=base.config.id2label,
        label2id=base.config.label2id,
        problem_type=base.config.problem_type,
        **fields,
    )


def with_layout(merged: PreTrainedModel, layout: dict[str, Any], **fields: Any) -> "UPDPForImageClassification":
    """Wrap a stock model whose slots have been exchanged as `layout` says."""
    config = updp_config(merged, layout=layout, **fields)
    model = UPDPForImageClassification(config, base=merged)
    return model.train(merged.training)
