"""What a report says of its run's training."""

import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from evaluation.plots import curves
from evaluation.report import pace
from tests.support.rows import course
from training.metrics import STARVED, Row

ROW = Row(10, 0.5, {"instance": 0.7}, 1e-3, 2.5, 100.0, 0.2, 3.5, 2, 1.8e9)


def test_means_are_over_the_time_of_training():
    """20 steps at a quarter of the speed of 10 steps weigh eight times as much; the rows' own times are no matter."""
    rows = [ROW, replace(ROW, step=30, images_per_s=25.0, data_wait=0.56, memory_gib=9.0, time=1.9e9)]
    wait = (0.2 + 8 * 0.56) / 9
    assert pace(rows) == f"33.3 images/s, {wait:.0%} of the time waiting for data (data-starved), 9.0 GiB"


@pytest.mark.parametrize("wait", [0.0, STARVED, 0.31, 1.0])
def test_a_starved_run_is_called_so(wait: float):
    assert ("(data-starved)" in pace([replace(ROW, data_wait=wait)])) == (wait > STARVED)


def test_the_best_pq_is_told_with_its_step():
    rows = [
        replace(ROW, step=step, figures={"pq": pq}) for step, pq in ((10, 20.0), (20, 31.24), (30, 31.24), (40, 5.0))
    ]
    assert pace(rows).endswith("; best PQ on the checked val images 31.2 after step 30")
    assert "PQ" not in pace([replace(ROW, figures={"sq": 80.0})])


@pytest.mark.parametrize(
    ("rows", "checked"),
    [
        (course(), True),
        (course(3000, 2), True),
        (course(1, 1, 1), True),
        ([replace(row, figures={}) for row in course()], False),
        ([ROW], False),
        ([], False),
        ([replace(ROW, losses={}, lr=0.0)], False),
        ([replace(ROW, losses={"a": math.nan, "b": math.inf, "c": 0.0, "d": -1.0})], False),
        ([replace(ROW, losses={f"loss {i}": 10.0**-i for i in range(12)}), replace(ROW, step=20)], False),
    ],
)
@pytest.mark.filterwarnings("error")
def test_there_are_curves_of_any_rows_and_of_pq_where_it_was_measured(rows: list[Row], checked: bool):
    svg = curves(rows)
    ElementTree.fromstring(svg)
    for text in ("weighted losses", "learning rate of the heads", "images/s", "waiting for data, % of the time"):
        assert f"<!-- {text} -->" in svg
    assert ("<!-- PQ on the fixed val images, % -->" in svg) == checked
    for name in {name for row in rows for name in row.losses}:
        assert f"<!-- {name} -->" in svg
    assert len(svg) < 400_000
