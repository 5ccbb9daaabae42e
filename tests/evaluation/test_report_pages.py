"""Reports of every kind of evaluation, read as HTML: what they are about, and that none ends in an error."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from evaluation.evaluate import Scores, galleries_of
from evaluation.measures import measure_image
from evaluation.report import Gallery, Report, write_report
from infra import artifacts
from infra.artifacts import MANIFEST
from infra.page import UNKNOWN
from infra.store import Store, open_store
from preprocessing.labels import Category, LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment
from preprocessing.pictures import Panel, overlay_panel
from preprocessing.shards import ShardConfig, ShardSet, read_set, write_set
from preprocessing.source import Origin
from tests.support.rows import course
from training.metrics import write_metrics
from training.recipe import Recipe
from training.recipes.generalist import debug
from training.run import TrainedRun, read_run

TRAIN, VAL = (Origin("/data/ADE20K", split, "ade20k") for split in ("training", "validation"))
FILE = "ADE_val_<b>_00000001.jpg"


class Read(HTMLParser):
    """Facts of the head, attributes of every tag by its name, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: dict[str, list[dict[str, str | None]]] = {}
        self.text = ""
        self.feed(page)
        rows = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td>', page)
        self.facts = dict(rows)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.setdefault(tag, []).append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def check(page: str) -> Read:
    """The page, which needs no network and whose pictures say what they are."""
    found = Read(page)
    for tag, name in (("img", "src"), ("a", "href"), ("link", "href"), ("script", "src"), ("iframe", "src")):
        for attributes in found.tags.get(tag, []):
            assert not re.match(r"(https?:)?//", attributes.get(name) or "")
    assert all("alt" in image for image in found.tags["img"])
    assert not re.search(r"@import|url\((?!#)", page)
    return found


def trained(store: Store, labels: LabelTable, recipe: Recipe, **more: object) -> TrainedRun:
    """A finished run of 90 images."""
    train_set = ShardSet("precompute/a/train", labels, ShardConfig(), (), (), (TRAIN,))
    write_set(store, train_set, ())
    manifest = json.loads(store.read(f"{train_set.path}/{MANIFEST}"))
    store.write(f"{train_set.path}/{MANIFEST}", json.dumps(manifest | {"samples": 90}).encode())
    path = recipe.run_path(train_set.path)
    write_metrics(store, path, course(30))
    content = {"recipe": recipe, "train_set": train_set.path, "steps": 45, "seconds": 1.5, **more}
    artifacts.write_manifest(store, path, content)
    run = read_run(store.url, path)
    assert run is not None
    return run


def scores_of(labels: LabelTable, kind: str) -> tuple[Scores, Gallery]:
    """Of one image."""
    ids = np.zeros((32, 40), np.int32)
    if kind != "all void":
        ids[:, 20:] = 1
    segments = (Segment(1, 0, bool(labels.is_thing[0])),) if ids.any() else ()
    truth = PanopticMap(ids, segments)
    prediction = PanopticMap(ids, segments) if kind != "nothing predicted" else PanopticMap(np.zeros_like(ids), ())
    score = measure_image(truth, prediction, labels)
    scores = Scores(score, {5: score.pq}, (), names={5: FILE})
    panel = Panel(FILE, overlay_panel(np.zeros((32, 40, 3), np.uint8), {"ground truth": truth}, labels))
    return scores, Gallery(galleries_of(scores) or {}, {5: panel})


def report(store: Store, labels: LabelTable, kind: str = "", recipe: Recipe | None = None, **more: object) -> Report:
    recipe, scores = recipe or debug(), scores_of(labels, kind)
    run = trained(store, labels, recipe, **more)
    val_set = ShardSet("precompute/a/val", labels, ShardConfig(radius=0), (), (), (VAL,))
    write_set(store, val_set, ())
    return write_report(recipe, run, val_set, store.url, f"evaluate/{run.path[-16:]}", *scores)


def table(*names: str) -> LabelTable:
    return LabelTable(tuple(Category(i, name, True, (9, 9, 9)) for i, name in enumerate(names, start=1)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def test_the_head_says_which_data_how_long_and_when(store: Store):
    written = report(store, table("door;double door", "wall"), workers=3, code="0.9 (abc)")
    page = check(Path(written.url).read_text())
    facts = page.facts
    assert facts["data set"] == "/data/ADE20K, layout ade20k, split validation"
    assert facts["trained on"].startswith("/data/ADE20K, layout ade20k, split training, precompute/")
    assert facts["evaluated"].startswith("1 images, 2 categories (2 things, 0 stuff), precompute/")
    batch = debug().train.batch
    steps = (
        f"{45 * batch / 90:.4g} epochs of 90 images, 45 steps of {batch} images ({45 * batch} images seen), 3 workers"
    )
    assert facts["training"].startswith(f"{steps}, ended 20")
    assert re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC, by code ", facts["written"])
    assert facts["recipe"] == "generalist/debug, seed 0, trained by code 0.9 (abc)"
    assert "<title>PQ 100.0: generalist/debug on ADE20K validation</title>" in Path(written.url).read_text()
    assert f"{FILE} · image 5 · PQ 100.0" in page.text
    assert {f"image of {FILE}, image 5", f"ground truth of {FILE}, image 5"} <= {i["alt"] for i in page.tags["img"]}
    images = json.loads(store.read(f"{Path(written.url).parent.relative_to(store.url)}/predictions.json"))["images"]
    assert images == [{"id": 5, "file_name": FILE}]


def test_what_older_versions_did_not_write_down_is_said_to_be_so(store: Store):
    report(store, table("door"))
    for path in ("precompute/a/train", "precompute/a/val"):
        old = json.loads(store.read(f"{path}/{MANIFEST}"))
        del old["origins"]
        store.write(f"{path}/{MANIFEST}", json.dumps(old).encode())
    val_set = read_set(store, "precompute/a/val")
    assert val_set is not None
    assert val_set.origins == ()
    run = read_run(store.url, debug().run_path("precompute/a/train"))
    assert run is not None
    again = write_report(debug(), run, val_set, store.url, "evaluate/old", *scores_of(val_set.labels, ""))
    facts = check(Path(again.url).read_text()).facts
    assert facts["data set"] == UNKNOWN
    assert facts["trained on"].startswith(UNKNOWN)
    assert facts["recipe"].endswith(f"trained by code {UNKNOWN}")


def test_no_names_of_categories_end_a_report(store: Store):
    names = ("a", "a", "a (2)", "A", "", " ", "1e5", "-", "</td><script>x</script>", "$x^$", "n" * 9_999, "é", "void")
    written = report(store, table(*names))
    page = check(Path(written.url).read_text())
    assert len(page.tags["script"]) == 1
    assert len(written.summary["pq"]["per_category"]) == len(names)
    saved = json.loads(Path(written.url).with_name("report.json").read_text())
    assert list(saved["pq"]["per_category"]) == list(written.summary["pq"]["per_category"])


@pytest.mark.parametrize(("count", "kind"), [(1, "all void"), (2000, "nothing predicted")])
def test_there_is_a_report_of_anything_that_can_be_evaluated(store: Store, count: int, kind: str):
    written = report(store, table(*(f"c{i}" for i in range(count))), kind)
    page = check(Path(written.url).read_text())
    assert page.text.count("thing") > count
    assert (written.summary["pq"]["all"] is None) == (kind != "nothing predicted")
