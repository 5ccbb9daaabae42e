"""A table of things and stuff, masks and their run lengths, and what a merged map holds."""

import numpy as np

from preprocessing.kernels import paint_runs
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap

CAT, DOG, SKY, SEA = 3, 200, 7, 40
CATEGORIES = [
    {"id": CAT, "name": "cat", "isthing": 1, "color": [1, 2, 3]},
    {"id": DOG, "name": "dog", "isthing": 1, "color": [4, 5, 6]},
    {"id": SKY, "name": "sky", "isthing": 0, "color": [7, 8, 9]},
    {"id": SEA, "name": "sea", "isthing": 0, "color": [10, 11, 12]},
]
LABELS = LabelTable.from_coco(CATEGORIES)
SIZE = (6, 8)


def box(x: int, y: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y : y + height, x : x + width] = True
    return mask


def rows_of(truth: PanopticMap) -> list[tuple[int, bool, int]]:
    """Dataset id, crowd, area."""
    assert [s.id for s in truth.segments] == list(range(1, len(truth.segments) + 1))
    assert all(s.area == (truth.ids == s.id).sum() > 0 for s in truth.segments)
    return [(LABELS.categories[s.category].dataset_id, s.is_crowd, s.area) for s in truth.segments]


def dense(runs: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask of its run lengths, bool (H, W)."""
    labels = np.zeros(size, np.uint16)
    paint_runs(labels, runs, 1)
    return labels == 1


def counts_of(mask: np.ndarray) -> list[int]:
    """Run lengths down the columns, outside first."""
    flat, counts, inside = mask.T.ravel(), [0], False
    for value in flat:
        if value != inside:
            counts.append(0)
            inside = value
        counts[-1] += 1
    return counts
