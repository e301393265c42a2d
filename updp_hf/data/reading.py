"""Files and bytes to RGB images: whatever mode they have, and an error of one kind if they cannot be read."""

import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image

from updp_hf.errors import UPDPError

__all__ = ["BrokenImageError", "describe_image", "read_image"]

_UNREADABLE = (
    OSError,  # truncated, of no known kind, missing, not to be reached
    SyntaxError,  # PIL's word for a broken PNG
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    RuntimeError,  # that of AVIF; NotImplementedError, a kind of it, is that of rare kinds of DDS
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
)
"""What PIL raises on broken bytes; which of them depends on the format and on the place of the damage."""
_WHITE = (255, 255, 255, 255)


class BrokenImageError(UPDPError):
    """An image that cannot be read."""


def read_image(value: Any) -> PIL.Image.Image:
    """Return the image in `value` in mode RGB, turned as its EXIF data say.

    Grey levels of 16 bits are scaled to 8. Files of 32 bits do not tell their range: from least to greatest they become
    0 to 255. Transparent images are laid on white, the paper that most of them were drawn for: what colour lies
    under transparent pixels is arbitrary, often black.

    Args:
        value: `{"bytes": ..., "path": ...}`, as `datasets.Image(decode=False)` gives it.

    Raises:
        BrokenImageError: it cannot be read.
    """
    try:
        image = datasets.Image().decode_example(_with_bytes(value))
        if image is None:
            raise UPDPError("there is none")
        return _to_rgb(image)
    except _UNREADABLE as error:
        reason = "its format is not known" if isinstance(error, PIL.UnidentifiedImageError) else str(error)
        raise BrokenImageError(f"{describe_image(value)} cannot be read: {reason}") from error


def describe_image(value: Any) -> str:
    """Return what to call the image in `value`: its path if it has one."""
    path = value.get("path") if isinstance(value, dict) else None
    return str(path) if path else "An image"


def _with_bytes(value: Any) -> Any:
    """Return `value` with the bytes of a local file, which PIL would leave open if it is truncated."""
    if isinstance(value, dict) and value.get("bytes") is None and Path(value.get("path") or "").is_file():
        return {**value, "bytes": Path(value["path"]).read_bytes()}
    return value


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float64) / 257.0  # 65535 becomes 255
        image = PIL.Image.fromarray(levels.round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        levels = np.asarray(image).astype(np.float64)
        least, greatest = levels.min(), levels.max()
        scaled = 255.0 * (levels - least) / max(greatest - least, np.finfo(np.float64).tiny)
        image = PIL.Image.fromarray(scaled.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, _WHITE), image)
    return image.convert("RGB")
