"""What a grid shows: differences between its rows paired by seed, and whether they come in the order of a paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt

import numpy as np
from scipy.special import stdtrit

from evaluation.bootstrap import COVERAGE
from evaluation.report import interval

HOLDS = "holds"
LIKELY = "not shown but in the paper's direction"
OPEN = "not shown"
UNLIKELY = "not shown and against the paper's direction"
REVERSED = "reversed"
VERDICTS = (HOLDS, LIKELY, OPEN, UNLIKELY, REVERSED)


@dataclass(frozen=True)
class Difference:
    """One row minus another over the seeds that both have."""

    mean: float
    ends: tuple[float, float] | None
    """Student's two-sided 95 % interval of the mean; None of one seed alone."""

    @property
    def sure(self) -> bool:
        """Whether there is an interval, and 0 lies outside."""
        return self.ends is not None and (self.ends[0] > 0 or self.ends[1] < 0)

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" if self.ends is None else f"{self.mean:+.1f} ({interval(self.ends)})"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours minus theirs, both by seed; None where they have no seed in common.

    The same seed draws the same images in the same order, so chance that both share cancels.
    """
    values_N = np.array([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
    if not values_N.size:
        return None
    mean, n = float(values_N.mean()), len(values_N)
    if n == 1:
        return Difference(mean, None)
    half = float(stdtrit(n - 1, (1 + COVERAGE) / 2) * values_N.std(ddof=1) / sqrt(n))
    return Difference(mean, (mean - half, mean + half))


@dataclass(frozen=True)
class Stated:
    """A row of which a paper states the PQ."""

    title: str
    published: float
    pq: Mapping[int, float]
    """Ours by seed."""


@dataclass(frozen=True)
class Pair:
    """Two rows that a paper ranks."""

    higher: str
    """The title of the one that is better in the paper."""
    lower: str
    published: float
    """The paper's difference, above 0."""
    ours: Difference | None
    """None where they have no seed in common."""

    @property
    def verdict(self) -> str:
        """One of VERDICTS; OPEN where there is no mean, or it is 0."""
        if self.ours is None or self.ours.mean == 0:
            return OPEN
        if self.ours.sure:
            return HOLDS if self.ours.mean > 0 else REVERSED
        return LIKELY if self.ours.mean > 0 else UNLIKELY


def ranked(rows: Sequence[Stated]) -> list[Pair]:
    """Every pair whose published figures differ, the higher one first; from the paper's best row downwards."""
    best_first = sorted(rows, key=lambda row: -row.published)
    return [
        Pair(one.title, other.title, one.published - other.published, paired(one.pq, other.pq))
        for one, other in combinations(best_first, 2)
        if one.published > other.published
    ]


def summed_up(pairs: Sequence[Pair]) -> str:
    """Of one pair or more: "Of 6 pairs 4 hold, 1 not shown but in the paper's direction, 1 reversed."."""
    found = [pair.verdict for pair in pairs]
    counts = [(found.count(verdict), verdict) for verdict in VERDICTS if verdict in found]
    parts = [f"{count} {'hold' if verdict == HOLDS and count > 1 else verdict}" for count, verdict in counts]
    return f"Of {len(pairs)} pair{'s' * (len(pairs) != 1)} {', '.join(parts)}."
