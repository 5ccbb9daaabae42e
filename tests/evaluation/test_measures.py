"""What evaluation measures of an image, against boolean masks and loops; sums that merge exactly."""

import math
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion, distance_transform_edt

from evaluation.measures import (
    SIZE_EDGES,
    SIZES,
    Score,
    ScoreRecord,
    boundary_ious,
    iou_by_size,
    measure_image,
    semantic_iou,
    size_names,
)
from evaluation.pq import IOU_UNIT, PQStats, compare, pixel_counts
from infra import records
from infra.errors import TesseraError
from preprocessing.panoptic_map import PanopticMap, Segment
from tests.evaluation.test_pq_truth import LABELS, random_prediction, random_truth

THINGS = [c for c, is_thing in enumerate(LABELS.is_thing) if is_thing]


def random_pair(rng):
    """Blocks up to 39 x 156 pixels, so that boundaries are up to 3 wide; now and then no table, or no pixel."""
    truth = random_truth(rng)
    prediction = random_prediction(rng, truth)
    if rng.random() < 0.05:
        truth = PanopticMap(truth.ids, ())
    if rng.random() < 0.05:
        prediction = PanopticMap(np.zeros_like(prediction.ids), ())
    rows, columns = (int(n) for n in (rng.integers(1, 4), rng.integers(1, 13)))
    larger = [PanopticMap(m.ids.repeat(rows, 0).repeat(columns, 1), m.segments) for m in (truth, prediction)]
    shifted = np.roll(larger[1].ids, rng.choice([0, 0, 0, 1, 2], 2), (0, 1))
    return larger[0], PanopticMap(shifted, prediction.segments)


def reference_reach(truth):
    """Width of a boundary, in pixels."""
    return max(1, round(0.02 * math.hypot(*truth.size)))


def band(mask, reach):
    """The part of a mask that lies up to reach - 1 away from its outermost pixels (or less than reach)."""
    framed = np.pad(mask, 1)  # what is outside of the image is outside of the segment
    outermost = framed & ~binary_erosion(framed)
    if not outermost.any():
        return mask
    d2 = np.rint(distance_transform_edt(~outermost)[1:-1, 1:-1] ** 2)
    return mask & (d2 <= (reach - 1) ** 2)


def iou_of(true_mask, predicted_mask, void):
    """IoU of two masks, where what is predicted on void is not in the union."""
    union = int(((true_mask | predicted_mask) & ~void).sum())
    return int((true_mask & predicted_mask).sum()) / union if union else 0.0


class Reference:
    """One image, measured a pair of segments at a time."""

    def __init__(self, truth, prediction):
        self.void, self.true, self.predicted = truth.ids == 0, truth.segments, prediction.segments
        self.masks = {("true", s.id): truth.ids == s.id for s in truth.segments}
        self.masks |= {("predicted", s.id): prediction.ids == s.id for s in prediction.segments}
        bands = {key: band(mask, reference_reach(truth)) for key, mask in self.masks.items()}
        pairs = [(t, p) for t in self.true for p in self.predicted]
        self.iou, at_boundary = (
            {(t, p): iou_of(masks["true", t.id], masks["predicted", p.id], self.void) for t, p in pairs}
            for masks in (self.masks, bands)
        )
        self.lesser = {pair: min(self.iou[pair], at_boundary[pair]) for pair in pairs}
        self.size = {key: sum(math.sqrt(mask.sum()) >= edge for edge in SIZE_EDGES) for key, mask in self.masks.items()}

    def sums(self, iou, category, slot):
        """[IoUs, tp, fp, fn] by slot; segments of the category None do not take part."""
        result = defaultdict(lambda: [[], 0, 0, 0])
        taken = set()
        for t in (t for t in self.true if not t.is_crowd and category(t) is not None):
            partners = [p for p in self.predicted if category(p) == category(t) and iou[t, p] > 0.5]
            if not partners:
                result[slot("true", t)][3] += 1
                continue
            (partner,) = partners
            taken.add(partner.id)
            result[slot("true", t)][0].append(iou[t, partner])
            result[slot("true", t)][1] += 1
        for p in self.predicted:
            if p.id not in taken and category(p) is not None and not self.excused(p, category):
                result[slot("predicted", p)][2] += 1
        return {key: (math.fsum(ious), *counts) for key, (ious, *counts) in result.items()}

    def excused(self, segment, category):
        """Over half on void and the last crowd of its category."""
        mask = self.masks["predicted", segment.id]
        crowds = [t for t in self.true if t.is_crowd and category(t) == category(segment)]
        allowed = self.void | self.masks["true", crowds[-1].id] if crowds else self.void
        return 2 * (mask & allowed).sum() > mask.sum()

    def best_ious(self):
        """Of each true instance, by size."""
        result = [[] for _ in range(SIZES)]
        for t in self.true:
            if t.category in THINGS and not t.is_crowd:
                best = max((self.iou[t, p] for p in self.predicted if p.category in THINGS), default=0.0)
                result[self.size["true", t.id]].append(best)
        return result


def by_slot(stats):
    """[IoU, tp, fp, fn] of the slots that occur."""
    values = zip(stats.iou.tolist(), stats.tp.tolist(), stats.fp.tolist(), stats.fn.tolist(), strict=True)
    return {slot: row for slot, row in enumerate(values) if any(row)}


def dense(confusion):
    """As a table, (C, C + 1)."""
    found = np.zeros((confusion.categories, confusion.categories + 1), int)
    found[confusion.true_K, confusion.predicted_K] = confusion.pixels_K
    return found


def boundaries(truth, prediction):
    """Boundary IoU of every pair, (N, M)."""
    overlaps = pixel_counts(truth, prediction, 100)
    found = np.zeros((len(truth.segments), len(prediction.segments)))
    found[overlaps.rows_P, overlaps.columns_P] = boundary_ious(truth, prediction, overlaps)
    return found


def reference_confusion(truth, prediction):
    """Pixel by pixel."""
    category_of = [{s.id: s.category for s in m.segments} for m in (truth, prediction)]
    result = np.zeros((len(LABELS), len(LABELS) + 1), int)
    for true, predicted in zip(truth.ids.ravel().tolist(), prediction.ids.ravel().tolist(), strict=True):
        if true in category_of[0]:
            result[category_of[0][true], category_of[1].get(predicted, len(LABELS))] += 1
    return result


def reference_semantic_iou(truth, prediction, category):
    """Of all pixels of a category at once; None where neither map has it on what the truth lists."""
    mask_of = [np.isin(m.ids, [s.id for s in m.segments if s.category == category]) for m in (truth, prediction)]
    true, predicted = mask_of[0], mask_of[1] & np.isin(truth.ids, [s.id for s in truth.segments])
    return 100 * (true & predicted).sum() / (true | predicted).sum() if (true | predicted).any() else None


SEEDS = given(st.integers(0, 2**32 - 1))


@settings(max_examples=150, deadline=None)
@SEEDS
def test_every_sum_is_that_of_masks_and_loops(seed):
    truth, prediction = random_pair(np.random.default_rng(seed))
    expected, score = Reference(truth, prediction), measure_image(truth, prediction, LABELS)
    category = lambda s: s.category  # noqa: E731
    slot = lambda _, s: s.category  # noqa: E731
    assert by_slot(score.pq) == expected.sums(expected.iou, category, slot)
    assert by_slot(score.boundary) == expected.sums(expected.lesser, category, slot)
    sized = expected.sums(expected.iou, category, lambda side, s: expected.size[side, s.id] * 3 + s.category)
    assert by_slot(score.sized) == sized
    one = expected.sums(expected.iou, lambda s: 0 if s.category in THINGS else None, lambda *_: 0)
    assert by_slot(score.agnostic) == one
    np.testing.assert_array_equal(dense(score.confusion), reference_confusion(truth, prediction))


@settings(max_examples=150, deadline=None)
@SEEDS
def test_best_and_semantic_iou_are_those_of_masks_and_loops(seed):
    truth, prediction = random_pair(np.random.default_rng(seed))
    expected, score = Reference(truth, prediction).best_ious(), measure_image(truth, prediction, LABELS)
    assert score.instances.tolist() == [len(ious) for ious in expected]
    assert [units / IOU_UNIT for units in score.instance_iou_units] == pytest.approx([*map(sum, expected)], abs=1e-12)
    means = [100 * sum(ious) / len(ious) if ious else None for ious in expected]
    assert iou_by_size(score) == [None if mean is None else pytest.approx(mean) for mean in means]
    semantic = [None if math.isnan(value) else value for value in semantic_iou(score).tolist()]
    references = [reference_semantic_iou(truth, prediction, c) for c in range(len(LABELS))]
    assert semantic == [None if value is None else pytest.approx(value) for value in references]


def test_the_random_maps_reach_what_is_measured():
    """Every outcome, more than the smallest size, boundaries of every width up to 3, and no table at all."""
    pairs = [random_pair(np.random.default_rng(seed)) for seed in range(400)]
    total = sum((measure_image(*pair, LABELS) for pair in pairs), Score.zero(3))
    for stats in (total.pq, total.boundary, total.agnostic):
        assert min(*stats.tp, *stats.fp, *stats.fn) > 30
    assert (total.instances[:3] > 20).all()
    assert dense(total.confusion).min() > 1000
    assert total.boundary.iou.sum() < total.pq.iou.sum() - 10
    assert {reference_reach(truth) for truth, _ in pairs} == {1, 2, 3}
    assert not all(prediction.segments and truth.segments for truth, prediction in pairs)


def boundary_reference(truth, prediction):
    reach, void = reference_reach(truth), truth.ids == 0
    bands = [[band(m.ids == s.id, reach) for s in m.segments] for m in (truth, prediction)]
    return np.array([[iou_of(a, b, void) for b in bands[1]] for a in bands[0]])


def quarters(size):
    """A segment with a void quarter, and the same one pixel further."""
    ids = np.ones(size, np.int32)
    ids[size[0] // 2 :, size[1] // 2 :] = 0
    moved = np.roll(ids, 1, (0, 1))
    return [PanopticMap(m, (Segment(1, 0, True),)) for m in (ids, moved)]


@pytest.mark.parametrize("size", [(60, 80), (90, 120), (120, 500)])
def test_boundaries_are_as_wide_as_the_diagonal_says(size):
    truth, prediction = quarters(size)
    assert reference_reach(truth) == {60: 2, 90: 3, 120: 10}[size[0]]
    assert boundaries(truth, prediction) == pytest.approx(boundary_reference(truth, prediction), abs=1e-15)


def test_the_frame_of_the_image_is_a_contour():
    """Of 5 x 5 pixels the boundary is the rim: 16 px, of which a prediction without the first row has 11."""
    truth = PanopticMap(np.ones((5, 5), np.int32), (Segment(1, 0, True),))
    prediction = PanopticMap(np.array([[0] * 5] + [[1] * 5] * 4, np.int32), truth.segments)
    assert boundaries(truth, prediction).item() == 11 / (16 + 14 - 11)


@pytest.mark.parametrize(("side", "matches"), [(7, 1), (9, 0)])
def test_of_iou_and_boundary_iou_the_lesser_counts(side, matches):
    """A line of 60 px with a block that has more pixels than its rim: the boundaries agree better than the segments."""
    ids = np.full((20, 60), 9, np.int32)
    ids[0] = 1
    truth = PanopticMap(ids.copy(), (Segment(1, 0, True),))
    ids[1 : side + 1, 20 : side + 20] = 1
    prediction = PanopticMap(np.where(ids == 1, ids, 0), truth.segments)
    assert boundaries(truth, prediction).item() > 0.5
    score = measure_image(truth, prediction, LABELS)
    assert score.boundary.to_json() == score.pq.to_json()
    assert score.pq.iou[0] == matches * 60 / (60 + side**2)


@settings(max_examples=60, deadline=None)
@SEEDS
def test_turned_and_mirrored_images_score_alike(seed):
    rng = np.random.default_rng(seed)
    truth, prediction = random_pair(rng)
    turns = int(rng.integers(4))
    turned = [PanopticMap(np.rot90(m.ids, turns).T, m.segments) for m in (truth, prediction)]
    assert measure_image(*turned, LABELS).to_json() == measure_image(truth, prediction, LABELS).to_json()


@settings(max_examples=60, deadline=None)
@SEEDS
def test_order_of_rows_ids_and_classes_of_things_change_only_what_they_mean(seed):
    rng = np.random.default_rng(seed)
    truth, prediction = random_pair(rng)
    before = measure_image(truth, prediction, LABELS)
    rows = [prediction.segments[i] for i in rng.permutation(len(prediction.segments))]
    assert measure_image(truth, PanopticMap(prediction.ids, tuple(rows)), LABELS).to_json() == before.to_json()
    other = [replace(s, category=int(rng.choice(THINGS))) if s.category in THINGS else s for s in rows]
    after = measure_image(truth, PanopticMap(prediction.ids, tuple(other)), LABELS)
    for name in ("agnostic", "instance_iou_units", "instances"):
        assert after.to_json()[name] == before.to_json()[name]


@settings(max_examples=60, deadline=None)
@SEEDS
def test_boundaries_only_take_away_and_sizes_only_divide(seed):
    truth, prediction = random_pair(np.random.default_rng(seed))
    score = measure_image(truth, prediction, LABELS)
    assert score.pq.to_json() == compare(truth, prediction, len(LABELS)).to_json()
    assert (score.boundary.tp <= score.pq.tp).all()
    assert (score.boundary.fn >= score.pq.fn).all()
    assert (score.boundary.fp >= score.pq.fp).all()
    assert (score.boundary.iou_units <= score.pq.iou_units).all()
    parts = (score.sized[s * len(LABELS) : (s + 1) * len(LABELS)] for s in range(SIZES))
    assert sum(parts, PQStats.zero(len(LABELS))).to_json() == score.pq.to_json()


@settings(max_examples=60, deadline=None)
@SEEDS
def test_the_truth_itself_scores_100(seed):
    truth = random_pair(np.random.default_rng(seed))[0]
    rows = [s for s in truth.segments if (truth.ids == s.id).any() and not s.is_crowd]
    ids = np.where(np.isin(truth.ids, [s.id for s in rows]), truth.ids, 0)
    score = measure_image(*[PanopticMap(ids, tuple(rows))] * 2, LABELS)
    for stats in (score.pq, score.boundary, score.agnostic, score.sized):
        assert stats.iou.tolist() == stats.tp.tolist()
        assert stats.fp.sum() == stats.fn.sum() == 0
    assert set(iou_by_size(score)) <= {None, 100}
    known = semantic_iou(score)
    assert set(known[~np.isnan(known)]) <= {100}


@pytest.mark.parametrize(("edge", "size"), [(edge, s) for s, edge in enumerate(SIZE_EDGES, start=1)])
def test_a_size_begins_at_its_edge(edge, size):
    ids = np.ones((edge, edge), np.int32)
    whole = PanopticMap(ids, (Segment(1, 0, True),))
    assert measure_image(whole, whole, LABELS).instances.argmax() == size
    ids = ids.copy()
    ids[0, 0] = 0
    less = PanopticMap(ids, (Segment(1, 0, True),))
    score = measure_image(less, less, LABELS)
    assert score.instances.argmax() == size - 1
    assert score.sized.tp.argmax() == (size - 1) * len(LABELS)
    names = size_names()
    assert len(names) == SIZES
    assert [str(edge) in name.split() for name in names] == [s in (size - 1, size) for s in range(SIZES)]


def test_a_false_positive_counts_in_its_own_size():
    truth = PanopticMap(np.full((16, 16), 9, np.int32), ())
    prediction = PanopticMap(np.pad(np.ones((8, 8), np.int32), (0, 8)), (Segment(1, 1, True),))
    assert by_slot(measure_image(truth, prediction, LABELS).sized) == {1 * len(LABELS) + 1: (0.0, 0, 1, 0)}


EXAMPLES = [measure_image(*random_pair(np.random.default_rng(seed)), LABELS) for seed in range(10)]


def merged(scores):
    return sum(scores, Score.zero(len(LABELS)))


@given(st.permutations(EXAMPLES), st.lists(st.integers(0, len(EXAMPLES)), max_size=5))
def test_any_order_and_split_gives_the_same_bits(scores, cuts):
    parts = [merged(scores[a:b]) for a, b in pairwise([0, *sorted(cuts), len(scores)])]
    assert merged(parts).to_json() == merged(EXAMPLES).to_json()


@pytest.mark.parametrize("score", [*EXAMPLES, merged(EXAMPLES * 300), Score.zero(3)])
def test_json_round_trip_is_exact_and_zero_is_neutral(score):
    assert Score.from_json(records.restore(ScoreRecord, score.to_json(), "sums")).to_json() == score.to_json()
    assert (score + Score.zero(3)).to_json() == (Score.zero(3) + score).to_json() == score.to_json()


def test_scores_of_other_categories_do_not_add():
    with pytest.raises(TesseraError, match="of 2 and of 3 categories"):
        Score.zero(2) + Score.zero(3)


def test_errors_name_the_image():
    truth, prediction = quarters((4, 4))
    with pytest.raises(TesseraError, match=r"^image 5: prediction: segment 1 is in the table but covers 0 px"):
        measure_image(truth, PanopticMap(np.zeros((4, 4), np.int32), prediction.segments), LABELS, "image 5")
