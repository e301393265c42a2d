"""What prepares the images of a merged model: an ordinary image processor in place of timm's, and back again."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import BitImageProcessor, TimmWrapperImageProcessor
from transformers.image_utils import PILImageResampling
from transformers.utils import logging

from updp_hf.errors import UPDPError

__all__ = ["data_config_of", "ordinary_processor"]

logger = logging.get_logger(__name__)

# Not "nearest", "box" and "hamming": torchvision resizes tensors by other pixels, or not at all. Not "random": it is
# for training.
_RESAMPLE = {
    "bilinear": PILImageResampling.BILINEAR,
    "bicubic": PILImageResampling.BICUBIC,
    "lanczos": PILImageResampling.LANCZOS,
}
_KNOWN = ("BitImageProcessor", "ConvNextImageProcessor", "DeiTImageProcessor", "ViTImageProcessor")
"""Processors that resize, crop, rescale and normalise and do nothing else, whatever their backend."""


def ordinary_processor(processing_class: Any) -> Any:
    """Return a processor that can be saved beside a merged model and does what `processing_class` does.

    The processor of a checkpoint from timm is not saved by `save_pretrained`, since timm keeps what it needs in the
    configuration of its models, which ours is not.

    The result resizes tensors where timm resizes PIL images, which differs by the rounding of grey levels. It also
    halves what is to be cut away otherwise: the crop begins one pixel further up or left if that is 3, 7, 11... pixels.

    Args:
        processing_class: the processor of the checkpoint, or anything else that prepares its inputs.

    Returns:
        A `BitImageProcessor` for a `TimmWrapperImageProcessor`, None if there is none that does the same: a warning
        says why, and a finished training is not lost over it. Anything else is returned as it is.
    """
    if not isinstance(processing_class, TimmWrapperImageProcessor):
        return processing_class
    try:
        return BitImageProcessor(**_arguments(processing_class.data_config))
    except ValueError as error:
        logger.warning("No image processor is saved: %s", error)
        return None


def _arguments(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `BitImageProcessor` needs in order to do what timm does.

    Raises:
        ValueError: it cannot.
    """
    channels, height, width = data_config["input_size"]
    # As timm computes it, rounding and all.
    scaled = [math.floor(edge / data_config["crop_pct"]) for edge in (height, width)]
    crop_mode, interpolation = data_config["crop_mode"], data_config["interpolation"]
    if interpolation not in _RESAMPLE:
        raise UPDPError(
            f"timm resizes the images by {interpolation!r}, but an ordinary processor knows {sorted(_RESAMPLE)}: save "
            "one of your own beside the model."
        )
    if crop_mode == "squash":
        size = {"height": scaled[0], "width": scaled[1]}
    elif crop_mode == "center" and height == width:
        size = {"shortest_edge": scaled[0]}
    else:
        raise UPDPError(
            f"timm crops the images by {crop_mode!r} to {height} × {width}, but an ordinary processor knows 'center' "
            "for squares and 'squash': save one of your own beside the model."
        )
    return {
        "do_resize": True,
        "size": size,
        "resample": _RESAMPLE[interpolation],
        "do_center_crop": crop_mode == "center" or scaled != [height, width],
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data_config["mean"]),
        "image_std": list(data_config["std"]),
        "do_convert_rgb": channels == 3,
    }


def data_config_of(processor: Any, channels: int = 3) -> dict[str, Any] | None:
    """Return the data configuration by which timm does what an ordinary `processor` does, None if there is none.

    Args:
        processor: an image processor of transformers.
        channels: the number of channels of its images.
    """
    if type(processor).__name__.removesuffix("Pil") not in _KNOWN:
        return None
    fields = processor.to_dict()
    if "crop_pct" in fields:
        fields |= _convnext_crop(fields)
    interpolation = next((name for name, code in _RESAMPLE.items() if code == fields.get("resample")), None)
    rescales = fields.get("do_rescale") and math.isclose(fields["rescale_factor"], 1 / 255)
    crop = _timm_crop(fields)
    if not (fields.get("do_resize") and rescales and interpolation and crop):
        return None
    normalizes = fields.get("do_normalize")
    return {
        "input_size": (channels, *crop["size"]),
        "crop_pct": crop["pct"],
        "crop_mode": crop["mode"],
        "interpolation": interpolation,
        "mean": tuple(fields["image_mean"]) if normalizes else (0.0,) * channels,
        "std": tuple(fields["image_std"]) if normalizes else (1.0,) * channels,
    }


def _convnext_crop(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a `ConvNextImageProcessor` resizes and crops in the words of the others."""
    edge = fields["size"]["shortest_edge"]
    square = {"height": edge, "width": edge}
    if edge >= 384:  # its own bound
        return {"size": square}
    return {"size": {"shortest_edge": int(edge / fields["crop_pct"])}, "do_center_crop": True, "crop_size": square}


def _timm_crop(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the size, the mode and the share of timm's crop, None if timm cannot crop so."""
    size, crop = fields["size"], fields.get("crop_size") if fields.get("do_center_crop") else None
    if size.get("shortest_edge") and not size.get("longest_edge") and crop:
        mode, scaled = "center", [size["shortest_edge"]] * 2
        target = [crop["height"], crop["width"]]
        if target[0] != target[1]:
            return None
    elif size.get("height") and size.get("width"):
        mode, scaled = "squash", [size["height"], size["width"]]
        target = [crop["height"], crop["width"]] if crop else scaled
    else:
        return None
    share = min(new / old for new, old in zip(target, scaled, strict=True))
    for pct in (round(share, 2), round(share, 3), share, math.nextafter(share, 0)):
        if pct and [math.floor(edge / pct) for edge in target] == scaled:
            return {"size": target, "mode": mode, "pct": pct}
    return None
