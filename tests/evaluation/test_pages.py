"""The pages in a real browser: no error on the console, nothing asked of a network, sorting works, narrow and wide."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation import compare
from evaluation.ray_evaluate import evaluate
from evaluation.report import pace
from infra.store import open_store
from preprocessing.layouts import read_index
from preprocessing.shards import ShardConfig
from preprocessing.synthetic import SyntheticConfig, write_set
from preprocessing.validate import main as validate
from tests.support.finished_run import finished_run
from tests.support.ray_local import ray_local  # noqa: F401
from tests.support.rows import course
from tests.support.shard_sets import make_set
from training.recipes import panoptic_deeplab
from training.recipes.generalist import debug
from training.run import read_run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, ray_local) -> dict[str, Path]:  # noqa: F811
    """A report, a comparison of two seeds of one recipe and another method, and what validate says of their data."""
    folder = tmp_path_factory.mktemp("pages")
    store, urls = open_store(str(folder / "store")), []
    root = write_set(folder, SyntheticConfig(train=14, val=2, size=(40, 48), seed=5))
    index = read_index(root, "train2017")
    shards = make_set(store, index, ShardConfig(radius=0, samples=7))
    for recipe in (debug(), debug().changed({"train.seed": 1}), panoptic_deeplab.debug_crop()):
        run = finished_run(folder, store.url, recipe).removeprefix(f"{store.url}/")
        trained = read_run(store.url, run)
        assert trained is not None
        urls.append(evaluate(recipe, trained, shards, store.url, gpus=False).url)
    found = {"report": Path(urls[0]), "compare": folder / "compare.html", "validate": folder / "validate.html"}
    assert compare.main([*(url.removesuffix("/report.html") for url in urls), "--page", str(found["compare"])]) == 0
    assert validate([str(root), "--workers", "1", "--page", str(found["validate"])]) == 0
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, pages: dict[str, Path], request: pytest.FixtureRequest):
    """The page of the test's parameter at 1600 px; at the end its console must be empty."""
    page, said, asked = browser.new_page(viewport={"width": 1600, "height": 1000}), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda sent: asked.append(sent.url))
    page.goto(pages[request.param].as_uri())
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()


@pytest.mark.parametrize("opened", ["report", "compare", "validate"], indirect=True)
def test_a_page_fits_narrow_and_wide_screens(opened):
    for width in (1920, 1280, 390):
        opened.set_viewport_size({"width": width, "height": 1000})
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.evaluate(
        "[...document.querySelectorAll('.zoom img')].every(image => image.complete && image.naturalWidth > 0)"
    )
    assert opened.locator("h2").count() >= 2


@pytest.mark.parametrize("opened", ["report", "compare"], indirect=True)
def test_a_click_sorts_the_categories_and_another_turns_them_round(opened):
    table = opened.locator(".categories")
    heads = table.locator("th").all_inner_texts()
    for name, column in ((heads[0], 0), (heads[2], 2)):
        head = table.locator("th", has_text=name).first
        head.click()
        once = table.locator(f"tbody td:nth-child({column + 1})").all_inner_texts()
        head.click()
        twice = table.locator(f"tbody td:nth-child({column + 1})").all_inner_texts()
        assert sorted(once) == sorted(twice)
        for texts, down in ((once, column > 1), (twice, column < 2)):
            values = [text if column < 2 else float(text) for text in texts if text != "-"]
            assert values == sorted(values, reverse=down)
            assert set(texts[len(values) :]) <= {"-"}  # what has no value comes last either way


@pytest.mark.parametrize("opened", ["report", "compare", "validate"], indirect=True)
def test_a_picture_opens_larger_and_arrows_go_through_those_of_its_image(opened):
    pictures = opened.locator(".panel").first.locator("img")
    pictures.nth(0).click()
    shown, dialog = opened.locator("dialog img"), opened.locator("dialog")
    assert shown.get_attribute("src") == pictures.nth(0).get_attribute("src")
    assert shown.bounding_box()["width"] > 2 * pictures.nth(0).bounding_box()["width"]
    opened.keyboard.press("ArrowRight")
    assert shown.get_attribute("src") == pictures.nth(1).get_attribute("src")
    assert dialog.locator("p").inner_text() == pictures.nth(1).get_attribute("alt")
    opened.keyboard.press("Escape")
    assert not dialog.is_visible()


@pytest.mark.parametrize("opened", ["compare"], indirect=True)
def test_runs_that_differ_in_seeds_alone_are_averaged(opened):
    tables = opened.locator("table:not(.facts):not(.long)")
    runs = [row.locator("td").all_inner_texts() for row in tables.nth(0).locator("tr").all()[1:]]
    assert [run[0] for run in runs] == ["1 generalist/debug", "2 generalist/debug", "3 panoptic_deeplab/debug_crop"]
    (averaged,) = [row.locator("td").all_inner_texts() for row in tables.nth(1).locator("tr").all()[1:]]
    assert averaged[:2] == ["generalist/debug", "2"]
    for shown, column in zip(averaged[2:5], (1, 3, 5), strict=True):
        assert float(shown.split()[0]) == pytest.approx((float(runs[0][column]) + float(runs[1][column])) / 2, abs=0.11)
    assert "options that only some have" in opened.locator("details summary").inner_text()


@pytest.mark.parametrize("opened", ["report"], indirect=True)
def test_the_report_tells_how_training_went(opened):
    facts = dict(row.locator("th, td").all_inner_texts() for row in opened.locator(".facts tr").all())
    assert facts["data set"].endswith(", layout coco, split train2017")
    assert facts["pace"] == pace(course())
    assert "best PQ on the checked val images" in facts["pace"]
    drawn = opened.locator("h2", has_text="Training").locator("xpath=following-sibling::div[1]//*[name()='svg']")
    assert drawn.count() == 1
    assert "<!-- PQ on the fixed val images, % -->" in drawn.inner_html()
