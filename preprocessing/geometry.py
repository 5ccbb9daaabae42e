"""Pixel grids: resizing and the centroid coordinates u, v."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)
Size = tuple[int, int]
"""Height, width in pixels."""


def resize_labels(labels_HW: NDArray[T], size: Size) -> NDArray[T]:
    """Nearest-neighbour resize of an integer map (H, W) to `size`, sampling at pixel centres.

    The source of output row i is floor((i + 0.5) H / h): labels are names, so nothing else is meaningful.
    """
    height, width = labels_HW.shape
    if (height, width) == size:
        return labels_HW
    rows = ((2 * np.arange(size[0]) + 1) * height) // (2 * size[0])
    columns = ((2 * np.arange(size[1]) + 1) * width) // (2 * size[1])
    return np.ascontiguousarray(labels_HW[rows[:, None], columns])
