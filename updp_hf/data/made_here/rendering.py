"""Pictures of single characters: warped, in random colours, noisy.

All lengths are fractions of the image's side, so a character looks the same at every resolution. Everything is computed
by Pillow, mostly on integers, from numbers of the generator passed in: where library versions agree, images do.
"""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

__all__ = ["MIN_CONTRAST", "colours", "render"]

MIN_CONTRAST = 70
"""The least difference in luminance of character and background, out of 255, before noise."""
EXTENT = (0.5, 0.8)  # longer side of the character
BEND = 0.3  # largest change of an entry of the 2×2 matrix from that of the identity: turns, shears, stretches, scales
SHIFT = 0.1
ELASTIC = 0.09  # largest displacement of a node
NODES = 4  # random displacements per side, between which is interpolated
CELLS = 6  # pieces per side in which the picture is warped
BLUR = 0.02  # largest radius
NOISE = 50  # largest amplitude, out of 255
GRAIN = 32  # grains of noise per side


def render(character: str, font: Path, resolution: int, random: np.random.Generator) -> Image.Image:
    """Return an RGB picture of `character`, `resolution` pixels wide and high, all else drawn from `random`."""
    mask = _warp(_draw(character, font, resolution, random.uniform(*EXTENT)), random)
    mask = mask.filter(ImageFilter.GaussianBlur(random.uniform(0, BLUR) * resolution))
    foreground, background = colours(random)
    picture = Image.composite(Image.new("RGB", mask.size, foreground), Image.new("RGB", mask.size, background), mask)
    return ImageChops.add(picture, _noise(random).resize(mask.size, Image.Resampling.BILINEAR), offset=-128)


def colours(random: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return two colours, each three numbers up to 255, whose luminance differs by `MIN_CONTRAST` or more."""
    while True:
        pair = random.integers(256, size=(2, 3))
        light, dark = pair @ (299, 587, 114) / 1000  # as Pillow's mode L
        if abs(light - dark) >= MIN_CONTRAST:
            return tuple(pair[0].tolist()), tuple(pair[1].tolist())


def _draw(character: str, path: Path, resolution: int, extent: float) -> Image.Image:
    """Return the character in white on black, in the middle, its longer side of length `extent`."""
    font = _font(path)
    left, top, right, bottom = font.getbbox(character)
    font = font.font_variant(size=font.size * extent * resolution / max(right - left, bottom - top))
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (resolution, resolution))
    corner = ((resolution - left - right) / 2, (resolution - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(corner, character, fill=255, font=font)
    return canvas


@cache
def _font(path: Path) -> ImageFont.FreeTypeFont:
    # the other layout is used only where its library happens to be installed
    return ImageFont.truetype(path, size=100, layout_engine=ImageFont.Layout.BASIC)


def _warp(mask: Image.Image, random: np.random.Generator) -> Image.Image:
    """Return `mask` under a random affine and a random elastic distortion.

    `ElasticTransform` of torchvision draws from the global generator, and its blur takes half a second at 224 pixels.
    """
    resolution = mask.width
    matrix = np.eye(2) + random.uniform(-BEND, BEND, size=(2, 2))
    shift = random.uniform(-SHIFT, SHIFT, size=2)
    coarse = random.uniform(-ELASTIC, ELASTIC, size=(2, NODES, NODES)).astype(np.float32)
    smooth = [Image.fromarray(axis).resize((CELLS + 1, CELLS + 1), Image.Resampling.BICUBIC) for axis in coarse]
    elastic = np.stack([np.asarray(axis) for axis in smooth], axis=-1)
    edges = np.linspace(0, resolution, CELLS + 1).round().astype(int)
    corners = np.stack(np.meshgrid(edges, edges), axis=-1)  # (y, x, 2)
    sources = ((corners / resolution - 0.5) @ matrix.T + shift + elastic + 0.5) * resolution
    boxes = np.concatenate([corners[:-1, :-1], corners[1:, 1:]], axis=-1)
    quads = np.concatenate([sources[:-1, :-1], sources[1:, :-1], sources[1:, 1:], sources[:-1, 1:]], axis=-1)
    cells = list(zip(map(tuple, boxes.reshape(-1, 4).tolist()), quads.reshape(-1, 8).tolist(), strict=True))
    return mask.transform(mask.size, Image.Transform.MESH, cells, Image.Resampling.BILINEAR)


def _noise(random: np.random.Generator) -> Image.Image:
    """Return noise around 128 of a random amplitude."""
    amplitude = random.integers(NOISE + 1)
    return Image.fromarray(random.integers(128 - amplitude, 129 + amplitude, size=(GRAIN, GRAIN, 3)).astype(np.uint8))
