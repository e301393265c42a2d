"""Merged models that came from timm, for `timm.create_model`."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoImageProcessor
from transformers.utils import logging

from updp_hf.data.processors import data_config_of
from updp_hf.errors import UPDPError
from updp_hf.model.configuration_updp import UPDPConfig
from updp_hf.model.modeling_updp import UPDPForImageClassification

__all__ = ["create_network"]

logger = logging.get_logger(__name__)

_RATES = ("drop_rate", "drop_path_rate", "attn_drop_rate", "pos_drop_rate", "proj_drop_rate")
"""Arguments of timm's networks that change no weight of theirs."""
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "tag")
_DATA = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "test_input_size", "test_crop_pct")


class _Source(NamedTuple):
    """Where a merged model lies: a folder, or a repository of the Hub."""

    name: str
    options: dict[str, Any]


def create_network(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Build the timm network of a merged model, in training mode and float32 as timm does.

    `timm.create_model("hf-hub:user/model", pretrained=True)` and `timm.create_model("local-dir:folder", ...)` call it.

    Args:
        pretrained: whether to load the weights; fresh ones otherwise.
        pretrained_cfg: what timm has read from the configuration of the model, and where that lies.
        pretrained_cfg_overlay: what to say otherwise in the `pretrained_cfg` of the network.
        cache_dir: where downloads are kept.
        **kwargs: `num_classes` for a new head (0 for none), and rates of dropout and of stochastic depth.

    Raises:
        ValueError: there is no merged model from timm, or an argument would change its weights.
    """
    source = _source(pretrained_cfg, cache_dir)
    config = _config(source)
    channels = int(_model_args(config).get("in_chans") or 3)
    num_classes = kwargs.pop("num_classes", None)
    _check(kwargs, pretrained_cfg_overlay, channels)
    rates = {name: rate for name, rate in kwargs.items() if name in _RATES}
    if config.base_config and rates:
        config.base_config = {**config.base_config, "model_args": {**_model_args(config), **rates}}
    if pretrained:
        model = UPDPForImageClassification.from_pretrained(
            source.name, config=config, dtype=torch.float32, **source.options
        )
    else:
        model = UPDPForImageClassification(config)
    network: Any = model.base.timm_model
    network.pretrained_cfg = network.default_cfg = {
        **{name: value for name, value in network.pretrained_cfg.items() if name not in (*_SOURCES, *_DATA)},
        **_chosen_data(_checkpoint_data(network, config, channels), _processor_data(source, channels)),
        "architecture": UPDPConfig.model_type,
        "num_classes": config.num_labels,
        "label_names": tuple(config.id2label.values()),
        **{name: pretrained_cfg[name] for name in ("hf_hub_id", "file", "source") if name in pretrained_cfg},
        **(pretrained_cfg_overlay or {}),
    }
    if num_classes is not None and num_classes != config.num_labels:
        network.reset_classifier(num_classes)
    trainable: nn.Module = network.train()
    return trainable


def _source(pretrained_cfg: Any, cache_dir: Any) -> _Source:
    """Read the place that timm has noted."""
    noted = pretrained_cfg if isinstance(pretrained_cfg, Mapping) else {}
    if noted.get("hf_hub_id"):
        name, _, revision = str(noted["hf_hub_id"]).partition("@")
        return _Source(name, {"cache_dir": cache_dir, **({"revision": revision} if revision else {})})
    if noted.get("file"):
        return _Source(str(noted["file"]), {})
    raise UPDPError(
        "'updp' is no network by itself: say which pruned model you want, as in "
        "`timm.create_model('hf-hub:user/model')` or `timm.create_model('local-dir:folder')`."
    )


def _config(source: _Source) -> UPDPConfig:
    config: UPDPConfig = UPDPConfig.from_pretrained(source.name, **source.options)
    model_type = (config.base_config or {}).get("model_type")
    if config.base_config and model_type != "timm_wrapper":
        raise UPDPError(
            f"{source.name} is a pruned {model_type!r} of transformers, not a network of timm: load it through "
            "`AutoModelForImageClassification.from_pretrained`."
        )
    return config


def _model_args(config: UPDPConfig) -> dict[str, Any]:
    return (config.base_config or {}).get("model_args") or {}


def _check(kwargs: Mapping[str, Any], overlay: Mapping[str, Any] | None, channels: int) -> None:
    """Check for arguments that a merged model cannot follow.

    Raises:
        UPDPError: there is one.
    """
    wrong = [name for name in kwargs if name not in (*_RATES, "in_chans")]
    if wrong:
        raise UPDPError(
            f"A pruned model cannot be built with other {', '.join(wrong)} than it was pruned with: give `num_classes` "
            f"and {', '.join(_RATES)} only."
        )
    if kwargs.get("in_chans", channels) != channels:
        raise UPDPError(
            f"The pruned model takes images of {channels} channels, not of {kwargs['in_chans']}: leave out `in_chans`."
        )
    places = [name for name in overlay or {} if name in _SOURCES]
    if places:
        raise UPDPError(
            f"The weights of a pruned model lie beside its configuration: leave out {', '.join(places)} in the overlay."
        )


def _checkpoint_data(network: Any, config: UPDPConfig, channels: int) -> dict[str, Any]:
    """Return how the checkpoint that was pruned wanted its images."""
    stored = (config.base_config or {}).get("pretrained_cfg") or {}
    data = {name: value for name, value in {**network.pretrained_cfg, **stored}.items() if name in _DATA}
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)  # as built, whatever the checkpoint says
    return {**data, "input_size": (channels, *(size or data["input_size"][1:]))}


def _processor_data(source: _Source, channels: int) -> dict[str, Any] | None:
    """Return how the processor beside the model prepares images, None if there is none that timm can repeat."""
    try:
        processor = AutoImageProcessor.from_pretrained(source.name, **source.options)
    except (OSError, ValueError) as error:  # there is none, or none that this version of transformers knows
        logger.info("No image processor beside the model: %s", error)
        return None
    return data_config_of(processor, channels)


def _chosen_data(checkpoint: Mapping[str, Any], used: Mapping[str, Any] | None) -> dict[str, Any]:
    """Choose between what the checkpoint wanted and what the processor does, which is what the model was trained with.

    Args:
        checkpoint: the data configuration of the checkpoint.
        used: that of the processor, if there is one.
    """
    chosen = dict(used or checkpoint)
    if used and tuple(checkpoint["input_size"]) == tuple(used["input_size"]):
        chosen = {**checkpoint, **used}
        if _scaled(checkpoint) == _scaled(used):  # several shares do the same: keep the one the checkpoint is known by
            chosen["crop_pct"] = checkpoint["crop_pct"]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}


def _scaled(data: Mapping[str, Any]) -> list[int]:
    """Return height and width that timm resizes to before it crops."""
    return [math.floor(edge / data["crop_pct"]) for edge in data["input_size"][1:]]
