"""Intervals over images: against a slow bootstrap with PQStats, on populations whose PQ is known."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.bootstrap import RESAMPLES, Table, difference_intervals, image_pq, intervals
from evaluation.pq import IOU_UNIT, PQStats, compare, summarise
from infra.errors import TesseraError
from preprocessing.labels import Category, LabelTable
from tests.evaluation.test_pq_truth import LABELS, random_pair

GROUPS = ("all", "things", "stuff")
THINGS = LabelTable(tuple(Category(i, str(i), True, (0, 0, 0)) for i in range(3)))


def stats_of(ious, fp, fn):
    """Of one image; the IoUs of each category's matches."""
    units = np.array([sum(int(iou * IOU_UNIT) for iou in row) for row in ious], object)
    return PQStats(units, np.array([len(row) for row in ious]), np.array(fp), np.array(fn))


def draw_image(rng, found=0.7):
    """4 segments of each category, of which about that share is found, and a false positive now and then."""
    hits = rng.binomial(4, found, len(LABELS))
    ious = [rng.uniform(0.6, 1, n).tolist() for n in hits]
    return stats_of(ious, rng.binomial(2, 0.2, len(LABELS)), 4 - hits)


def draw_images(rng, images, found=0.7):
    return {i: draw_image(rng, found) for i in range(images)}


def total(by_image):
    return sum(by_image.values(), PQStats.zero(len(LABELS)))


def maps(seed, images):
    """Statistics of random maps by image."""
    rng = np.random.default_rng(seed)
    return {i: compare(*random_pair(rng), len(LABELS)) for i in range(images)}


@pytest.mark.parametrize("seed", range(5))
def test_the_point_lies_in_its_interval(seed):
    by_image = draw_images(np.random.default_rng(seed), 40)
    pq = summarise(total(by_image), LABELS)["pq"]
    for group, (low, high) in intervals(Table.of(by_image), LABELS).items():
        assert 0 <= low < pq[group] < high <= 100
        assert high - low < 20


def slow_intervals(by_image, seed):
    """Adds PQStats up image by image, in the same draws, and summarises each resample."""
    images, values = sorted(by_image), {group: [] for group in GROUPS}
    for times in np.random.default_rng(seed).multinomial(len(images), [1 / len(images)] * len(images), RESAMPLES):
        drawn = [by_image[i] for i, count in zip(images, times, strict=True) for _ in range(count)]
        pq = summarise(sum(drawn, PQStats.zero(len(LABELS))), LABELS)["pq"]
        for group in GROUPS:
            values[group] += [] if pq[group] is None else [pq[group]]
    return {group: pytest.approx(tuple(np.quantile(values[group], [0.025, 0.975]))) for group in GROUPS}


@pytest.mark.parametrize(("seed", "images"), [(0, 3), (1, 8)])
def test_resamples_are_summarised_as_evaluations_are(seed, images):
    """Few images, so that categories and groups are missing from some resamples."""
    by_image = maps(seed, images)
    assert intervals(Table.of(by_image), LABELS, seed) == slow_intervals(by_image, seed)


def test_the_same_seed_gives_the_same_interval_and_another_seed_nearly_the_same():
    by_image = draw_images(np.random.default_rng(0), 60)
    table = Table.of(by_image)
    first = intervals(table, LABELS, seed=3)
    assert intervals(Table.of(dict(reversed(by_image.items()))), LABELS, seed=3) == first  # nor does order matter
    other = intervals(table, LABELS, seed=4)
    assert other != first
    for group in GROUPS:
        assert other[group] == pytest.approx(first[group], abs=1.5)


def test_no_difference_between_equal_tables():
    by_image = maps(0, 20)
    same = difference_intervals(Table.of(by_image), Table.of(dict(by_image)), LABELS)
    assert same == dict.fromkeys(GROUPS, (0.0, 0.0))


def test_differences_have_a_sign_and_turn_with_their_sides():
    worse, better = (Table.of(draw_images(np.random.default_rng(1), 50, found)) for found in (0.5, 0.8))
    forth, back = difference_intervals(worse, better, LABELS), difference_intervals(better, worse, LABELS)
    for group in GROUPS:
        low, high = forth[group]
        assert 0 < low < high
        assert back[group] == pytest.approx((-high, -low))


def correlated(rng, images):
    """Two evaluations of images of very unequal difficulty; the second finds one segment more in each image."""
    sides = {}, {}
    for image in range(images):
        hits = int(rng.integers(0, 9))
        for side, found in zip(sides, (hits, hits + 1), strict=True):
            side[image] = stats_of([[0.8] * found] * 3, [0] * 3, [10 - found] * 3)
    return [Table.of(side) for side in sides]


def width(interval):
    return interval[1] - interval[0]


def test_paired_differences_are_narrower_than_unpaired_ones_where_images_share_their_difficulty():
    first, second = correlated(np.random.default_rng(0), 40)
    paired = difference_intervals(first, second, LABELS)
    for group in GROUPS:
        alone = [width(intervals(table, LABELS)[group]) for table in (first, second)]
        unpaired = float(np.hypot(*alone))  # of independent draws
        assert width(paired[group]) < unpaired / 5
        assert paired[group][0] > 0


def test_a_group_that_does_not_occur_has_no_interval():
    things_only = {i: stats_of([[0.9], [], []], [0] * 3, [0, 1, 0]) for i in range(5)}
    found = intervals(Table.of(things_only), LABELS)
    assert found["stuff"] is None
    assert found["all"] == found["things"] == pytest.approx((45, 45))
    assert difference_intervals(Table.of(things_only), Table.of(things_only), LABELS)["stuff"] is None
    assert intervals(Table.of({1: PQStats.zero(3), 2: PQStats.zero(3)}), LABELS) == dict.fromkeys(GROUPS)


def test_a_label_table_without_stuff_has_no_interval_of_it():
    found = intervals(Table.of(draw_images(np.random.default_rng(0), 5)), THINGS)
    assert found["stuff"] is None
    assert found["all"] == found["things"]


def test_a_group_of_one_image_is_left_out_of_resamples_without_it():
    """They say nothing of stuff, rather than that it scores 0."""
    images = {i: stats_of([[0.9], [], []], [0] * 3, [0] * 3) for i in range(6)}
    images[9] = stats_of([[], [], [0.75]], [0] * 3, [0] * 3)
    assert intervals(Table.of(images), LABELS)["stuff"] == pytest.approx((75, 75))


def test_one_image_has_an_interval_of_no_width():
    table = Table.of({7: stats_of([[0.8], [], [0.6]], [0] * 3, [0] * 3)})
    expected = {"all": (70, 70), "things": (80, 80), "stuff": (60, 60)}
    assert intervals(table, LABELS) == {group: pytest.approx(value) for group, value in expected.items()}


@pytest.mark.parametrize("other", [[0, 1], [0, 1, 2, 3], [0, 1, 3]])
def test_evaluations_of_other_images_are_refused(other):
    first = Table.of(dict.fromkeys(range(3), PQStats.zero(3)))
    with pytest.raises(TesseraError, match="not of the same images"):
        difference_intervals(first, Table.of(dict.fromkeys(other, PQStats.zero(3))), LABELS)


def test_no_image_is_refused():
    with pytest.raises(TesseraError, match="no image"):
        Table.of({})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_pq_of_an_image_is_its_own_summary(seed, images):
    by_image = maps(seed, images)
    table = Table.of({100 - i: stats for i, stats in by_image.items()})
    assert table.image_ids == tuple(sorted(100 - i for i in by_image))
    for image, pq in zip(table.image_ids, image_pq(table).tolist(), strict=True):
        expected = summarise(by_image[100 - image], LABELS)["pq"]["all"]
        assert (None if np.isnan(pq) else pq) == (expected if expected is None else pytest.approx(expected))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_intervals_are_ordered_percentages_and_survive_json(seed, images):
    found = intervals(Table.of(maps(seed, images)), LABELS)
    for interval in (i for i in found.values() if i):
        assert 0 <= interval[0] <= interval[1] <= 100 + 1e-9
    assert json.loads(json.dumps(found)) == {g: i if i is None else list(i) for g, i in found.items()}


def test_about_95_of_100_intervals_hold_the_populations_pq():
    """200 sets of 50 images. Its PQ is that of very many images; 180 to 199 allow for chance and for few images."""
    rng = np.random.default_rng(0)
    population = summarise(total(draw_images(rng, 20_000)), LABELS)["pq"]
    held = dict.fromkeys(GROUPS, 0)
    for seed in range(200):
        found = intervals(Table.of(draw_images(rng, 50)), LABELS, seed)
        for group, (low, high) in found.items():
            held[group] += low <= population[group] <= high
    assert all(180 <= count <= 199 for count in held.values()), held
