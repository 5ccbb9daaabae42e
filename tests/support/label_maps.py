"""What label maps should turn into, by brute force."""

import numpy as np
from scipy.ndimage import distance_transform_edt


def boundary(groups_HW: np.ndarray) -> np.ndarray:
    """Pixels with a 4-neighbour of another group; the image border is none."""
    result = np.zeros(groups_HW.shape, bool)
    down, across = groups_HW[1:] != groups_HW[:-1], groups_HW[:, 1:] != groups_HW[:, :-1]
    result[1:] |= down
    result[:-1] |= down
    result[:, 1:] |= across
    result[:, :-1] |= across
    return result


def squared_distances(groups_HW: np.ndarray, radius: int) -> np.ndarray:
    """min(d^2, radius^2) to the nearest boundary pixel, by scipy."""
    edges = boundary(groups_HW)
    if not edges.any():
        return np.full(groups_HW.shape, radius**2)
    return np.minimum(np.rint(distance_transform_edt(~edges) ** 2).astype(int), radius**2)


def resized(labels_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest neighbour at pixel centres, one pixel at a time and in integers."""
    (height, width), (rows, columns) = labels_HW.shape, size
    return np.array(
        [
            [
                labels_HW[(2 * y + 1) * height // (2 * rows), (2 * x + 1) * width // (2 * columns)]
                for x in range(columns)
            ]
            for y in range(rows)
        ]
    )
