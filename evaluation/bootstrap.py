"""How far PQ would move with other images of the same kind: percentile bootstrap over images."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.pq import PQStats
from infra.errors import TesseraError
from preprocessing.labels import LabelTable

RESAMPLES = 1000
COVERAGE = 0.95
Interval = tuple[float, float]
"""Percent; the middle 95 % of the resamples."""


@dataclass(frozen=True)
class Table:
    """Statistics by image, in ascending order of their ids."""

    image_ids: tuple[int, ...]
    sums_4IC: NDArray[np.float64]
    """IoU, tp, fp, fn of I images and C categories."""

    @classmethod
    def of(cls, by_image: Mapping[int, PQStats]) -> "Table":
        """TesseraError if there is no image."""
        if not by_image:
            raise TesseraError("bootstrap: no image to resample")
        stats = [by_image[i] for i in sorted(by_image)]
        sums = [np.stack([np.asarray(getattr(s, name), float) for s in stats]) for name in ("iou", "tp", "fp", "fn")]
        return cls(tuple(sorted(by_image)), np.stack(sums))


def intervals(table: Table, labels: LabelTable, seed: int = 0) -> dict[str, Interval | None]:
    """Of PQ of `all`, `things`, `stuff`: each resample draws as many images as there are, with repetition.

    None for a group that does not occur. The same seed gives the same draws, whatever the run.
    """
    return {group: _middle(values) for group, values in _resampled(table, labels, seed).items()}


def difference_intervals(first: Table, second: Table, labels: LabelTable, seed: int = 0) -> dict[str, Interval | None]:
    """Of PQ of `second` minus PQ of `first` on the same images, drawn alike for both: chance that both share cancels.

    Raises TesseraError if they are not of the same images.
    """
    if first.image_ids != second.image_ids:
        raise TesseraError("bootstrap: the two evaluations are not of the same images")
    one, two = (_resampled(table, labels, seed) for table in (first, second))
    return {group: _middle(two[group] - one[group]) for group in one}


def image_pq(table: Table) -> NDArray[np.float64]:
    """PQ of each image by itself, percent, (I,); NaN where it has neither truth nor prediction."""
    iou_IC, tp_IC, fp_IC, fn_IC = table.sums_4IC
    return _mean_pq(iou_IC, tp_IC + (fp_IC + fn_IC) / 2)


def _resampled(table: Table, labels: LabelTable, seed: int) -> dict[str, NDArray[np.float64]]:
    """PQ by group, percent, (R,); NaN in resamples where the group does not occur."""
    images = len(table.image_ids)
    draws_RI = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), RESAMPLES).astype(float)
    iou_RC, tp_RC, fp_RC, fn_RC = draws_RI @ table.sums_4IC
    weight_RC = tp_RC + (fp_RC + fn_RC) / 2
    groups = {"all": np.ones(len(labels), bool), "things": labels.is_thing, "stuff": ~labels.is_thing}
    return {group: _mean_pq(iou_RC[:, in_C], weight_RC[:, in_C]) for group, in_C in groups.items()}


def _mean_pq(iou_RC: NDArray[np.float64], weight_RC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the categories that occur, percent, (R,)."""
    pq_RC = np.divide(100 * iou_RC, weight_RC, out=np.zeros_like(iou_RC), where=weight_RC > 0)
    occur_R = (weight_RC > 0).sum(axis=1)
    return np.divide(pq_RC.sum(axis=1), occur_R, out=np.full(len(pq_RC), np.nan), where=occur_R > 0)


def _middle(values_R: NDArray[np.float64]) -> Interval | None:
    known = values_R[~np.isnan(values_R)]
    if not known.size:
        return None
    low, high = np.quantile(known, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)
