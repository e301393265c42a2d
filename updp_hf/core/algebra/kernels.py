"""What has to happen to the kernels of a run before they have one common kernel: padding moves, taps are cropped."""

import math
from collections.abc import Sequence
from dataclasses import replace

from updp_hf.core.algebra.affine import AffineMap
from updp_hf.errors import UPDPError

__all__ = ["can_crop", "can_fill", "crop", "crop_some", "largest", "move_padding"]


def can_crop(map: AffineMap) -> bool:
    """Return whether `map` has a centre tap to which its outer taps can be cropped, the size of its output kept."""
    sizes = [d * (k - 1) for d, k in zip(map.dilation, map.kernel, strict=True)]
    same = tuple(size // 2 for size in reversed(sizes) for _ in range(2))
    return any(sizes) and all(k % 2 for k in map.kernel) and map.padding == same


def crop(map: AffineMap) -> AffineMap:
    """Return the centre tap of `map`.

    Raises:
        ValueError: it has none.
    """
    if not can_crop(map):
        raise UPDPError(f"A kernel {map.kernel} with padding {map.padding} has no centre tap: expected odd, 'same'.")
    centre = tuple(slice(k // 2, k // 2 + 1) for k in map.kernel)
    axes = len(map.kernel)
    return replace(map, weight=map.weight[:, :, *centre], padding=(0, 0) * axes, dilation=(1,) * axes)


def can_fill(maps: Sequence[AffineMap]) -> bool:
    """Return whether only pointwise maps come before whatever pads, after the first map.

    Then zeros in front of the run are a constant where the padding was.
    """
    padded = [i for i, map in enumerate(maps) if i and any(map.padding)]
    return all(math.prod(map.kernel) == 1 and not any(map.padding) for i in padded for map in maps[:i])


def crop_some(maps: Sequence[AffineMap], cropped: Sequence[bool]) -> list[AffineMap]:
    """Return `maps` with those that are `cropped` reduced to their centre taps: the dense maps of a closed run."""
    return [crop(map) if is_cropped else map for map, is_cropped in zip(maps, cropped, strict=True)]


def largest(maps: Sequence[AffineMap]) -> int:
    """Return the index of the map with the largest kernel, the first of equals."""
    sizes = [tuple(d * (k - 1) for d, k in zip(map.dilation, map.kernel, strict=True)) for map in maps]
    return max(range(len(maps)), key=lambda i: (sum(sizes[i]), -i))


def move_padding(maps: Sequence[AffineMap]) -> tuple[list[AffineMap], list[tuple[int, ...]]]:
    """Move all padding of a run to its first map, where it has a place in the common map.

    Returns:
        The maps, of which only the first one pads, and for each the width of the ring that its input has now and did
        not have before. From the end, with padding p and stride s of each: `r_i = p_i + s_i · r_(i+1)`, and the front
        pads `p_1 + s_1 · r_2`.
    """
    ring = (0,) * len(maps[0].padding)
    moved: list[AffineMap] = []
    rings: list[tuple[int, ...]] = []
    for map in reversed(maps):
        strides = [s for s in reversed(map.stride) for _ in range(2)]  # in the order of `padding`
        ring = tuple(p + s * r for p, s, r in zip(map.padding, strides, ring, strict=True))
        rings.append(ring)
        moved.append(replace(map, padding=(0,) * len(ring)))
    front = replace(moved[-1], padding=rings[-1])
    nothing = (0,) * len(ring)
    return [front, *reversed(moved[:-1])], [nothing, *reversed(rings[:-1])]
