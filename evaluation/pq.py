"""Panoptic quality: one joint histogram per image, statistics that add up exactly, a summary.

The rules are those of the COCO panoptic API, with one difference: every area is counted from the pixels,
where the API believes the `area` of the ground truth's JSON. Axis letters: H, W rows and columns of a map;
N rows of the ground truth's table, M rows of the prediction's; P pairs of them; C categories (contiguous ids).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evaluation.overlaps import Overlaps, overlaps_of, sums, to_labels
from infra.errors import TesseraError
from infra.records import Count
from preprocessing.kernels import UNKNOWN
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment

# A matched IoU lies in (0.5, 1], where neighbouring float64 are 2^-53 apart: counted in that unit it is an
# integer, and sums of integers lose nothing. Python's integers, because int64 overflows at 1024 matches.
IOU_UNIT = 2**53


Units = Annotated[str, Field(pattern="^[0-9]{1,40}$")]
"""An IoU in JSON: many readers cut integers at 53 or 64 bits."""
SparseStats = dict[Count, tuple[Units, Count, Count, Count]]
"""What PQStats.to_sparse_json gives."""


@dataclass(frozen=True)
class StatsRecord:
    """What PQStats.to_json gives."""

    iou_units: list[Units]
    tp: list[Count]
    fp: list[Count]
    fn: list[Count]


@dataclass(frozen=True, eq=False)
class PQStats:
    """Sums over matched and unmatched segments, per category; `a + b` merges two sets of images.

    Addition gives the same bits whatever the order or split of the images.
    """

    iou_units: NDArray[np.object_]
    """Sum of IoUs in units of 1 / IOU_UNIT: Python int, (C,)."""
    tp: NDArray[np.int64]
    """Matched pairs, (C,)."""
    fp: NDArray[np.int64]
    """Predicted segments without a match that count, (C,)."""
    fn: NDArray[np.int64]
    """Ground-truth segments without a match that count, (C,)."""

    @classmethod
    def zero(cls, categories: int) -> "PQStats":
        """No image: the start of a sum."""
        tp, fp, fn = np.zeros((3, categories), np.int64)
        return cls(np.full(categories, 0, object), tp, fp, fn)

    @classmethod
    def from_json(cls, content: "StatsRecord") -> "PQStats":
        """Inverse of to_json, exact. TesseraError for sums that cannot be."""
        tp, fp, fn = (np.array(counts, np.int64) for counts in (content.tp, content.fp, content.fn))
        units_C = np.array([int(units) for units in content.iou_units], object)
        return cls(units_C, tp, fp, fn)._checked()

    def to_json(self) -> dict[str, list[Any]]:
        """Lists by name. IoU units are strings: many JSON readers cut integers at 53 or 64 bits."""
        counts = {name: getattr(self, name).tolist() for name in ("tp", "fp", "fn")}
        return {"iou_units": [str(units) for units in self.iou_units], **counts}

    def to_sparse_json(self) -> dict[str, list[Any]]:
        """Of one image: [IoU units, tp, fp, fn] by category, without those that do not occur."""
        occurs = np.flatnonzero(self.tp + self.fp + self.fn)
        return {str(c): [str(self.iou_units[c]), *(int(n[c]) for n in (self.tp, self.fp, self.fn))] for c in occurs}

    @classmethod
    def from_sparse_json(cls, rows: "SparseStats", categories: int) -> "PQStats":
        """Inverse of to_sparse_json, exact. TesseraError for other categories, and for sums that cannot be."""
        stats = cls.zero(categories)
        for place, (units, *counts) in rows.items():
            if place >= categories:
                raise TesseraError(f"PQ statistics of category {place} of {categories}")
            stats.iou_units[place] = int(units)
            for array, count in zip((stats.tp, stats.fp, stats.fn), counts, strict=True):
                array[place] = count
        return stats._checked()

    def _checked(self) -> "PQStats":
        """Of each matched pair the IoU is above 0.5 and at most 1."""
        if len({len(self.iou_units), len(self.tp), len(self.fp), len(self.fn)}) > 1:
            raise TesseraError("PQ statistics that are not of as many categories each")
        for units, pairs in zip(self.iou_units, self.tp.tolist(), strict=True):
            if not pairs * IOU_UNIT <= 2 * units <= 2 * pairs * IOU_UNIT:
                raise TesseraError(f"PQ statistics: {pairs} matches cannot have IoUs of {units / IOU_UNIT:g} in all")
        return self

    def equals(self, other: "PQStats") -> bool:
        """Whether all sums are alike."""
        names = ("iou_units", "tp", "fp", "fn")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    @property
    def iou(self) -> NDArray[np.float64]:
        """Sum of the IoUs of matched pairs, the exact sum rounded once: float64, (C,)."""
        return np.array([units / IOU_UNIT for units in self.iou_units], np.float64)

    def __len__(self) -> int:
        return len(self.tp)

    def __getitem__(self, part: slice) -> "PQStats":
        return PQStats(self.iou_units[part], self.tp[part], self.fp[part], self.fn[part])

    def __add__(self, other: "PQStats") -> "PQStats":
        if len(self) != len(other):
            raise TesseraError(f"PQ statistics of {len(self)} and of {len(other)} categories cannot be added")
        iou_units = self.iou_units + other.iou_units
        return PQStats(iou_units, self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)


def compare(truth: PanopticMap, prediction: PanopticMap, categories: int, where: str = "") -> PQStats:
    """Statistics of one image, by the rules of the COCO panoptic API:

    - A pair matches when categories agree, the ground truth is no crowd and IoU > 0.5, where pixels of the
      prediction on void (id 0 of the ground truth) are left out of the union. A match is unique.
    - An unmatched ground-truth segment is a false negative unless crowd, also when it has no pixel.
    - An unmatched predicted segment is a false positive unless over half of it lies on void plus crowd of
      its category. Of several crowds of a category only the last of the table counts, as in the API.
    - Ground-truth ids that are not in its table are neither segments nor void: they stay in the union.

    `where` names the image in errors. Raises TesseraError as `pixel_counts` does.
    """
    overlaps = pixel_counts(truth, prediction, categories, where)
    category_N, category_M = categories_of(truth.segments), categories_of(prediction.segments)
    found = match(overlaps, overlaps.iou_P, category_N, category_M, crowds_of(truth.segments))
    return tally(found, category_N, category_M, categories)


def pixel_counts(truth: PanopticMap, prediction: PanopticMap, categories: int, where: str = "") -> Overlaps:
    """How two maps of one image overlap.

    Raises TesseraError, naming `where`, for maps of different size, ids that are 0 or listed twice, more segments than
    labels, a category outside 0..categories - 1, and a predicted id found only in the pixels or only in the table.
    """
    prefix = f"{where}: " if where else ""
    if truth.size != prediction.size:
        sizes = " and ".join(f"{width}x{height}" for height, width in (truth.size, prediction.size))
        raise TesseraError(f"{prefix}ground truth and prediction differ in size: {sizes}")
    _check_table(truth.segments, categories, f"{prefix}ground truth")
    _check_table(prediction.segments, categories, f"{prefix}prediction")
    maps = to_labels(truth), to_labels(prediction)
    overlaps = overlaps_of(*maps, len(truth.segments), len(prediction.segments))
    _check_pixels(prediction, overlaps, f"{prefix}prediction")
    return overlaps


def categories_of(segments: Sequence[Segment]) -> NDArray[np.int64]:
    """Contiguous ids, (N,)."""
    return np.array([segment.category for segment in segments], np.int64)


def crowds_of(segments: Sequence[Segment]) -> NDArray[np.bool_]:
    """Which are crowds, (N,)."""
    return np.array([segment.is_crowd for segment in segments], bool)


def _check_table(segments: Sequence[Segment], categories: int, what: str) -> None:
    if len(segments) >= UNKNOWN:
        raise TesseraError(f"{what}: {len(segments)} segments in one image; at most {UNKNOWN - 1} fit")
    for id_, times in Counter(segment.id for segment in segments).items():
        if id_ <= 0 or times > 1:
            raise TesseraError(f"{what}: segment id {id_} is listed {times}x; ids are unique and positive")
    for segment in segments:
        if not 0 <= segment.category < categories:
            raise TesseraError(f"{what}: segment {segment.id} has category {segment.category} of {categories}")


def _check_pixels(panoptic: PanopticMap, overlaps: Overlaps, what: str) -> None:
    """Refuse ids in the pixels only or in the table only."""
    listed = [segment.id for segment in panoptic.segments]
    if overlaps.unlisted:
        ids, areas = np.unique(panoptic.ids[~np.isin(panoptic.ids, [0, *listed])], return_counts=True)
        raise TesseraError(f"{what}: segment {ids[0]} covers {areas[0]} px but is not in the table")
    for id_, area in zip(listed, overlaps.area_M, strict=True):
        if area == 0:
            raise TesseraError(f"{what}: segment {id_} is in the table but covers 0 px")


@dataclass(frozen=True)
class Matches:
    """Which segments of two maps are one another, and which are nobody's; rows and columns count from 0."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    iou: NDArray[np.float64]
    """Of each matched pair."""
    missed: NDArray[np.bool_]
    """Ground-truth segments that are false negatives, (N,)."""
    false: NDArray[np.bool_]
    """Predicted segments that are false positives, (M,)."""


def match(
    overlaps: Overlaps,
    iou_P: NDArray[np.float64],
    category_N: NDArray[np.int64],
    category_M: NDArray[np.int64],
    crowd_N: NDArray[np.bool_],
) -> Matches:
    """The rules of `compare`. A category of -1 belongs to a segment that neither matches nor is missed or false."""
    rows_P, columns_P = overlaps.rows_P, overlaps.columns_P
    counts_N = ~crowd_N & (category_N >= 0)
    match_P = (category_N[rows_P] == category_M[columns_P]) & counts_N[rows_P] & (iou_P > 0.5)
    rows, columns = rows_P[match_P], columns_P[match_P]
    excused_M = 2 * (overlaps.void_M + _on_crowd(overlaps, category_N, category_M, crowd_N)) > overlaps.area_M
    missed_N, false_M = counts_N.copy(), ~excused_M & (category_M >= 0)
    missed_N[rows], false_M[columns] = False, False
    return Matches(rows, columns, iou_P[match_P], missed_N, false_M)


def tally(found: Matches, slot_N: NDArray[np.int64], slot_M: NDArray[np.int64], slots: int) -> PQStats:
    """Add matches up by slot: a match and a missed segment count in that of the truth, a false one in its own."""
    iou_units = np.full(slots, 0, object)
    for slot, iou in zip(slot_N[found.rows].tolist(), found.iou.tolist(), strict=True):
        iou_units[slot] += int(iou * IOU_UNIT)
    rows = (slot_N[found.rows], slot_M[found.false], slot_N[found.missed])
    return PQStats(iou_units, *(np.bincount(slot, minlength=slots) for slot in rows))


def _on_crowd(
    overlaps: Overlaps, category_N: NDArray[np.int64], category_M: NDArray[np.int64], crowd_N: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Pixels of each predicted segment on the last crowd of its category; int64 (M,)."""
    last = {int(category_N[row]): row for row in np.flatnonzero(crowd_N)}
    crowd_M = np.array([last.get(category, -1) for category in category_M.tolist()], np.int64)
    on_it = overlaps.rows_P == crowd_M[overlaps.columns_P]
    return sums(overlaps.columns_P[on_it], overlaps.pixels_P[on_it], category_M.size)


def summarise(stats: PQStats, labels: LabelTable) -> dict[str, Any]:
    """PQ, SQ and RQ in percent (0 to 100, as papers print them), ready for JSON.

    `pq`, `sq`, `rq` each hold `all`, `things`, `stuff` (means over the categories that occur, that is with
    tp + fp + fn > 0; None if there is none) and `per_category` (by name; None where it does not occur).
    `counts` holds under the same keys the sums tp, fp, fn, for groups also the categories that occur. The
    names are LabelTable.unique_names. Raises TesseraError when `labels` has another number of categories.
    """
    if len(stats) != len(labels):
        raise TesseraError(f"PQ statistics of {len(stats)} categories, but the label table has {len(labels)}")
    weight_C = stats.tp + (stats.fp + stats.fn) / 2
    occurs_C = weight_C > 0
    groups = {"all": occurs_C, "things": occurs_C & labels.is_thing, "stuff": occurs_C & ~labels.is_thing}
    names = labels.unique_names
    counts = {group: {"categories": int(in_C.sum()), **_counts(stats, in_C)} for group, in_C in groups.items()}
    return {
        "pq": _averages(_percent(stats.iou, weight_C), groups, names),
        "sq": _averages(_percent(stats.iou, stats.tp), groups, names),
        "rq": _averages(_percent(stats.tp, weight_C), groups, names),
        "counts": {**counts, "per_category": {name: _counts(stats, c) for c, name in enumerate(names)}},
    }


def _averages(
    value_C: NDArray[np.float64], groups: Mapping[str, NDArray[np.bool_]], names: Sequence[str]
) -> dict[str, Any]:
    means = {group: float(value_C[in_C].mean()) if in_C.any() else None for group, in_C in groups.items()}
    each = zip(names, value_C.tolist(), groups["all"].tolist(), strict=True)
    return {**means, "per_category": {name: value if occurs else None for name, value, occurs in each}}


def _percent(part_C: NDArray[Any], whole_C: NDArray[Any]) -> NDArray[np.float64]:
    return np.divide(100 * part_C, whole_C, out=np.zeros(len(part_C)), where=whole_C > 0)


def _counts(stats: PQStats, chosen: NDArray[np.bool_] | int) -> dict[str, int]:
    return {name: int(getattr(stats, name)[chosen].sum()) for name in ("tp", "fp", "fn")}
