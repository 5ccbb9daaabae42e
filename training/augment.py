"""Examples on another grid: a random scale and crop for training, a frame as evaluation has it.

All targets are measured anew from the pixels that are seen. Work is done for those alone, never for the whole of
a scaled image.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infra.errors import TesseraError
from preprocessing.geometry import PADDING, Frame, Size, sources
from preprocessing.panoptic_map import visible
from preprocessing.sample import distances, to_rgb
from training.batch import Example


@dataclass(frozen=True, kw_only=True)
class Crop:
    """What of an image the network sees in training: scaled at random, its aspect kept, then cut out at random.

    Where the scaled image is smaller than the crop, it lies at the upper left, as on an evaluation frame, mirrored
    or not, and the rest is padding, void.
    """

    size: Size
    """Height, width of the crop."""
    short_side: tuple[int, int]
    """Least and most pixels of the scaled image's shorter side; all between are as likely."""
    long_side: int
    """Most pixels of the scaled image's longer side; it bounds the shorter one where both cannot be."""

    def __post_init__(self) -> None:
        least, most = self.short_side
        if min(self.size) < 1 or not 1 <= least <= most <= self.long_side:
            raise TesseraError(f"crop: size {self.size}, short side {least} to {most}, long side {self.long_side}")


def cropped(example: Example, crop: Crop, rng: np.random.Generator, radius: int) -> Example:
    """The example scaled and cut at random: image, labels (uint16) and d2 are of `crop.size`. Its own d2 is not read.

    Labels are what resizing all of them and then cutting gives, the image is within a grey level. Segments without a
    visible pixel are dropped, the others numbered 1..N in their order; areas, boxes and centroids are those of the
    visible part. radius: of the distances, pixels, up to kernels.MAX_RADIUS; they are those of the visible map, where
    neither the border of the crop nor that of the image is an edge. 0: none.
    """
    image = example.labels_HW.shape
    scaled = scaled_size((image[0], image[1]), int(rng.integers(*crop.short_side, endpoint=True)), crop.long_side)
    top, left = (
        int(rng.integers(max(0, side - seen), endpoint=True)) for side, seen in zip(scaled, crop.size, strict=True)
    )
    return _seen(example, scaled, (top, left), crop.size, radius)


def framed(example: Example, frame: Frame, radius: int) -> Example:
    """The example on an evaluation frame, its image as `sample.framed_image` has it; the rest as in `cropped`."""
    image = example.labels_HW.shape
    return _seen(example, frame.inner((image[0], image[1])), (0, 0), frame.size, radius)


def scaled_size(image: Size, short_side: int, long_side: int) -> Size:
    """Height, width of an image whose shorter side becomes `short_side`, or as much less as `long_side` demands."""
    least, most = min(image), max(image)
    scaled = short_side, _rounded(most * short_side, least)
    if scaled[1] > long_side:
        scaled = max(1, _rounded(least * long_side, most)), long_side
    return scaled if image[0] <= image[1] else (scaled[1], scaled[0])


def _rounded(numerator: int, denominator: int) -> int:
    """The quotient to the nearest integer, halves up: no float decides about a pixel."""
    return (2 * numerator + denominator) // (2 * denominator)


def _seen(example: Example, scaled: Size, corner: Size, size: Size, radius: int) -> Example:
    """What a window of `size` shows of the example resized to `scaled`; corner: its top and left.

    The window may be larger than the scaled image, then the corner is 0 and the rest is padding. Distances are taken
    before there is any, so that it makes no edges: its own are radius^2, far from everything.
    """
    height, width = (min(seen, side) for seen, side in zip(size, scaled, strict=True))
    part = slice(corner[0], corner[0] + height), slice(corner[1], corner[1] + width)
    image_HW3 = _image_part(example.image_HW3, scaled, part)
    labels_HW, segments = visible(_labels_part(example.labels_HW, scaled, part), example.segments)
    d2_H2W = distances(labels_HW, segments, radius) if radius else None
    return Example(
        example.key,
        _padded(image_HW3, (*size, 3), PADDING),
        _padded(labels_HW, size, 0),
        None if d2_H2W is None else _padded(d2_H2W, (size[0], 2, size[1]), radius**2),
        segments,
    )


def _image_part(image_HW3: NDArray[np.uint8], scaled: Size, part: tuple[slice, slice]) -> NDArray[np.uint8]:
    """A part of the image resized as `sample.to_rgb` does it, a photo's within a grey level, without the rest.

    Columns, then rows: in one call Pillow takes the order from the shape of the part, and each pass rounds and clips.
    Its box is in float32, so a value may be a level off; columns have none, as the second pass would make that two.
    """
    if scaled == image_HW3.shape[:2]:
        return image_HW3[part]
    rows, columns = part
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if (height, width) == scaled:
        return to_rgb(Image.fromarray(image_HW3), scaled)
    scale = image_HW3.shape[0] / scaled[0]
    margin = 2 * max(1, scale) + 1  # a bicubic filter's reach, and a pixel for rounding
    first = max(0, math.floor(rows.start * scale - margin))
    last = min(image_HW3.shape[0], math.ceil(rows.stop * scale + margin))
    wide = Image.fromarray(image_HW3[first:last]).resize((scaled[1], last - first), Image.Resampling.BICUBIC)
    narrow = wide.crop((columns.start, 0, columns.stop, last - first))
    box = 0, rows.start * scale - first, width, min(rows.stop * scale - first, last - first)
    return np.asarray(narrow.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _labels_part(labels_HW: NDArray[Any], scaled: Size, part: tuple[slice, slice]) -> NDArray[np.uint16]:
    """A part of what `geometry.resize_labels` returns: the same pixels, found by the same integers."""
    rows, columns = (sources(*axis) for axis in zip(labels_HW.shape, scaled, part, strict=True))
    return labels_HW.take(rows, 0).take(columns, 1).astype(np.uint16)  # a quarter of the time of one index of both


def _padded(part: NDArray[Any], shape: tuple[int, ...], value: Any) -> NDArray[Any]:
    """`part` at the start of every axis of an array of `shape`; `value`, of one pixel, elsewhere."""
    if part.shape == shape:
        return part
    whole = np.empty(shape, part.dtype)
    whole[0] = value
    whole[1:] = whole[0]  # rows at once: a third of the time of np.full by pixels
    whole[tuple(map(slice, part.shape))] = part
    return whole
