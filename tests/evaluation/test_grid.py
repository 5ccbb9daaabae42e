"""A grid's table against numpy, its files read back, its page in a real browser."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from evaluation import grid_plots
from evaluation.compare import Evaluated
from evaluation.evaluate import EvalJob, evaluate_shard, evaluation_path, gather
from evaluation.grid import (
    FIGURES,
    Line,
    Mean,
    Measured,
    Outcome,
    Written,
    difference,
    papers_order,
    published_difference,
    to_markdown,
    to_parquet,
    write_grid,
)
from evaluation.grid_plots import Points, charts
from evaluation.grid_stats import Difference
from evaluation.report import Gallery, write_report
from infra.artifacts import read_manifest
from infra.store import Store, open_store
from preprocessing.coco import read_index
from preprocessing.shards import ShardConfig
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.finished_run import finished_run
from tests.support.shard_sets import make_set
from training.recipe import Recipe
from training.recipes.generalist import debug
from training.run import read_run

PERCENT = st.floats(0, 100)
CHROMIUM = Path("/usr/bin/chromium")


def measured(
    row: str, seed: int, pq: float | None, published: float | None = None, error: str | None = None
) -> Measured:
    """A trial with one figure for all, 100 minus that of things, half of it of things without classes."""
    outcome = Outcome(row, seed, {"train.lr": 0.1}, published, f"train/{row}{seed}", f"evaluate/{row}{seed}", error)
    if error is not None:
        return Measured(outcome, None)
    things = None if pq is None else 100 - pq
    summary = {name: {"all": pq, "things": things, "stuff": pq} for name in ("pq", "sq", "rq", "boundary")}
    summary["agnostic"] = {"pq": None if pq is None else pq / 2}
    return Measured(outcome, Evaluated("r", None, "", summary, None, None, {}, 0.5, {}))  # type: ignore[arg-type]


@given(st.lists(PERCENT, min_size=1, max_size=9))
def test_mean_and_spread_are_numpys(values: list[float]):
    line = Line("a", tuple(measured("a", seed, pq) for seed, pq in enumerate(values)))
    figures = dict.fromkeys(FIGURES, values)
    figures |= {"things": [100 - v for v in values], "things without classes": [v / 2 for v in values]}
    for figure, own in figures.items():
        mean = line.over_seeds(figure)
        assert mean is not None
        assert mean.value == pytest.approx(np.mean(own))
        assert mean.spread == (pytest.approx(np.std(own, ddof=1)) if len(own) > 1 else None)
    assert line.worker_hours == 0.5 * len(values)


def test_what_failed_counts_in_no_mean_and_a_figure_that_is_missing_is_not_left_out():
    line = Line("a", (measured("a", 0, 40), measured("a", 1, None, error="broke"), measured("a", 2, 50)))
    assert line.over_seeds("PQ") == Mean(45.0, pytest.approx(np.std([40, 50], ddof=1)))
    assert str(line.over_seeds("PQ")) == "45.0 ± 7.1"
    assert len(line.finished) == 2
    assert line.by_seed("PQ") == {0: 40, 2: 50}
    assert Line("a", (measured("a", 0, 40), measured("a", 1, None))).by_seed("PQ") == {}
    assert Line("a", (measured("a", 0, 40), measured("a", 1, None))).over_seeds("PQ") is None
    assert Line("a", (measured("a", 0, None, error="broke"),)).over_seeds("PQ") is None


def test_differences_are_to_the_first_row_ours_and_the_papers():
    first, second = Line("a", (measured("a", 0, 40, 48.6),)), Line("b", (measured("b", 0, 43, 46.1),))
    assert difference(first, first) is None
    assert difference(second, first) == Difference(3.0, None)
    assert published_difference(second, first) == pytest.approx(-2.5)
    assert published_difference(Line("c", (measured("c", 0, 40),)), first) is None


def test_the_table_names_what_failed():
    lines = [Line("a|b", (measured("a|b", 0, 40, 48.6),)), Line("c", (measured("c", 3, None, error="it broke"),))]
    told = to_markdown("mine", lines).splitlines()
    heads = "PQ | to the first | things | things without classes | stuff | SQ | RQ | boundary | worker-hours"
    assert told[2] == f"|  | runs | {heads} | paper's PQ |"
    assert told[4] == "| a\\|b | 1 | 40.0 | - | 60.0 | 20.0 | 40.0 | 40.0 | 40.0 | 40.0 | 0.50 | 48.6 |"
    assert told[5] == "| c | 0 | - | - | - | - | - | - | - | - | 0.00 | - |"
    assert told[6:] == ["", "- **c, seed 3** failed: it broke"]  # and no order, of one figure of the paper's


def test_differences_are_paired_by_seed_and_a_seed_that_failed_in_one_row_is_in_none():
    first = Line("a", tuple(measured("a", seed, pq) for seed, pq in enumerate([40, 42, 10, 47])))
    failed = measured("b", 2, None, error="broke")
    second = Line("b", (measured("b", 3, 49), measured("b", 1, 45), failed, measured("b", 0, 41)))
    found = difference(second, first)
    assert found is not None
    assert found.mean == pytest.approx(2)
    expected = ttest_rel([41, 45, 49], [40, 42, 47]).confidence_interval(0.95)
    assert found.ends == pytest.approx((expected.low, expected.high))
    assert difference(first, first) is None
    assert difference(Line("c", (measured("c", 4, 41),)), first) is None
    told = to_markdown("mine", [first, second]).splitlines()
    assert told[4].split(" | ")[2:4] == ["34.8 ± 16.8", "-"]
    assert told[5].split(" | ")[1:4] == ["3", "45.0 ± 4.0", "+2.0 (-0.5 to 4.5)"]


def test_the_papers_order_is_told_below_the_table():
    pqs = {"low|": (46, [40, 40]), "high": (49, [42, 42.2]), "none": (None, [1, 2]), "middle": (47.5, [41, 44])}
    lines = [
        Line(row, tuple(measured(row, seed, pq, published) for seed, pq in enumerate(found)))
        for row, (published, found) in pqs.items()
    ]
    pairs = papers_order(lines)
    assert [(pair.higher, pair.lower, pair.published) for pair in pairs] == [
        ("high", "middle", 1.5),
        ("high", "low|", 3),
        ("middle", "low|", 1.5),
    ]
    assert to_markdown("mine", lines).splitlines()[9:] == [
        "#### The paper's order",
        "",
        "Of 3 pairs 1 holds, 1 not shown but in the paper's direction, 1 not shown and against the paper's direction.",
        "",
        "| higher in the paper | lower | the paper | ours | verdict |",
        "|---|---:|---:|---:|---:|",
        "| high | middle | +1.5 | -0.4 (-18.2 to 17.4) | not shown and against the paper's direction |",
        "| high | low\\| | +3.0 | +2.1 (0.8 to 3.4) | holds |",
        "| middle | low\\| | +1.5 | +2.5 (-16.6 to 21.6) | not shown but in the paper's direction |",
    ]


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([1, 2], [1, 2]),
        ([1, 0.5], [1.0, 0.5]),
        ([True, None], [True, None]),
        (["a", "b"], ["a", "b"]),
        ([1, "a"], ["1", '"a"']),
        ([True, 1], ["true", "1"]),
        ([None, {"a": 1}], ["null", '{"a": 1}']),
        ([(1, 2), (3,)], ["[1, 2]", "[3]"]),
        ([None, None], [None, None]),
    ],
    ids=str,
)
def test_options_of_one_type_stay_what_they_are_in_parquet(values: list, kept: list):
    outcomes = [Outcome("r", i, {"o": v}, None, "t", "e", "broke") for i, v in enumerate(values)]
    table = pq.read_table(io.BytesIO(to_parquet([Line("r", tuple(Measured(one, None) for one in outcomes))])))
    assert table["o"].to_pylist() == kept
    assert table["error"].to_pylist() == ["broke"] * len(values)
    assert table["PQ"].to_pylist() == [None] * len(values)


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ([{"a": 1}, {"a": 2}], 1),
        ([{"a": 1}, {"a": 2}, {"a": 40.5}], 2),
        ([{"a": True}, {"a": False}, {"a": None}], 1),
        ([{"a": i, "b": b} for i in range(3) for b in (None, {"c": 1})], 2),
        ([{}], 1),
    ],
    ids=str,
)
def test_an_option_with_three_numbers_has_a_curve(options: list, drawn: int):
    figures = {"PQ": [1.0, 2.0], "things": [], "things without classes": [4.0], "stuff": [3.0]}
    found = charts([Points(f"<row & {i}>", one, figures, []) for i, one in enumerate(options)])
    assert len(found) == drawn
    assert all(svg.startswith("<svg") for svg in found)
    nothing = {name: list[float]() for name in figures}
    assert charts([Points("r", one, nothing, []) for one in options]) == []  # all have failed


def sized(*ious: float | None) -> list[dict]:
    """One seed's IoU by size."""
    return [{"size": f"size {i}", "instances": 7 + i, "iou": iou} for i, iou in enumerate(ious)]


def test_iou_by_size_is_one_line_a_row():
    figures = {name: list[float]() for name in ("PQ", "things", "things without classes", "stuff")}
    rows = [Points(f"<row {i}>", {}, figures, [sized(None, 10 + i, 20), sized(None, 30, 40)]) for i in range(14)]
    (found,) = charts([*rows, Points("failed", {}, figures, [])])
    assert all(f"<!-- &lt;row {i}&gt; -->" in found for i in range(14))
    assert "<!-- failed -->" not in found
    assert "<!-- size 2 -->" in found
    assert "<!-- (9) -->" in found
    assert "FillBetween" not in found
    assert [charts(rows[:few])[0].count('id="FillBetween') for few in (4, 5)] == [4, 0]
    assert charts([Points("no things", {}, figures, [sized(None, None)])]) == []


def test_the_line_is_the_mean_of_the_seeds_and_the_band_has_them_all():
    axes = Figure().subplots()
    seeds = [sized(None, 10, 20), sized(None, 30, 40), sized(None, 35, 0)]
    grid_plots._size_line(axes, Points("r", {}, {}, seeds), 0, band=True)
    (line,), (band,) = axes.lines, axes.collections
    assert line.get_xydata().tolist() == [[1, 25], [2, 20]]
    assert {(x, y) for x, y in band.get_paths()[0].vertices} == {(1, 10), (1, 35), (2, 0), (2, 40)}


def test_the_lines_of_many_rows_differ():
    axes = Figure().subplots()
    for number in range(18):
        grid_plots._size_line(axes, Points("r", {}, {}, [sized(1, 2)]), number, band=False)
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 18


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("grid") / "store"))


@pytest.fixture(scope="module")
def outcomes(store: Store, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Two rows of two seeds on four images, the last of which has failed."""
    folder = tmp_path_factory.mktemp("data")
    index = read_index(write_set(folder, SyntheticConfig(train=4, val=1, size=(40, 48), seed=5)), "train2017")
    val_set, found = make_set(store, index, ShardConfig(radius=0, samples=4)), []
    for row, dice in (("no <Dice>", 0.0), ("Dice", 1.0)):
        for seed in (0, 1):
            recipe = debug().changed({"method.dice": dice, "train.seed": seed})
            run = finished_run(folder, store.url, recipe).removeprefix(f"{store.url}/")
            error = None if (dice, seed) != (1.0, 1) else "step 3: gradient norm nan"
            evaluation = evaluated(store, recipe, run, val_set) if error is None else "evaluate/none"
            found.append(Outcome(row, seed, {"method.dice": dice}, 40 + dice, run, evaluation, error))
    return found


def evaluated(store: Store, recipe: Recipe, run: str, val_set) -> str:
    """Without Ray."""
    path, trained = evaluation_path(recipe, run, val_set.path), read_run(store.url, run)
    assert trained is not None
    jobs = [EvalJob(recipe, store.url, run, path, val_set.labels, shard) for shard in val_set.shards]
    scores = gather([evaluate_shard(job) for job in jobs], val_set)
    write_report(recipe, trained, val_set, store.url, path, scores, Gallery({}, {}))
    return path


@pytest.fixture(scope="module")
def written(store: Store, outcomes: list[Outcome]) -> Written:
    return write_grid(store, "the grid", outcomes)


def test_a_grid_says_what_it_refers_to(store: Store, outcomes: list[Outcome], written: Written):
    path = written.url.removeprefix(f"{store.url}/").removesuffix("/report.html")
    manifest = read_manifest(store, path)
    assert manifest is not None
    assert manifest["runs"] == sorted(one.run for one in outcomes[:3])
    assert manifest["evaluations"] == sorted(one.evaluation for one in outcomes[:3])
    assert [trial["failed"] for trial in manifest["trials"]] == [False, False, False, True]
    table = pq.read_table(io.BytesIO(store.read(f"{path}/table.parquet"))).to_pylist()
    assert [row["method.dice"] for row in table] == [0.0, 0.0, 1.0, 1.0]
    for row, one in zip(table[:3], outcomes, strict=False):
        summary = json.loads(store.read(f"{one.evaluation}/report.json"))
        assert [row[name] for name in FIGURES] == [summary[measure][group] for measure, group in FIGURES.values()]
    assert table[3]["error"] == "step 3: gradient norm nan"


def test_the_same_trials_are_written_once_and_others_elsewhere(store: Store, outcomes: list[Outcome], written: Written):
    before = {e.key: e.modified for e in store.list("ablate/")}
    again = write_grid(store, "the grid", outcomes)
    assert (again.url, again.markdown) == (written.url, written.markdown)
    assert {e.key: e.modified for e in store.list("ablate/")} == before
    alone = write_grid(store, "the grid", outcomes[:1])
    assert alone.url != written.url
    assert not store.exists(alone.url.removeprefix(f"{store.url}/").replace("report.html", "compare.html"))


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")
def test_the_page_opens_shows_the_failure_and_its_links_lead_somewhere(written: Written):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page, said = chromium.new_page(viewport={"width": 400, "height": 900}), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(Path(written.url).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert "step 3: gradient norm nan" in page.locator(".facts").nth(1).inner_text()
        rows = [row.locator("td").all_inner_texts() for row in page.locator("table").nth(2).locator("tr").all()[1:]]
        assert [row[:2] for row in rows] == [["no <Dice>", "2"], ["Dice", "1 of 2"]]
        assert rows[0][3] == ""
        assert re.fullmatch(r"[+-]\d+\.\d", rows[1][3])  # one seed in common has no interval
        assert rows[1][4:6] == ["41.0", "+1.0"]
        (pair,) = [row.locator("td").all_inner_texts() for row in page.locator("table").nth(3).locator("tr").all()[1:]]
        assert pair[:4] == ["Dice", "no <Dice>", "+1.0", rows[1][3]]
        assert pair[4].startswith("not shown")
        assert page.get_by_text(f"Of 1 pair 1 {pair[4]}.").count() == 1
        assert page.content().count("<!-- mean IoU of things by size -->") == 1
        links = [link.evaluate("a => a.href") for link in page.locator("a").all()]
        assert len(links) == 5  # comparison, table, three reports
        assert all(Path(link.removeprefix("file://")).is_file() for link in links)
        assert said == []
        chromium.close()
