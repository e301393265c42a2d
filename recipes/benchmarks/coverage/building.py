"""A small model of every architecture: with random weights, for the smallest images that it accepts."""

import inspect
from functools import cache
from typing import Any

import timm
import torch
import transformers
from torch import Tensor
from transformers import (
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from recipes.benchmarks.coverage.inputs import inputs_for
from recipes.benchmarks.coverage.row import Row
from recipes.benchmarks.coverage.weights import randomise_, settle_
from updp_hf.surgery.model_io import logits_of

CLASSES = 5
SIZES = (64, 96, 128, 224, 240, 256, 384)
"""Pixels along a side of the images. The first size that a model accepts is taken."""
# What makes a model small, where its class has such an argument.
TIMM_SMALL: dict[str, int] = {"depth": 3}
TRANSFORMERS_SMALL: dict[str, int] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "projection_dim": 48,
    "pooler_output_size": 48,
}
# What that leaves too large or does not fit, by model type. These win.
TRANSFORMERS_ARGUMENTS: dict[str, dict[str, Any]] = {
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    "imagegpt": {"n_embd": 48, "n_layer": 3, "n_head": 3, "n_positions": 64},
    "perceiver": {
        "d_latents": 32,
        "num_latents": 8,
        "num_self_attends_per_block": 3,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 1,
    },
    "shieldgemma2": {"mm_tokens_per_image": 4},
}


def names() -> list[str]:
    """Return the names of all rows."""
    by_type = {**MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES}
    del by_type["timm_wrapper"]  # walked by the modules of timm
    classes = [name for value in by_type.values() for name in ([value] if isinstance(value, str) else value)]
    return [f"timm/{module}" for module in timm.list_modules()] + [f"transformers/{name}" for name in classes]


def build_small(row: Row, seed: int) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Build the model of a row for the smallest images that it accepts; return it with a batch of four inputs."""
    library, _, name = row.name.partition("/")
    build = build_timm if library == "timm" else build_transformers
    failure = None
    for size in SIZES:
        try:
            row.model, row.arguments, model = build(name, size)
            model = model.double().eval()
            randomise_(model, seed)
            inputs = inputs_for(model, size, seed)
            logits_of(model, inputs)
        except Exception as error:  # whatever a model raises that is not made for this size
            failure = error
            continue
        row.image_size = size
        settle_(model, inputs)
        return model, inputs
    assert failure is not None
    raise failure


def build_timm(module: str, size: int) -> tuple[str, dict[str, Any], PreTrainedModel]:
    architecture, parameters = smallest_architecture(module)
    small = {name: value for name, value in TIMM_SMALL.items() if isinstance(parameters.get(name), int)}
    sized = {"img_size": size} if "img_size" in parameters else {}
    arguments = {**small, **sized}
    config = TimmWrapperConfig(architecture=architecture, num_labels=CLASSES, model_args=arguments)
    return architecture, arguments, TimmWrapperForImageClassification(config)


@cache
def smallest_architecture(module: str) -> tuple[str, dict[str, Any]]:
    """Return the architecture of a module of timm with the fewest parameters, and the defaults of its arguments."""
    sizes = {}
    for name in timm.list_models(module=module, exclude_filters="tf_*"):
        with torch.device("meta"):
            model = timm.create_model(name)
        signature = inspect.signature(type(model).__init__)
        sizes[name] = (
            sum(parameter.numel() for parameter in model.parameters()),
            {argument.name: argument.default for argument in signature.parameters.values()},
        )
    smallest = min(sizes, key=lambda name: sizes[name][0])
    return smallest, sizes[smallest][1]


def build_transformers(name: str, size: int) -> tuple[str, dict[str, Any], PreTrainedModel]:
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    arguments = small_arguments(config_class, size) | TRANSFORMERS_ARGUMENTS.get(config_class.model_type, {})
    return config_class.model_type, arguments, model_class(config_class(num_labels=CLASSES, **arguments))


def small_arguments(config_class: Any, size: int) -> dict[str, Any]:
    """Return arguments that make a small configuration, by the names and types of the class's own defaults."""
    default = config_class()
    defaults = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    small = {**TRANSFORMERS_SMALL, "image_size": size}
    arguments: dict[str, Any] = {name: value for name, value in small.items() if isinstance(defaults.get(name), int)}
    if isinstance(defaults.get("image_size"), list | tuple):
        arguments["image_size"] = [size, size]
    if "depths" in defaults:
        arguments["depths"] = [2] * len(default.depths)
    return arguments | {name: small_arguments(type(defaults[name]), size) for name in config_class.sub_configs}
