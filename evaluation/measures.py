"""What evaluation says of images besides PQ, in sums that merge exactly: sizes, boundaries, confusions, no classes.

Axis letters as in `pq`: N ground-truth segments, M predicted ones, C categories, S sizes.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import hypot
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.pq import (
    IOU_UNIT,
    PQStats,
    StatsRecord,
    Units,
    categories_of,
    crowds_of,
    ious,
    joint_histogram,
    match,
    pixel_counts,
    sorted_ids,
    tally,
)
from infra.errors import TesseraError
from infra.records import Count
from preprocessing.kernels import MAX_RADIUS, UNKNOWN, relabel, squared_distance
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap

SIZE_EDGES = (8, 16, 32, 64, 128, 256)
"""Square roots of areas, in pixels, between the sizes of segments; COCO's small and medium end at 32 and 96."""
SIZES = len(SIZE_EDGES) + 1
BOUNDARY_SHARE = 0.02
"""Width of a boundary's band as a share of the image's diagonal (Boundary IoU, Cheng et al., 2021)."""


@dataclass(frozen=True, eq=False)
class Score:
    """Sums over images; `a + b` gives the same bits whatever the order or split of the images."""

    pq: PQStats
    """By category, (C,)."""
    boundary: PQStats
    """The same with the lesser of IoU and boundary IoU in place of IoU, (C,)."""
    agnostic: PQStats
    """Of things as if they had one category, stuff as if it had none, (1,)."""
    sized: PQStats
    """PQ by category within sizes, (S C,): sizes one after the other. A false positive has its own size."""
    instance_iou_units: tuple[int, ...]
    """By size, (S,): sum over true instances (things that are no crowds) of the best IoU that a predicted thing of
    any category has with it, in units of 1 / IOU_UNIT."""
    instances: NDArray[np.int64]
    """By size, (S,): how many true instances there are."""
    confusion: NDArray[np.int64]
    """Pixels by true and predicted category, (C, C + 1); the last column is predicted void. Without true void."""

    @classmethod
    def zero(cls, categories: int) -> "Score":
        """No image."""
        c, s = categories, SIZES
        per_category, sums = PQStats.zero(c), (np.zeros(s, np.int64), np.zeros((c, c + 1), np.int64))
        return cls(per_category, per_category, PQStats.zero(1), PQStats.zero(s * c), (0,) * s, *sums)

    def __add__(self, other: "Score") -> "Score":
        units = tuple(a + b for a, b in zip(self.instance_iou_units, other.instance_iou_units, strict=True))
        return Score(
            self.pq + other.pq,
            self.boundary + other.boundary,
            self.agnostic + other.agnostic,
            self.sized + other.sized,
            units,
            self.instances + other.instances,
            self.confusion + other.confusion,
        )

    def to_json(self) -> dict[str, Any]:
        """Lists by name; of the confusion its places that are not 0, as [true, predicted, pixels]."""
        places = np.argwhere(self.confusion)
        triples = [[int(t), int(p), int(self.confusion[t, p])] for t, p in places]
        stats = {name: getattr(self, name).to_json() for name in _STATS}
        units = [str(value) for value in self.instance_iou_units]
        return {
            **stats,
            "instance_iou_units": units,
            "instances": self.instances.tolist(),
            "categories": len(self.pq),
            "confusion": triples,
        }

    @classmethod
    def from_json(cls, content: "ScoreRecord") -> "Score":
        """Inverse of to_json, exact. TesseraError if its parts are not of one number of categories."""
        c = len(content.pq.tp)
        stats = content.pq, content.boundary, content.agnostic, content.sized
        lengths = [*(len(part.tp) for part in stats), len(content.instance_iou_units), len(content.instances)]
        if [content.categories, *lengths] != [c, c, c, 1, SIZES * c, SIZES, SIZES]:
            raise TesseraError(f"sums of {content.categories} categories with parts of {lengths}")
        confusion = np.zeros((c, c + 1), np.int64)
        for true, predicted, pixels in content.confusion:
            if true >= c or predicted > c:
                raise TesseraError(f"confusions of the categories {true} and {predicted} of {c}")
            confusion[true, predicted] = pixels
        pq, boundary, agnostic, sized = map(PQStats.from_json, stats)
        units = tuple(int(value) for value in content.instance_iou_units)
        return cls(pq, boundary, agnostic, sized, units, np.array(content.instances, np.int64), confusion)


@dataclass(frozen=True)
class ScoreRecord:
    """What Score.to_json gives."""

    pq: StatsRecord
    boundary: StatsRecord
    agnostic: StatsRecord
    sized: StatsRecord
    instance_iou_units: list[Units]
    instances: list[Count]
    categories: Count
    confusion: list[tuple[Count, Count, Count]]


_STATS = ("pq", "boundary", "agnostic", "sized")


def measure_image(truth: PanopticMap, prediction: PanopticMap, labels: LabelTable, where: str = "") -> Score:
    """Everything of one image. `where` names it in errors. Raises TesseraError as `pq.pixel_counts` does."""
    c = len(labels)
    counts = pixel_counts(truth, prediction, c, where)
    iou_NM, crowd_N = ious(counts), crowds_of(truth.segments)
    category_N, category_M = categories_of(truth.segments), categories_of(prediction.segments)
    found = match(counts, iou_NM, category_N, category_M, crowd_N)
    size_N, size_M = _sizes(counts.sum(axis=1)[1:-1]), _sizes(counts.sum(axis=0)[1:-1])
    lesser_NM = np.minimum(iou_NM, boundary_ious(truth, prediction))
    at_boundary = match(counts, lesser_NM, category_N, category_M, crowd_N)
    thing_N, thing_M = labels.is_thing[category_N], labels.is_thing[category_M]
    as_one = match(counts, iou_NM, np.where(thing_N, 0, -1), np.where(thing_M, 0, -1), crowd_N)
    best_N = (iou_NM * thing_M).max(axis=1, initial=0.0)
    units = [0] * SIZES
    for row in np.flatnonzero(thing_N & ~crowd_N):
        units[size_N[row]] += int(best_N[row] * IOU_UNIT)
    return Score(
        tally(found, category_N, category_M, c),
        tally(at_boundary, category_N, category_M, c),
        tally(as_one, np.zeros_like(category_N), np.zeros_like(category_M), 1),
        tally(found, size_N * c + category_N, size_M * c + category_M, SIZES * c),
        tuple(units),
        np.bincount(size_N[thing_N & ~crowd_N], minlength=SIZES),
        _confusion(counts, category_N, category_M, c),
    )


def _sizes(area_N: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(np.square(SIZE_EDGES), area_N, side="right")


def _confusion(
    counts: NDArray[np.int64], category_N: NDArray[np.int64], category_M: NDArray[np.int64], categories: int
) -> NDArray[np.int64]:
    by_category = np.zeros((categories, categories + 1), np.int64)
    columns = np.append(categories, category_M)  # void first, as in counts
    np.add.at(by_category, (category_N[:, None], columns), counts[1:-1, :-1])
    return by_category


def boundary_ious(truth: PanopticMap, prediction: PanopticMap) -> NDArray[np.float64]:
    """IoU of the bands along the inside of every pair's contours, float64 (N, M).

    A segment's outermost pixels have a 4-neighbour in another segment, in void or outside of the image. Its band, w
    pixels wide, are those and all that lie at most w - 1 from one of them (Euclidean, as our distance maps; Cheng et
    al. erode by squares); w is BOUNDARY_SHARE of the diagonal, rounded, from 1 to MAX_RADIUS. As in `pq.ious` the
    prediction's pixels on void are left out of the union.
    """
    reach = max(1, round(BOUNDARY_SHARE * hypot(*truth.size)))
    bands = _band(truth, reach), _band(prediction, reach)
    counts = joint_histogram(*bands, *sorted_ids(truth.segments), *sorted_ids(prediction.segments))
    return ious(counts)


_INSIDE = -1
"""Id of pixels that are in a segment but not in its band: it is in no table."""
_OUTSIDE = UNKNOWN - 1
"""Label of the frame around the image, which no segment has."""
_EACH = np.arange(UNKNOWN + 1, dtype=np.uint16)
"""Every label is a group of its own."""


def _band(panoptic: PanopticMap, reach: int) -> NDArray[np.int32]:
    """Ids in the bands of `reach` pixels; _INSIDE in the rest of segments; void stays void."""
    ids_N, rows_N = sorted_ids(panoptic.segments)
    labels_HW = relabel(np.ascontiguousarray(panoptic.ids), ids_N, rows_N.astype(np.uint16))
    framed_HW = np.pad(labels_HW, 1, constant_values=_OUTSIDE)
    radius = min(reach, MAX_RADIUS)
    d2_HW = squared_distance(framed_HW, _EACH, radius)[1:-1, 1:-1]
    near_HW = d2_HW <= (radius - 1) ** 2  # distance 0 is the first pixel of the band
    return np.where(near_HW | (panoptic.ids == 0), panoptic.ids, np.int32(_INSIDE))


def iou_by_size(score: Score) -> list[float | None]:
    """Mean over true instances of each size of their best IoU with a predicted thing, percent (G, figures 5 and 6)."""
    pairs = zip(score.instance_iou_units, score.instances.tolist(), strict=True)
    return [100 * units / IOU_UNIT / count if count else None for units, count in pairs]


def size_names() -> list[str]:
    """Of each size, as ranges of the square root of the area in pixels."""
    edges = [str(edge) for edge in SIZE_EDGES]
    return [f"< {edges[0]}", *(f"{a} to {b}" for a, b in pairwise(edges)), f">= {edges[-1]}"]


def semantic_iou(score: Score) -> NDArray[np.float64]:
    """IoU of each category's pixels whatever the instances, percent, (C,); NaN where it is in neither map."""
    hit_C = score.confusion[:, :-1].diagonal()
    union_C = score.confusion.sum(axis=1) + score.confusion[:, :-1].sum(axis=0) - hit_C
    return np.divide(100.0 * hit_C, union_C, out=np.full(len(hit_C), np.nan), where=union_C > 0)
