"""One evaluation in figures, ready for JSON: what reports and comparisons show."""

from collections.abc import Iterator, Mapping
from typing import Any, NotRequired, cast

import numpy as np
from typing_extensions import TypedDict

from evaluation.bootstrap import Table, image_pq, intervals
from evaluation.evaluate import Scores
from evaluation.measures import SIZES, Score, iou_by_size, semantic_iou, size_names
from evaluation.pq import PQStats, summarise
from infra import records
from infra.errors import TesseraError
from infra.records import Count, Percent
from infra.store import Store
from preprocessing.labels import LabelTable

_CONFUSIONS = 20
_Figure = Percent | None


class _Groups(TypedDict):
    all: _Figure
    things: _Figure
    stuff: _Figure


class _Measure(_Groups):
    per_category: dict[str, _Figure]


class _Counts(TypedDict):
    tp: Count
    fp: Count
    fn: Count


class _GroupCounts(_Counts):
    categories: Count


class _AllCounts(TypedDict):
    all: _GroupCounts
    things: _GroupCounts
    stuff: _GroupCounts
    per_category: dict[str, _Counts]


class _Intervals(TypedDict):
    all: tuple[Percent, Percent] | None
    things: tuple[Percent, Percent] | None
    stuff: tuple[Percent, Percent] | None


class _Agnostic(TypedDict):
    pq: _Figure
    sq: _Figure
    rq: _Figure


class _Semantic(TypedDict):
    miou: _Figure
    per_category: list[_Figure]


class _Size(TypedDict):
    size: str
    instances: Count
    iou: _Figure
    pq: _Groups


class _Confusion(TypedDict):
    truth: str
    predicted: str
    of_truth: Percent
    of_all: Percent


class _Oracle(TypedDict):
    images: Count
    pq: _Groups


class _Summary(TypedDict):
    pq: _Measure
    sq: _Measure
    rq: _Measure
    counts: _AllCounts
    intervals: _Intervals
    boundary: _Groups
    agnostic: _Agnostic
    semantic: _Semantic
    sizes: list[_Size]
    confusions: list[_Confusion]
    oracle: NotRequired[_Oracle | None]
    images: dict[int, _Figure]


def read_summary(store: Store, path: str) -> dict[str, Any]:
    """What `summary_of` gave, as the evaluation at `path` has it. TesseraError, naming its URL, for anything else."""
    key = f"{path}/report.json"
    found = records.read(store, key, _Summary)
    names = [*found["pq"]["per_category"]]
    others = [[*found["sq"]["per_category"]], [*found["rq"]["per_category"]], [*found["counts"]["per_category"]]]
    sizes = [row["size"] for row in found["sizes"]]
    if any(other != names for other in others) or len(found["semantic"]["per_category"]) != len(names):
        raise TesseraError(f"{store.url_for(key)}: its figures are not all of the same categories")
    if sizes != size_names():
        raise TesseraError(f"{store.url_for(key)}: its sizes are {sizes}, expected {size_names()}")
    return cast(dict[str, Any], found | {"images": {str(i): pq for i, pq in found["images"].items()}})


def fits(summary: dict[str, Any], by_image: Mapping[int, PQStats], labels: LabelTable) -> bool:
    """Whether a summary's PQ, SQ, RQ, counts and images are those of these statistics, to rounding."""
    table = Table.of(by_image)
    images = dict(zip(map(str, table.image_ids), image_pq(table).tolist(), strict=True))
    counted = summarise(sum(by_image.values(), PQStats.zero(len(labels))), labels) | {"images": images}
    if summary["images"].keys() != images.keys():
        return False
    ours, theirs = (np.array([*_figures(one)], float) for one in (counted, summary))  # None is NaN
    return len(ours) == len(theirs) and np.allclose(ours, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)


def _figures(summary: Mapping[str, Any]) -> Iterator[float | None]:
    groups = ("all", "things", "stuff")
    for measure in (summary["pq"], summary["sq"], summary["rq"]):
        yield from (measure[group] for group in groups)
        yield from measure["per_category"].values()
    counts = summary["counts"]
    yield from (counts[group]["categories"] for group in groups)
    for row in (*(counts[group] for group in groups), *counts["per_category"].values()):
        yield from (row["tp"], row["fp"], row["fn"])
    yield from (summary["images"][i] for i in sorted(summary["images"], key=int))


def summary_of(scores: Scores, labels: LabelTable) -> dict[str, Any]:
    """`pq`, `sq`, `rq`, `counts` as pq.summarise gives them, and

    - `intervals`: of PQ of all, things, stuff (bootstrap over images, 95 %)
    - `boundary`: PQ by the lesser of IoU and boundary IoU; `agnostic`: PQ, SQ, RQ of things without classes
    - `semantic`: mIoU of the panoptic map's categories, and by category
    - `sizes`: by square root of the area: instances, their mean best IoU, PQ of segments of that size
    - `confusions`: what most pixels were called that are of another category, as shares of it and of all
    - `oracle`: what a perfect network's outputs decode to with these options, on some images; see evaluation.oracle
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
        "oracle": scores.oracle,
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
    sums = score.confusion
    total, of_truth = max(1, int(sums.pixels_K.sum())), np.bincount(sums.true_K, sums.pixels_K, sums.categories)
    names = [*labels.unique_names, "void"]
    wrong = np.flatnonzero(sums.true_K != sums.predicted_K)
    found = []
    for at in wrong[np.argsort(-sums.pixels_K[wrong], kind="stable")[:_CONFUSIONS]]:
        true, predicted, pixels = int(sums.true_K[at]), int(sums.predicted_K[at]), int(sums.pixels_K[at])
        shares = {"of_truth": 100 * pixels / int(of_truth[true]), "of_all": 100 * pixels / total}
        found.append({"truth": names[true], "predicted": names[predicted], **shares})
    return found
