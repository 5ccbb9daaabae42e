"""Which segments of two maps of one image overlap, and by how much: in time and memory linear in what does.

Axis letters as in `pq`: N ground-truth segments, M predicted ones, P pairs of them.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit
from numpy.typing import NDArray

from preprocessing.kernels import relabel
from preprocessing.panoptic_map import PanopticMap


def to_labels(panoptic: PanopticMap) -> NDArray[np.uint16]:
    """The map by rows: uint16 (H, W), 0 = void, i = the table's i-th row, UNKNOWN = ids that are not in it."""
    ids_N = np.array([segment.id for segment in panoptic.segments], np.int32)
    order_N = np.argsort(ids_N)
    return relabel(np.ascontiguousarray(panoptic.ids), ids_N[order_N], (order_N + 1).astype(np.uint16))


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Which segments of two maps share pixels, and how many: linear in these pairs, of which there are few.

    Rows and columns of the tables count from 0.
    """

    rows_P: NDArray[np.int64]
    """Of the ground truth, ascending, and within a row the columns are."""
    columns_P: NDArray[np.int64]
    pixels_P: NDArray[np.int64]
    area_N: NDArray[np.int64]
    """All pixels of each segment."""
    area_M: NDArray[np.int64]
    missed_N: NDArray[np.int64]
    """Pixels of each ground-truth segment on predicted void."""
    void_M: NDArray[np.int64]
    """Pixels of each predicted segment on void."""
    unlisted: int
    """Predicted pixels whose id is not in the table."""

    @cached_property
    def iou_P(self) -> NDArray[np.float64]:
        """IoU of each pair; pixels of the prediction on void are left out of the union. All other pairs' is 0."""
        areas_P = self.area_N[self.rows_P] + self.area_M[self.columns_P]
        return self.pixels_P / np.maximum(areas_P - self.pixels_P - self.void_M[self.columns_P], 1)


def overlaps_of(
    truth_HW: NDArray[np.uint16], prediction_HW: NDArray[np.uint16], truth_rows: int, prediction_rows: int
) -> Overlaps:
    """Of label maps of one size: uint16 (H, W), C-contiguous, 0 = void, i = row i; all larger ones are not listed."""
    width = prediction_rows + 2
    code_P, pixels_P = _joint(truth_HW.ravel(), prediction_HW.ravel(), truth_rows, prediction_rows)
    rows_P, columns_P = np.divmod(code_P, width)
    area_N, area_M = sums(rows_P, pixels_P, truth_rows + 2), sums(columns_P, pixels_P, width)
    on_void, off = rows_P == 0, columns_P == 0
    void_M = sums(columns_P[on_void], pixels_P[on_void], width)
    missed_N = sums(rows_P[off], pixels_P[off], truth_rows + 2)
    both = ~on_void & ~off & (rows_P <= truth_rows) & (columns_P <= prediction_rows)
    pairs = rows_P[both] - 1, columns_P[both] - 1, pixels_P[both]
    return Overlaps(*pairs, area_N[1:-1], area_M[1:-1], missed_N[1:-1], void_M[1:-1], int(area_M[-1]))


_DENSE = 1 << 18
"""Up to so many places a table of all pairs is the fastest way to count; 2 MB."""
_AT_ONCE = 1 << 22
"""Pixels whose runs are held at once where it would be too large."""


def _joint(
    truth_P: NDArray[np.uint16], prediction_P: NDArray[np.uint16], truth_rows: int, prediction_rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row * (prediction_rows + 2) + column, pixels) of the pairs that occur, ascending: first void, last unlisted."""
    if (truth_rows + 2) * (prediction_rows + 2) <= _DENSE:
        counts = joint_labels(truth_P, prediction_P, truth_rows, prediction_rows).ravel()
        code_K = np.flatnonzero(counts)
        return code_K, counts[code_K]
    code_K, pixels_K = np.zeros((2, 0), np.int64)
    for start in range(0, truth_P.size, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        runs = joint_runs(truth_P[part], prediction_P[part], truth_rows, prediction_rows)
        code_K, pixels_K = summed(np.append(code_K, runs[0]), np.append(pixels_K, runs[1]))
    return code_K, pixels_K


def summed(code_K: NDArray[np.int64], pixels_K: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each code once, ascending, with the sum of its pixels."""
    unique, place_K = np.unique(code_K, return_inverse=True)
    return unique, sums(place_K, pixels_K, unique.size)


def sums(place_K: NDArray[np.int64], pixels_K: NDArray[np.int64], places: int) -> NDArray[np.int64]:
    """Sum of the pixels by place, int64 (places,)."""
    return np.bincount(place_K, pixels_K, places).astype(np.int64)  # float64 is exact for fewer than 2^53 pixels


@njit(cache=True, nogil=True)
def joint_labels(
    truth_P: NDArray[np.uint16], prediction_P: NDArray[np.uint16], truth_rows: int, prediction_rows: int
) -> NDArray[np.int64]:
    """Count the pixels of every pair of labels in one pass. Source: ours.

    Labels as in `overlaps_of`, flat. Returns int64 (N + 2, M + 2): first void, then the rows, last what is not listed.
    """
    counts = np.zeros((truth_rows + 2, prediction_rows + 2), np.int64)
    start = 0
    for at in range(1, truth_P.size + 1):
        # Runs are long, so counts are added once per run.
        if at == truth_P.size or truth_P[at] != truth_P[at - 1] or prediction_P[at] != prediction_P[at - 1]:
            row, column = min(truth_P[start], truth_rows + 1), min(prediction_P[start], prediction_rows + 1)
            counts[row, column] += at - start
            start = at
    return counts


@njit(cache=True, nogil=True)
def joint_runs(
    truth_P: NDArray[np.uint16], prediction_P: NDArray[np.uint16], truth_rows: int, prediction_rows: int
) -> NDArray[np.int64]:
    """Runs of equal pairs of labels: int64 (2, runs), their place in the table of `joint_labels` and their length."""
    runs = 1
    for at in range(1, truth_P.size):
        runs += truth_P[at] != truth_P[at - 1] or prediction_P[at] != prediction_P[at - 1]
    found_2R = np.empty((2, runs), np.int64)
    start = run = 0
    for at in range(1, truth_P.size + 1):
        if at == truth_P.size or truth_P[at] != truth_P[at - 1] or prediction_P[at] != prediction_P[at - 1]:
            row, column = min(truth_P[start], truth_rows + 1), min(prediction_P[start], prediction_rows + 1)
            found_2R[0, run], found_2R[1, run] = row * (prediction_rows + 2) + column, at - start
            start, run = at, run + 1
    return found_2R
