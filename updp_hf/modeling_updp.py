"""The merged model: a stock architecture with some slots exchanged. Loading it needs neither finder nor algebra."""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from .configuration_updp import UPDPConfig
from .layout_updp import MAX_FEATURES, apply_layout_

__all__ = ["UPDPForImageClassification"]

MAX_BLOCKS = 1024
_UNSAFE_MODEL_ARGS = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


class UPDPForImageClassification(PreTrainedModel):
    """A pruned image classifier.

    Args:
        config: what to build.
        base: the stock model with its slots already exchanged; built from `config` if not given.

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
    _auto_class = "AutoModelForImageClassification"  # so that the code files are saved beside the weights

    def __init__(self, config: UPDPConfig, base: PreTrainedModel | None = None):
        super().__init__(config)
        self.base = build_base(config) if base is None else base
        self.num_labels = self.base.num_labels
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

        Raises:
            ValueError: the weights do not fit the layout; nothing is left at random values without a word.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        wrong = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys") if info[name]}
        # `ignore_mismatched_sizes` is for a new head: what has one row a class, and else the shape it had.
        heads = [tuple(new) == (model.num_labels, *old[1:]) for _, old, new in info["mismatched_keys"]]
        if not all(heads):
            wrong["mismatched_keys"] = [str(key[0]) for key in info["mismatched_keys"]]
        if wrong:
            raise ValueError(
                f"The weights in {pretrained_model_name_or_path} do not fit its configuration ("
                + "; ".join(f"{name.replace('_', ' ')}: {', '.join(keys[:3])}" for name, keys in wrong.items())
                + "): download the model again, or ask who made it."
            )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save like any transformers model, under the names that the modules have today."""
        state = kwargs.pop("state_dict", None) or self.state_dict()
        kwargs = {"save_original_format": False, "state_dict": _without_sharing(state), **kwargs}
        self.config._auto_class = "AutoConfig"
        super().save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Push like any transformers model; with updp_hf installed the card states what was pruned.

        See `updp_hf.hub.push_model` for the arguments.
        """
        if importlib.util.find_spec("updp_hf") is None:  # this file was loaded from the Hub
            return super().push_to_hub(repo_id, **kwargs)
        return importlib.import_module("updp_hf.hub").push_model(self, repo_id, **kwargs)

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
        ValueError: the configuration is not one that can be built.
    """
    if config.is_gated:
        raise ValueError(
            "These are the weights of an unfinished pruning run, not a pruned model: continue it with "
            "`UPDPTrainer.train(resume_from_checkpoint=...)`, then `save_model()`."
        )
    if not config.base_config or config.layout is None:
        raise ValueError(
            "The configuration has no base_config or no layout, so there is no telling what the model looks like: "
            "was the file written by `save_pretrained`?"
        )
    base = AutoModelForImageClassification.from_config(base_config(config))
    apply_layout_(base, config.layout)
    return base


def base_config(config: UPDPConfig) -> PreTrainedConfig:
    """Return the stock configuration in `config`, with the labels that `config` has now."""
    fields = dict(config.base_config or {})
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING or model_type == UPDPConfig.model_type:
        raise ValueError(
            f"The base model is of type {model_type!r}, which this version of transformers does not know: was the "
            "model made with a newer version?"
        )
    unsafe = _UNSAFE_MODEL_ARGS & set(fields.get("model_args") or {})
    if unsafe:
        raise ValueError(
            f"The base configuration asks to load other files ({', '.join(sorted(unsafe))}), which a merged model "
            "never needs: do not use this model."
        )
    _refuse_absurd_sizes(fields)
    base: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(fields)
    base.id2label, base.label2id = config.id2label, config.label2id
    base.problem_type = config.problem_type
    return base


def _refuse_absurd_sizes(fields: dict[str, Any]) -> None:
    """Refuse a configuration that would take all memory or time to build: nobody's image classifier is that large."""
    for name, value in fields.items():
        if isinstance(value, dict):
            _refuse_absurd_sizes(value)
        numbers = value if isinstance(value, list | tuple) else [value]
        largest = MAX_BLOCKS if name in ("num_hidden_layers", "depth", "depths", "layers") else MAX_FEATURES
        if any(isinstance(number, int) and abs(number) > largest for number in numbers):
            raise ValueError(
                f"The base configuration has {name} = {value}, expected at most {largest}: the file is damaged, "
                "download it again."
            )


def updp_config(base: PreTrainedModel, **fields: Any) -> UPDPConfig:
    """Return the configuration of what was made from `base`, with its labels."""
    document = base.config.to_dict()
    for machine_bound in ("_name_or_path", "transformers_version"):
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
