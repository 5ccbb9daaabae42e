"""Pixel grids: how images and label maps come onto them."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)
Size = tuple[int, int]
"""Height, width in pixels."""
PADDING = (124, 116, 104)
"""RGB of pixels outside of an image: ImageNet's mean, nearly 0 to a network."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """How an image of any size comes onto the grid that a network sees."""

    size: Size
    """Of the grid."""
    keep_aspect: bool = False
    """False: squashed to the whole grid, as the generalist's paper does. True: scaled until one side fits, at the upper
    left; the rest of the grid is padding, which belongs to no segment."""

    def inner(self, image: Size) -> Size:
        """The part of the grid, from its upper left, that an image of this (height, width) fills."""
        if not self.keep_aspect:
            return self.size
        share = min(self.size[0] / image[0], self.size[1] / image[1])
        height, width = (min(most, max(1, round(share * side))) for side, most in zip(image, self.size, strict=True))
        return height, width


def resize_labels(labels_HW: NDArray[T], size: Size) -> NDArray[T]:
    """Nearest-neighbour resize of an integer map (H, W) to `size`, sampling at pixel centres.

    The source of output row i is floor((i + 0.5) H / h): labels are names, so nothing else is meaningful.
    """
    height, width = labels_HW.shape
    if (height, width) == size:
        return labels_HW
    rows, columns = sources(height, size[0]), sources(width, size[1])
    return np.ascontiguousarray(labels_HW[rows[:, None], columns])


def sources(old: int, new: int, part: slice = slice(None)) -> NDArray[np.int64]:
    """Along one axis: the source pixel of each of `new` pixels, or of a part of them, made of `old` ones."""
    return ((2 * np.arange(new)[part] + 1) * old) // (2 * new)
