"""Differences over seeds against scipy.stats, and a paper's order with verdicts at their borders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evaluation.grid_stats import (
    HOLDS,
    LIKELY,
    OPEN,
    REVERSED,
    UNLIKELY,
    Difference,
    Pair,
    Stated,
    paired,
    ranked,
    summed_up,
)

PERCENT = st.integers(0, 10_000).map(lambda units: units / 100)


@given(st.dictionaries(st.integers(0, 99), st.tuples(PERCENT, PERCENT), min_size=2, max_size=9), st.randoms())
def test_the_interval_is_scipys(both: dict[int, tuple[float, float]], order):
    """By the t-test of paired samples, and by the t distribution around the mean; whatever the order of the seeds."""
    seeds = [*both]
    order.shuffle(seeds)
    found = paired({seed: both[seed][0] for seed in both}, {seed: both[seed][1] for seed in seeds})
    ours, theirs = zip(*both.values(), strict=True)
    values = [one - other for one, other in zip(ours, theirs, strict=True)]
    assert found is not None
    assert found.mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    error = stats.sem(values)
    ends = stats.t.interval(0.95, len(values) - 1, found.mean, error) if error > 1e-9 else (found.mean, found.mean)
    assert found.ends == pytest.approx(ends, abs=1e-6)
    if error > 1e-9:
        test = stats.ttest_rel(ours, theirs)
        assert found.ends == pytest.approx(tuple(test.confidence_interval(0.95)), abs=1e-6)
        if abs(test.pvalue - 0.05) > 1e-9:
            assert found.sure == (test.pvalue < 0.05)


def test_only_seeds_of_both_count():
    ours = {0: 41.0, 1: 90.0, 3: 44.0}
    assert paired(ours, {0: 40.0, 2: 0.0, 3: 42.0}) == paired({0: 41.0, 3: 44.0}, {0: 40.0, 3: 42.0})
    assert paired(ours, {3: 42.0}) == Difference(2.0, None)
    assert paired(ours, {2: 42.0}) is None
    assert paired(ours, {}) is None


def test_what_all_seeds_share_cancels():
    """Seeds that differ by 40 points, and rows by 1 in each of them."""
    found = paired({0: 11.0, 1: 31.0, 2: 51.0}, {0: 10.0, 1: 30.0, 2: 50.0})
    assert found == Difference(1.0, (1.0, 1.0))


@pytest.mark.parametrize(
    ("ours", "told"),
    [
        (Difference(1, None), "+1.0"),
        (Difference(-1.04, (-2.16, 0.08)), "-1.0 (-2.2 to 0.1)"),
        (Difference(0, (0, 0)), "+0.0 (0.0 to 0.0)"),
    ],
    ids=str,
)
def test_a_difference_has_a_sign_and_its_interval_if_there_is_one(ours: Difference, told: str):
    assert str(ours) == told


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (Difference(1, (1e-9, 2)), HOLDS),
        (Difference(1, (0.0, 2)), LIKELY),
        (Difference(1, (-1, 3)), LIKELY),
        (Difference(1, None), LIKELY),
        (Difference(0, (-1, 1)), OPEN),
        (Difference(0, (0, 0)), OPEN),
        (Difference(0, None), OPEN),
        (None, OPEN),
        (Difference(-1, None), UNLIKELY),
        (Difference(-1, (-3, 1)), UNLIKELY),
        (Difference(-1, (-2, 0.0)), UNLIKELY),
        (Difference(-1, (-2, -1e-9)), REVERSED),
    ],
    ids=str,
)
def test_verdicts_at_their_borders(ours: Difference | None, verdict: str):
    assert Pair("a", "b", 1, ours).verdict == verdict
    assert ours is None or ours.sure == (verdict in (HOLDS, REVERSED))


def test_pairs_are_those_whose_figures_differ_the_papers_best_first():
    published = {"a": 46.0, "b": 48.0, "c": 46.0, "d": 44.5}
    pairs = ranked([Stated(title, pq, {0: pq / 2}) for title, pq in published.items()])
    expected = [("b", "a"), ("b", "c"), ("b", "d"), ("a", "d"), ("c", "d")]
    assert [(pair.higher, pair.lower) for pair in pairs] == expected
    for pair, (higher, lower) in zip(pairs, expected, strict=True):
        assert pair.published == published[higher] - published[lower]
        assert pair.ours == Difference(pair.published / 2, None)
    assert ranked([Stated("a", 46.0, {}), Stated("b", 46.0, {})]) == []
    assert ranked([]) == []


def test_the_sentence_counts_the_verdicts_that_occur():
    holds, reversed_ = Difference(1, (0.5, 1.5)), Difference(-1, (-1.5, -0.5))
    likely, unlikely = Difference(1, None), Difference(-1, None)

    def told(*ours: Difference | None) -> str:
        return summed_up([Pair("a", "b", 1, one) for one in ours])

    assert told(holds) == "Of 1 pair 1 holds."
    assert told(reversed_, *[holds] * 4, likely) == (
        "Of 6 pairs 4 hold, 1 not shown but in the paper's direction, 1 reversed."
    )
    assert told(None, unlikely, unlikely) == "Of 3 pairs 1 not shown, 2 not shown and against the paper's direction."
