"""Instance masks as COCO's detection JSON writes them: polygons, run lengths, compressed run lengths.

Here a mask is its run lengths, int64 (N,): down the columns, outside and inside by turns, all pixels together. So many
masks of one image take no more than their outlines do.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from preprocessing.geometry import Size
from preprocessing.json_values import whole

_MAX_BITS = 40
"""No count of an image needs more."""


Runs = NDArray[np.int64]


def runs_of(segmentation: Any, size: Size) -> Runs:
    """One annotation's `segmentation` on an image of `size`; several polygons are united, none is an empty mask.

    ValueError with what is wrong and what was expected. All is checked before pycocotools rasterises polygons,
    which trusts what it is given; run lengths never get there.
    """
    if isinstance(segmentation, list):
        return _from_polygons([_checked(polygon, size) for polygon in segmentation], size)
    if not isinstance(segmentation, dict):
        raise ValueError(f"the segmentation is {segmentation!r}, expected polygons or RLE")
    if segmentation.get("size") != list(size):
        raise ValueError(f"the RLE's size is {segmentation.get('size')}, expected {list(size)} (height, width)")
    counts = segmentation.get("counts")
    return _checked_counts(unpack(counts) if isinstance(counts, str) else counts, size)


def encode(mask_HW: NDArray[np.bool_]) -> Runs:
    """A mask, bool (H, W), as its run lengths."""
    inside_N = mask_HW.ravel(order="F")
    changes = np.flatnonzero(inside_N[1:] != inside_N[:-1]) + 1
    counts = np.diff(changes, prepend=0, append=inside_N.size)
    return np.insert(counts, 0, 0) if inside_N[:1].any() else counts


def area(runs: Runs) -> int:
    """Pixels inside."""
    return int(runs[1::2].sum())


def unpack(text: str) -> list[int]:
    """The run lengths in a compressed RLE. ValueError if it is none.

    Each character holds 6 bits, from "0" on: 5 of a number, low ones first, and whether more follow; the last
    group's highest bit is the sign. From the fourth number on, the one two before is to be added.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - ord("0")
        if not 0 <= bits < 64 or shift > _MAX_BITS:
            raise ValueError(f"the RLE cannot be unpacked at its count {len(counts)}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        value -= (bits >> 4 & 1) << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("the RLE ends within a count")
    return counts


def _checked_counts(counts: Any, size: Size) -> Runs:
    read = [whole(count) for count in counts] if isinstance(counts, list) else [None]
    counts = [count for count in read if count is not None and count >= 0]
    if len(counts) < len(read):
        raise ValueError("the RLE's counts are no list of integers from 0 on")
    if sum(counts) != size[0] * size[1]:
        raise ValueError(
            f"the RLE's counts add up to {sum(counts)}, expected {size[0] * size[1]} = {size[0]} * {size[1]}"
        )
    return np.array(counts, np.int64)


def _checked(polygon: Any, size: Size) -> list[float]:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        count = f"of {len(polygon)} numbers" if isinstance(polygon, list) else repr(polygon)
        raise ValueError(f"a polygon {count}, expected x, y of three points at least")
    if not all(type(number) in (int, float) for number in polygon):
        raise ValueError("a polygon holds something other than numbers")
    # pycocotools walks edges pixel by pixel, so far coordinates cost without end; a mask needs none of them
    for number, extent in zip(polygon, (size[1], size[0]) * (len(polygon) // 2), strict=True):
        if not -extent <= number <= 2 * extent:
            raise ValueError(f"a polygon has the coordinate {number}, expected at most the image's size away from it")
    return [float(number) for number in polygon]


def _from_polygons(polygons: list[list[float]], size: Size) -> Runs:
    from pycocotools import mask as coco_mask

    if not polygons:
        return np.array([size[0] * size[1]])
    united = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
    return _checked_counts(unpack(united["counts"].decode()), size)
