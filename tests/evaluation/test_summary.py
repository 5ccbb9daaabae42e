"""The figures of one evaluation: what they are, and that there are none of what cannot be measured."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.bootstrap import Table, intervals
from evaluation.evaluate import Scores
from evaluation.measures import SIZES, Score, iou_by_size, measure_image, semantic_iou, size_names
from evaluation.pq import PQStats, summarise
from evaluation.summary import summary_of
from infra.errors import TesseraError
from preprocessing.labels import Category, LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment
from tests.evaluation.test_measures import dense
from tests.evaluation.test_pq_truth import LABELS, random_pair

GROUPS = ["all", "things", "stuff"]
KEYS = ["pq", "sq", "rq", "counts", "intervals", "boundary", "agnostic", "semantic", "sizes", "confusions"]
KEYS += ["oracle", "images"]


def scores_of(pairs, labels=LABELS):
    """Image ids count from 10."""
    each = {i: measure_image(*pair, labels) for i, pair in enumerate(pairs, start=10)}
    total = sum(each.values(), Score.zero(len(labels)))
    return Scores(total, {i: score.pq for i, score in each.items()}, ())


def random_scores(seed, images):
    rng = np.random.default_rng(seed)
    return scores_of([random_pair(rng) for _ in range(images)])


def table(*things):
    """Categories c0, c1 and so on."""
    return LabelTable(tuple(Category(i + 1, f"c{i}", thing, (0, 0, 0)) for i, thing in enumerate(things)))


def drawn(ids, *categories):
    """A map whose id i has the i-th category."""
    return PanopticMap(np.array(ids, np.int32), tuple(Segment(i, c, True) for i, c in enumerate(categories, start=1)))


def leaves(value):
    """All values without a value inside."""
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


def plain(summary):
    """Through strict JSON: no default for odd types, no NaN; tuples become lists."""
    return json.loads(json.dumps(summary, allow_nan=False))


RANDOM = given(st.integers(0, 2**32 - 1), st.integers(1, 6))


@settings(max_examples=40, deadline=None)
@RANDOM
def test_a_summary_is_json_of_finite_numbers_texts_and_nothing(seed, images):
    summary = summary_of(random_scores(seed, images), LABELS)
    assert list(plain(summary)) == KEYS
    for value in leaves(summary):
        assert value is None or type(value) in (str, int, float)
        assert not isinstance(value, float) or (math.isfinite(value) and 0 <= value <= 100 + 1e-9)


@settings(max_examples=40, deadline=None)
@RANDOM
def test_each_part_is_what_its_own_measure_says(seed, images):
    scores = random_scores(seed, images)
    summary, score = summary_of(scores, LABELS), scores.score
    assert {key: summary[key] for key in KEYS[:4]} == summarise(score.pq, LABELS)
    assert summary["intervals"] == intervals(Table.of(scores.by_image), LABELS)
    boundary = summarise(score.boundary, LABELS)["pq"]
    assert summary["boundary"] == {group: boundary[group] for group in GROUPS}
    known = [value for value in semantic_iou(score) if not np.isnan(value)]
    assert [value for value in summary["semantic"]["per_category"] if value is not None] == known
    assert summary["semantic"]["miou"] == (pytest.approx(np.mean(known)) if known else None)
    assert list(summary["images"]) == [str(i) for i in range(10, 10 + images)]
    for image, pq in summary["images"].items():
        expected = summarise(scores.by_image[int(image)], LABELS)["pq"]["all"]
        assert pq == (expected if expected is None else pytest.approx(expected))


@settings(max_examples=40, deadline=None)
@RANDOM
def test_sizes_add_up_to_all_instances_and_agnostic_is_a_pq(seed, images):
    scores = random_scores(seed, images)
    summary, score = summary_of(scores, LABELS), scores.score
    assert [row["size"] for row in summary["sizes"]] == size_names()
    assert sum(row["instances"] for row in summary["sizes"]) == score.instances.sum()
    assert [row["iou"] for row in summary["sizes"]] == iou_by_size(score)
    assert all((row["iou"] is None) == (row["instances"] == 0) for row in summary["sizes"])
    assert all(list(row["pq"]) == GROUPS for row in summary["sizes"])
    one = summarise(score.agnostic, table(True))
    assert summary["agnostic"] == {
        m: None if one[m]["all"] is None else pytest.approx(one[m]["all"]) for m in ("pq", "sq", "rq")
    }


@settings(max_examples=40, deadline=None)
@RANDOM
def test_confusions_come_with_the_most_pixels_first_and_none_is_missing(seed, images):
    scores = random_scores(seed, images)
    found, confusion = summary_of(scores, LABELS)["confusions"], dense(scores.score.confusion)
    names = [*LABELS.names, "void"]
    wrong = {
        (names[t], names[p]): confusion[t, p] for t, p in np.argwhere(confusion).tolist() if t != p
    }  # 9 at most, so all are shown
    assert [row["of_all"] for row in found] == sorted((row["of_all"] for row in found), reverse=True)
    assert {(row["truth"], row["predicted"]): row["of_all"] for row in found} == {
        pair: pytest.approx(100 * pixels / confusion.sum()) for pair, pixels in wrong.items()
    }
    of_truth = {name: confusion[c].sum() for c, name in enumerate(LABELS.names)}
    for row in found:
        assert row["of_truth"] == pytest.approx(100 * wrong[row["truth"], row["predicted"]] / of_truth[row["truth"]])


def test_only_the_20_largest_confusions_are_shown():
    """Category 0 is taken for each of 30 others, over ever more pixels."""
    labels = table(*[True] * 31)
    ids = np.repeat(np.arange(1, 31), np.arange(1, 31))[None]
    truth = drawn(np.ones_like(ids), 0)
    found = summary_of(scores_of([(truth, drawn(ids, *range(1, 31)))], labels), labels)["confusions"]
    assert [row["predicted"] for row in found] == [f"c{c}" for c in range(30, 10, -1)]
    assert {row["truth"] for row in found} == {"c0"}


def test_a_perfect_evaluation_has_no_confusion():
    truth = drawn([[1, 1, 2, 0]], 0, 2)
    summary = summary_of(scores_of([(truth, truth)]), LABELS)
    assert summary["confusions"] == []
    assert [summary["pq"][group] for group in GROUPS] == [100] * 3
    assert summary["boundary"] == dict.fromkeys(GROUPS, 100)
    assert summary["agnostic"] == {"pq": 100, "sq": 100, "rq": 100}
    assert summary["semantic"] == {"miou": 100, "per_category": [100, None, 100]}
    assert summary["images"] == {"10": 100}
    assert summary["intervals"] == dict.fromkeys(GROUPS, (100, 100))


def test_without_stuff_there_are_no_figures_of_it():
    labels, truth = table(True, True), drawn([[1, 1, 2, 2]], 0, 1)
    summary = plain(summary_of(scores_of([(truth, truth)], labels), labels))
    for part in ("pq", "sq", "rq", "intervals", "boundary"):
        assert summary[part]["stuff"] is None
        assert summary[part]["things"] == summary[part]["all"] is not None
    assert all(row["pq"]["stuff"] is None for row in summary["sizes"])


def test_without_things_there_are_no_instances():
    labels, truth = table(False), drawn([[1, 1, 0]], 0)
    summary = plain(summary_of(scores_of([(truth, truth)], labels), labels))
    for part in ("pq", "sq", "rq", "intervals", "boundary"):
        assert summary[part]["things"] is None
    assert summary["agnostic"] == {"pq": None, "sq": None, "rq": None}
    assert [(row["instances"], row["iou"]) for row in summary["sizes"]] == [(0, None)] * SIZES
    assert summary["pq"]["stuff"] == 100


@pytest.mark.parametrize("images", [1, 3])
def test_images_of_void_only_have_no_figures_at_all(images):
    void = drawn([[0, 0]])
    summary = plain(summary_of(scores_of([(void, void)] * images), LABELS))
    nothing = dict.fromkeys(GROUPS)
    assert summary["intervals"] == summary["boundary"] == nothing
    for metric in ("pq", "sq", "rq"):
        assert {group: summary[metric][group] for group in GROUPS} == nothing
        assert summary["agnostic"][metric] is None
    assert summary["semantic"] == {"miou": None, "per_category": [None] * 3}
    assert summary["confusions"] == []
    assert list(summary["images"].values()) == [None] * images
    assert [row["pq"] for row in summary["sizes"]] == [nothing] * SIZES


def test_nothing_found_scores_0_not_nothing():
    truth, nothing = drawn([[1, 1, 2, 2]], 0, 2), drawn([[0, 0, 0, 0]])
    summary = plain(summary_of(scores_of([(truth, nothing)]), LABELS))
    assert [summary["pq"][group] for group in GROUPS] == [0] * 3
    assert summary["agnostic"] == {"pq": 0, "sq": 0, "rq": 0}
    assert (summary["images"], summary["semantic"]["miou"]) == ({"10": 0}, 0)
    assert (summary["sizes"][0]["instances"], summary["sizes"][0]["iou"]) == (1, 0)
    assert summary["confusions"] == [
        {"truth": name, "predicted": "void", "of_truth": 100, "of_all": 50} for name in ("c3", "c7")
    ]


def test_an_evaluation_without_images_is_refused():
    with pytest.raises(TesseraError, match="no image"):
        summary_of(Scores(Score.zero(3), {}, ()), LABELS)


def test_another_label_table_is_refused():
    with pytest.raises(TesseraError, match="of 3 categories, but the label table has 2"):
        summary_of(Scores(Score.zero(3), {1: PQStats.zero(3)}, ()), table(True, False))
