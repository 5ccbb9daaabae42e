"""Numba kernels over label maps: one thread each, the GIL released, compiled code cached.

Label maps are dense: 0 is void, segment i of the table (1-based) has label i. Parallelism is Ray's, so no
kernel is parallel itself.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

MAX_RADIUS = 181
"""Largest clipping radius: radius^2 + (radius - 1)^2 must fit uint16."""

UNKNOWN = 0xFFFF
"""Label that `relabel` gives to pixels whose id is not in the table."""


@njit(cache=True, nogil=True)
def relabel(
    raw_HW: NDArray[np.int32], sorted_ids_N: NDArray[np.int32], labels_N: NDArray[np.uint16]
) -> NDArray[np.uint16]:
    """Map raw ids to dense labels in one pass.

    raw_HW: int32 ids, 0 = void. sorted_ids_N: int32, ascending, without 0. labels_N: uint16, the label of
    each sorted id. Returns uint16 (H, W): 0 for void, UNKNOWN where the id is not listed.
    """
    height, width = raw_HW.shape
    dense_HW = np.empty((height, width), np.uint16)
    last_id, last_label = np.int32(0), np.uint16(0)
    for y in range(height):
        for x in range(width):
            value = raw_HW[y, x]
            if value != last_id:  # runs are long: look an id up once per run
                last_id = value
                last_label = np.uint16(0)
                if value != 0:
                    at = np.searchsorted(sorted_ids_N, value)
                    known = at < sorted_ids_N.size and sorted_ids_N[at] == value
                    last_label = labels_N[at] if known else np.uint16(UNKNOWN)
            dense_HW[y, x] = last_label
    return dense_HW


@njit(cache=True, nogil=True)
def measure(
    labels_HW: NDArray[np.uint16], segments: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Areas, boxes and centroids of all segments in one pass.

    labels_HW: uint16 labels 0..segments. Returns area int64 (segments + 1,) with void first; box int64
    (segments + 1, 4) as x, y, width, height; centroid float64 (segments + 1, 2) as x, y in pixels with
    pixel centres at integers. Box and centroid of a segment without pixels are 0 and NaN.
    """
    height, width = labels_HW.shape
    area_N = np.zeros(segments + 1, np.int64)
    sum_N2 = np.zeros((segments + 1, 2), np.int64)
    low_N2 = np.full((segments + 1, 2), max(height, width), np.int64)
    high_N2 = np.full((segments + 1, 2), -1, np.int64)
    for y in range(height):
        start = 0
        for x in range(1, width + 1):
            if x < width and labels_HW[y, x] == labels_HW[y, start]:
                continue
            label, length = labels_HW[y, start], x - start  # the run start..x-1
            area_N[label] += length
            sum_N2[label, 0] += (start + x - 1) * length // 2
            sum_N2[label, 1] += y * length
            low_N2[label, 0] = min(low_N2[label, 0], start)
            low_N2[label, 1] = min(low_N2[label, 1], y)
            high_N2[label, 0] = max(high_N2[label, 0], x - 1)
            high_N2[label, 1] = y
            start = x
    box_N4 = np.zeros((segments + 1, 4), np.int64)
    centroid_N2 = np.full((segments + 1, 2), np.nan)
    for label in range(segments + 1):
        if area_N[label] > 0:
            box_N4[label, :2] = low_N2[label]
            box_N4[label, 2:] = high_N2[label] - low_N2[label] + 1
            centroid_N2[label] = sum_N2[label] / area_N[label]
    return area_N, box_N4, centroid_N2


@njit(cache=True, nogil=True)
def squared_distance(labels_HW: NDArray[np.uint16], group_N: NDArray[np.uint16], radius: int) -> NDArray[np.uint16]:
    """Squared Euclidean distance to the nearest boundary pixel, exact, clipped at radius^2.

    A pixel is a boundary pixel when a 4-neighbour inside the image has another group; void has group 0 and
    counts, the image border does not (docs/architecture.md, Boundary). group_N: uint16, the group of each
    label, (segments + 1,): categories for the semantic task, instances for the instance task. radius: 1 to
    MAX_RADIUS pixels. Returns uint16 (H, W); radius^2 everywhere if nothing is a boundary.

    Method: clipped distances along columns, then min-plus with k^2 along rows. Both loops run over whole
    rows so that LLVM vectorises them; the second stops once k^2 cannot lower anything in the row.
    """
    height, width = labels_HW.shape
    far = np.uint16(radius * radius)
    column_HW = _column_distance(labels_HW, group_N, radius)
    out_HW = np.empty((height, width), np.uint16)
    padded = np.full(width + 2 * radius, far, np.uint16)
    for y in range(height):
        row, centre = out_HW[y], padded[radius : radius + width]
        highest = np.uint16(0)
        for x in range(width):
            value = np.uint16(column_HW[y, x] * column_HW[y, x])
            centre[x] = value
            row[x] = value
            highest = max(highest, value)
        for k in range(1, radius):
            k2 = np.uint16(k * k)
            if k2 >= highest:
                break
            left, right = padded[radius - k : radius - k + width], padded[radius + k : radius + k + width]
            for x in range(width):
                row[x] = min(row[x], np.uint16(min(left[x], right[x]) + k2))
    return out_HW


@njit(cache=True, nogil=True)
def _column_distance(labels_HW: NDArray[np.uint16], group_N: NDArray[np.uint16], radius: int) -> NDArray[np.uint16]:
    """Distance to the nearest boundary pixel of the same column, clipped at radius; uint16 (H, W)."""
    height, width = labels_HW.shape
    group_HW = np.empty((height, width), np.uint16)
    for y in range(height):
        for x in range(width):
            group_HW[y, x] = group_N[labels_HW[y, x]]
    out_HW = np.full((height, width), radius, np.uint16)
    for y in range(height):
        row = group_HW[y]
        above, below = group_HW[max(y - 1, 0)], group_HW[min(y + 1, height - 1)]
        for x in range(width):
            if row[x] != above[x] or row[x] != below[x]:
                out_HW[y, x] = 0
        for x in range(width - 1):
            if row[x] != row[x + 1]:
                out_HW[y, x] = 0
                out_HW[y, x + 1] = 0
    for y in range(1, height):
        for x in range(width):
            out_HW[y, x] = min(out_HW[y, x], np.uint16(out_HW[y - 1, x] + 1))
    for y in range(height - 2, -1, -1):
        for x in range(width):
            out_HW[y, x] = min(out_HW[y, x], np.uint16(out_HW[y + 1, x] + 1))
    return out_HW
