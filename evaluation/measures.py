"""What evaluation says of images besides PQ, in sums that merge exactly: sizes, boundaries, confusions, no classes.

Axis letters as in `pq`: N ground-truth segments, M predicted ones, C categories, S sizes.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import hypot
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.overlaps import Overlaps, overlaps_of, summed, to_labels
from evaluation.pq import (
    IOU_UNIT,
    PQStats,
    StatsRecord,
    Units,
    categories_of,
    crowds_of,
    match,
    pixel_counts,
    tally,
)
from infra.errors import TesseraError
from infra.records import Count
from preprocessing.kernels import MAX_RADIUS, UNKNOWN, squared_distance
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap

SIZE_EDGES = (8, 16, 32, 64, 128, 256)
"""Square roots of areas, in pixels, between the sizes of segments; COCO's small and medium end at 32 and 96."""
SIZES = len(SIZE_EDGES) + 1
BOUNDARY_SHARE = 0.02
"""Width of a boundary's band as a share of the image's diagonal (Boundary IoU, Cheng et al., 2021)."""


@dataclass(frozen=True, eq=False)
class Confusion:
    """Pixels by true and predicted category, C + 1 being predicted void, without true void: those K that occur.

    A table of all pairs would take 32 MB of 2,000 categories, for every image that is added.
    """

    categories: int
    code_K: NDArray[np.int64]
    """True category * (C + 1) + predicted category, ascending."""
    pixels_K: NDArray[np.int64]

    @classmethod
    def of(cls, categories: int, true: NDArray[Any], predicted: NDArray[Any], pixels: NDArray[Any]) -> "Confusion":
        """Sums of pixels by true and predicted category; pairs may repeat."""
        return cls(categories, *summed(true * (categories + 1) + predicted, pixels))

    @property
    def true_K(self) -> NDArray[np.int64]:
        """The true category of each pair."""
        return self.code_K // (self.categories + 1)

    @property
    def predicted_K(self) -> NDArray[np.int64]:
        """The predicted category of each pair; C for void."""
        return self.code_K % (self.categories + 1)

    def __add__(self, other: "Confusion") -> "Confusion":
        both = np.append(self.code_K, other.code_K), np.append(self.pixels_K, other.pixels_K)
        return Confusion(self.categories, *summed(*both))


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
    confusion: Confusion

    @classmethod
    def zero(cls, categories: int) -> "Score":
        """No image."""
        c, s = categories, SIZES
        per_category, none = PQStats.zero(c), Confusion(c, *np.zeros((2, 0), np.int64))
        return cls(per_category, per_category, PQStats.zero(1), PQStats.zero(s * c), (0,) * s, np.zeros(s, int), none)

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
        found = self.confusion
        triples = np.stack([found.true_K, found.predicted_K, found.pixels_K], axis=1).tolist()
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
        for true, predicted, _ in content.confusion:
            if true >= c or predicted > c:
                raise TesseraError(f"confusions of the categories {true} and {predicted} of {c}")
        confusion = Confusion.of(c, *np.array(content.confusion, np.int64).reshape(-1, 3).T)
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
    overlaps = pixel_counts(truth, prediction, c, where)
    iou_P, crowd_N = overlaps.iou_P, crowds_of(truth.segments)
    category_N, category_M = categories_of(truth.segments), categories_of(prediction.segments)
    found = match(overlaps, iou_P, category_N, category_M, crowd_N)
    size_N, size_M = _sizes(overlaps.area_N), _sizes(overlaps.area_M)
    lesser_P = np.minimum(iou_P, boundary_ious(truth, prediction, overlaps))
    at_boundary = match(overlaps, lesser_P, category_N, category_M, crowd_N)
    thing_N, thing_M = labels.is_thing[category_N], labels.is_thing[category_M]
    as_one = match(overlaps, iou_P, np.where(thing_N, 0, -1), np.where(thing_M, 0, -1), crowd_N)
    best_N = np.zeros(category_N.size)
    np.maximum.at(best_N, overlaps.rows_P, iou_P * thing_M[overlaps.columns_P])
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
        _confusion(overlaps, category_N, category_M, c),
    )


def _sizes(area_N: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(np.square(SIZE_EDGES), area_N, side="right")


def _confusion(
    overlaps: Overlaps, category_N: NDArray[np.int64], category_M: NDArray[np.int64], categories: int
) -> Confusion:
    off_N = np.flatnonzero(overlaps.missed_N)
    return Confusion.of(
        categories,
        np.append(category_N[overlaps.rows_P], category_N[off_N]),
        np.append(category_M[overlaps.columns_P], np.full(off_N.size, categories)),
        np.append(overlaps.pixels_P, overlaps.missed_N[off_N]),
    )


def boundary_ious(truth: PanopticMap, prediction: PanopticMap, overlaps: Overlaps) -> NDArray[np.float64]:
    """IoU of the bands along the inside of the contours of every pair that overlaps, float64 (P,).

    A segment's outermost pixels have a 4-neighbour in another segment, in void or outside of the image. Its band, w
    pixels wide, are those and all that lie at most w - 1 from one of them (Euclidean, as our distance maps; Cheng et
    al. erode by squares); w is BOUNDARY_SHARE of the diagonal, rounded, from 1 to MAX_RADIUS. As in `Overlaps.iou_P`
    the prediction's pixels on void are left out of the union.
    """
    reach = max(1, round(BOUNDARY_SHARE * hypot(*truth.size)))
    rows, columns = overlaps.area_N.size, overlaps.area_M.size
    bands = overlaps_of(_band(truth, reach), _band(prediction, reach), rows, columns)
    places = np.searchsorted(_codes(overlaps), _codes(bands))  # what overlaps in bands overlaps
    iou_P = np.zeros(overlaps.rows_P.size)
    iou_P[places] = bands.iou_P
    return iou_P


_OUTSIDE = UNKNOWN - 1
"""Label of the frame around the image, which no segment has."""
_EACH = np.arange(UNKNOWN + 1, dtype=np.uint16)
"""Every label is a group of its own."""


def _codes(overlaps: Overlaps) -> NDArray[np.int64]:
    return overlaps.rows_P * overlaps.area_M.size + overlaps.columns_P


def _band(panoptic: PanopticMap, reach: int) -> NDArray[np.uint16]:
    """Labels in the bands of `reach` pixels; UNKNOWN, which no table has, in the rest of segments; void stays void."""
    labels_HW = to_labels(panoptic)
    framed_HW = np.pad(labels_HW, 1, constant_values=_OUTSIDE)
    radius = min(reach, MAX_RADIUS)
    d2_HW = squared_distance(framed_HW, _EACH, radius)[1:-1, 1:-1]
    near_HW = d2_HW <= (radius - 1) ** 2  # distance 0 is the first pixel of the band
    return np.where(near_HW | (labels_HW == 0), labels_HW, np.uint16(UNKNOWN))


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
    found, c = score.confusion, score.confusion.categories
    of_true_C = np.bincount(found.true_K, found.pixels_K, c)
    of_predicted_C = np.bincount(found.predicted_K, found.pixels_K, c + 1)[:-1]
    is_hit_K = found.true_K == found.predicted_K
    hit_C = np.bincount(found.true_K[is_hit_K], found.pixels_K[is_hit_K], c)
    union_C = of_true_C + of_predicted_C - hit_C
    return np.divide(100.0 * hit_C, union_C, out=np.full(len(hit_C), np.nan), where=union_C > 0)
