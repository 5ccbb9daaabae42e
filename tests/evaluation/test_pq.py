"""PQ: each rule on a map small enough to check by eye, exact merging, the summary, every error."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import overlaps
from evaluation.pq import IOU_UNIT, PQStats, StatsRecord, compare, summarise
from infra import records
from infra.errors import TesseraError
from preprocessing.labels import Category, LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment
from tests.support.hostile import little_memory


def listed(ids, category=0, crowd=False):
    """A map whose table lists every id, all of one category."""
    ids = np.array(ids, np.int32)
    return PanopticMap(ids, tuple(Segment(int(i), category, True, crowd) for i in np.unique(ids) if i))


def same(a, b):
    return a.to_json() == b.to_json() and a.iou.tobytes() == b.iou.tobytes()


def test_ids_and_memory_layout_do_not_matter():
    rng = np.random.default_rng(5)
    lut = np.r_[0, 1 + rng.choice(2**24 - 1, 12, replace=False)]
    truth = rng.integers(0, 13, (5, 4)).repeat(4, 0).repeat(4, 1)
    prediction = np.roll(truth, 1, 0)
    expected = compare(listed(truth), listed(prediction), 1)
    assert expected.tp[0] > 3
    assert same(expected, compare(listed(lut[truth]), listed(lut[prediction]), 1))
    strided = [PanopticMap(listed(m).ids.T, listed(m).segments) for m in (truth, prediction)]
    assert same(expected, compare(*strided, 1))


@pytest.mark.parametrize(
    ("truth", "prediction", "iou", "counts"),
    [
        pytest.param([[1, 1, 1, 1]], [[5, 5, 0, 0]], 0, (0, 1, 1), id="IoU of one half is no match"),
        pytest.param([[1, 1, 1, 1]], [[5, 5, 5, 0]], 0.75, (1, 0, 0), id="predicted void stays in the union"),
        pytest.param([[1, 1, 0, 0]], [[5, 5, 5, 5]], 1, (1, 0, 0), id="true void leaves the union"),
        pytest.param([[1, 0, 0, 0]], [[0, 5, 5, 5]], 0, (0, 0, 1), id="a prediction on void is excused"),
        pytest.param([[1, 1, 0, 0]], [[5, 0, 5, 0]], 0, (0, 1, 1), id="half on void is not over half"),
        pytest.param([[0, 0]], [[0, 0]], 0, (0, 0, 0), id="only void"),
    ],
)
def test_rule(truth, prediction, iou, counts):
    stats = compare(listed(truth), listed(prediction), 1)
    assert (stats.iou[0], (stats.tp[0], stats.fp[0], stats.fn[0])) == (iou, counts)


def test_unlisted_truth_id_is_neither_segment_nor_void():
    truth = PanopticMap(np.array([[1, 1, 9, 9]], np.int32), (Segment(1, 0, True),))
    stats = compare(truth, listed([[5, 5, 5, 6]]), 1)
    assert (stats.iou[0], stats.tp[0], stats.fp[0], stats.fn[0]) == (2 / 3, 1, 1, 0)


def test_truth_row_without_pixels_is_missed_unless_crowd():
    rows = Segment(1, 0, True), Segment(2, 0, True, is_crowd=True)
    assert compare(PanopticMap(np.zeros((1, 1), np.int32), rows), listed([[0]]), 1).fn[0] == 1


@pytest.mark.parametrize(("last", "false_positives"), [(1, 0), (2, 1)])
def test_only_the_last_crowd_of_a_category_excuses(last, false_positives):
    crowds = {i: Segment(i, 0, True, is_crowd=True) for i in (1, 2)}
    truth = PanopticMap(np.array([[1, 1, 1, 2]], np.int32), (crowds[3 - last], crowds[last]))
    assert compare(truth, listed([[5, 5, 5, 0]]), 1).fp[0] == false_positives


def random_stats(rng, categories=3):
    """Of one image with up to 40 matches per category."""
    ious = [[1 - rng.random() / 2 for _ in range(rng.integers(40))] for _ in range(categories)]
    units = np.array([sum(int(iou * IOU_UNIT) for iou in row) for row in ious], object)
    return PQStats(units, np.array([len(row) for row in ious]), *rng.integers(0, 9, (2, categories)))


EXAMPLES = [random_stats(np.random.default_rng(seed)) for seed in range(12)]


def merged(stats):
    return sum(stats, PQStats.zero(3))


@given(st.permutations(EXAMPLES), st.lists(st.integers(0, len(EXAMPLES)), max_size=5))
def test_any_order_and_split_gives_the_same_bits(stats, cuts):
    parts = [merged(stats[a:b]) for a, b in pairwise([0, *sorted(cuts), len(stats)])]
    assert same(merged(parts), merged(EXAMPLES))


def test_the_iou_sum_is_exact():
    """Also past the 1023 matches where int64 would overflow, in one image or in many."""
    dense = listed(np.arange(1, 1101).reshape(11, 100))
    assert compare(dense, dense, 1).iou[0] == 1100
    truth = np.arange(1, 41).repeat(40).reshape(40, 40)
    prediction = np.where(np.arange(40) < np.arange(21, 61)[:, None], truth, 0)
    stats = [compare(listed(truth), listed(prediction), 1)] * 50
    ious = [min(width, 40) / 40 for width in range(21, 61)] * 50
    total = sum(stats, PQStats.zero(1))
    assert total.tp[0] == 2000
    assert total.iou[0] == math.fsum(ious)


def test_json_round_trip_is_exact():
    stats = merged(EXAMPLES * 500)
    assert same(PQStats.from_json(records.restore(StatsRecord, stats.to_json(), "sums")), stats)
    assert max(stats.iou_units) > 2**63


def test_statistics_of_other_categories_do_not_add():
    with pytest.raises(TesseraError, match="of 1 and of 2 categories"):
        PQStats.zero(1) + PQStats.zero(2)


def test_summary_is_in_percent_with_nothing_for_what_does_not_occur():
    labels = LabelTable(tuple(Category(i, name, i < 3, (0, 0, 0)) for i, name in enumerate("ABBC")))
    truth, prediction = [[1, 1, 1, 2]], [[5, 5, 0, 6]]
    first = compare(listed(truth), listed(prediction), 4)
    second = compare(listed([[1]], 1), listed([[0]], 1), 4)
    summary = summarise(first + second, labels)
    assert summary["pq"]["per_category"] == {
        "A": pytest.approx(250 / 3),
        "B (1)": 0,
        "B (2)": None,
        "C": None,
    }
    assert summary["pq"]["all"] == summary["pq"]["things"] == pytest.approx(125 / 3)
    assert (summary["rq"]["all"], summary["sq"]["stuff"]) == (50, None)
    assert summary["counts"]["stuff"] == {"categories": 0, "tp": 0, "fp": 0, "fn": 0}
    assert summary["counts"]["all"] == {"categories": 2, "tp": 2, "fp": 0, "fn": 1}
    assert summary["counts"]["per_category"]["B (1)"] == {"tp": 0, "fp": 0, "fn": 1}
    assert json.loads(json.dumps(summary)) == summary


def test_summary_refuses_another_label_table():
    labels = LabelTable(tuple(Category(i, str(i), True, (0, 0, 0)) for i in range(3)))
    with pytest.raises(TesseraError, match="of 2 categories, but the label table has 3"):
        summarise(PQStats.zero(2), labels)


ROW = Segment(7, 0, True)


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        ([[7, 7]], ([[7], [7]], [ROW]), "ground truth and prediction differ in size: 2x1 and 1x2"),
        ([[7, 7]], ([[7, 8]], [ROW]), "prediction: segment 8 covers 1 px but is not in the table"),
        ([[7, 7]], ([[-4, -4]], []), "prediction: segment -4 covers 2 px but is not in the table"),
        ([[7, 7]], ([[7, 0]], [ROW, Segment(9, 0, True)]), "segment 9 is in the table but covers 0 px"),
        ([[7, 7]], ([[7, 7]], [Segment(7, 3, True)]), "prediction: segment 7 has category 3 of 3"),
        ([[7, 7]], ([[7, 7]], [Segment(7, -1, True)]), "prediction: segment 7 has category -1 of 3"),
        ([[7, 7]], ([[7, 7]], [ROW, ROW]), "prediction: segment id 7 is listed 2x"),
        ([[7, 7]], ([[0, 7]], [Segment(0, 0, True), ROW]), "prediction: segment id 0 is listed 1x"),
    ],
)
def test_bad_prediction_is_refused(truth, prediction, message):
    ids, rows = prediction
    with pytest.raises(TesseraError) as error:
        compare(listed(truth), PanopticMap(np.array(ids, np.int32), tuple(rows)), 3, where="img 5")
    assert str(error.value).startswith("img 5: ")
    assert message in str(error.value)


@pytest.mark.parametrize("rows", [[Segment(7, 3, True)], [ROW, ROW], [Segment(0, 0, True)]])
def test_bad_ground_truth_is_refused(rows):
    truth = PanopticMap(np.array([[7]], np.int32), tuple(rows))
    with pytest.raises(TesseraError, match=r"^ground truth: segment"):
        compare(truth, listed([[7]]), 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_many_segments_are_counted_by_their_runs_with_the_same_result(seed):
    """Pairs beyond the table of all pairs, and in several parts, against that table."""
    rng = np.random.default_rng(seed)
    truth, prediction = (rng.integers(0, 12, (9, 50)).astype(np.uint16).repeat(3, 1) for _ in range(2))
    rows = [int(n) for n in rng.integers(0, 12, 2)]
    whole = overlaps.overlaps_of(truth, prediction, *rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlaps, "_DENSE", 0)
        patch.setattr(overlaps, "_AT_ONCE", 100)
        parts = overlaps.overlaps_of(truth, prediction, *rows)
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(parts, name), value)


def test_as_many_segments_as_fit_take_memory_by_what_overlaps():
    """65,000 by 65,000: a table of all pairs would have 34 GB."""
    ids = (np.arange(65_000, dtype=np.int32) + 1).reshape(100, 650).repeat(2, 1)
    table = tuple(Segment(int(i), 0, True) for i in range(1, 65_001))
    with little_memory():
        found = compare(PanopticMap(ids, table), PanopticMap(np.roll(ids, 1, 1), table), 1)
    assert (int(found.tp[0]), int(found.fp[0]), int(found.fn[0])) == (0, 65_000, 65_000)
