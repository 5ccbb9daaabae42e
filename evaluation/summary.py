"""One evaluation in figures, ready for JSON: what reports and comparisons show."""

from typing import Any

import numpy as np

from evaluation.bootstrap import Table, image_pq, intervals
from evaluation.evaluate import Scores
from evaluation.measures import SIZES, Score, iou_by_size, semantic_iou, size_names
from evaluation.pq import PQStats, summarise
from preprocessing.labels import LabelTable

_CONFUSIONS = 20


def summary_of(scores: Scores, labels: LabelTable) -> dict[str, Any]:
    """`pq`, `sq`, `rq`, `counts` as pq.summarise gives them, and

    - `intervals`: of PQ of all, things, stuff (bootstrap over images, 95 %)
    - `boundary`: PQ by the lesser of IoU and boundary IoU; `agnostic`: PQ, SQ, RQ of things without classes
    - `semantic`: mIoU of the panoptic map's categories, and by category
    - `sizes`: by square root of the area: instances, their mean best IoU, PQ of segments of that size
    - `confusions`: what most pixels were called that are of another category, as shares of it and of all
    - `images`: PQ by image id

    All in percent; None where there is nothing to measure.
    """
    score, table = scores.score, Table.of(scores.by_image)
    each = zip(table.image_ids, image_pq(table).tolist(), strict=True)
    return {
        **summarise(score.pq, labels),
        "intervals": intervals(table, labels),
        "boundary": _groups(score.boundary, labels),
        "agnostic": _agnostic(score.agnostic),
        "semantic": _semantic(score, labels),
        "sizes": _sizes(score, labels),
        "confusions": _confusions(score, labels),
        "images": {str(i): None if np.isnan(pq) else pq for i, pq in each},
    }


def _groups(stats: PQStats, labels: LabelTable) -> dict[str, Any]:
    pq = summarise(stats, labels)["pq"]
    return {group: pq[group] for group in ("all", "things", "stuff")}


def _agnostic(stats: PQStats) -> dict[str, float | None]:
    tp, iou = int(stats.tp[0]), float(stats.iou[0])
    weight = tp + (int(stats.fp[0]) + int(stats.fn[0])) / 2
    if not weight:
        return {"pq": None, "sq": None, "rq": None}
    return {"pq": 100 * iou / weight, "sq": 100 * iou / tp if tp else 0.0, "rq": 100 * tp / weight}


def _semantic(score: Score, labels: LabelTable) -> dict[str, Any]:
    iou_C = semantic_iou(score)
    known = iou_C[~np.isnan(iou_C)]
    values = [None if np.isnan(v) else v for v in iou_C.tolist()]
    return {"miou": float(known.mean()) if known.size else None, "per_category": values}


def _sizes(score: Score, labels: LabelTable) -> list[dict[str, Any]]:
    pq_S = [_groups(score.sized[s * len(labels) : (s + 1) * len(labels)], labels) for s in range(SIZES)]
    rows = zip(size_names(), score.instances.tolist(), iou_by_size(score), pq_S, strict=True)
    return [{"size": name, "instances": count, "iou": iou, "pq": pq} for name, count, iou, pq in rows]


def _confusions(score: Score, labels: LabelTable) -> list[dict[str, Any]]:
    """Shares of all true pixels, so that what costs most comes first."""
    wrong = score.confusion.copy()
    np.fill_diagonal(wrong, 0)
    total, of_truth = max(1, int(score.confusion.sum())), np.maximum(score.confusion.sum(axis=1), 1)
    names = [*labels.unique_names, "void"]
    found = []
    for place in np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS]:
        true, predicted = np.unravel_index(place, wrong.shape)
        pixels = int(wrong[true, predicted])
        if pixels:
            shares = {"of_truth": 100 * pixels / int(of_truth[true]), "of_all": 100 * pixels / total}
            found.append({"truth": names[true], "predicted": names[predicted], **shares})
    return found
