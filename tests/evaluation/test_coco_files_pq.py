"""PQ of files equals panopticapi's and hotcoco's, on real and on random maps."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing import rgb_ids
from tests.evaluation.test_pq_truth import LABELS, random_pair
from tests.support.pq_files import write_files

COCO_MINI = Path(__file__).resolve().parents[3] / "shared/data/coco_mini/annotations"
GROUPS = {"all": None, "things": True, "stuff": False}


def assert_equals_panopticapi(files):
    ours, (theirs, categories) = files.score(), files.panopticapi()
    for group, is_thing in GROUPS.items():
        if not ours["counts"][group]["categories"]:
            assert [ours[m][group] for m in ("pq", "sq", "rq")] == [None] * 3
            continue  # panopticapi divides by zero
        average, each = theirs.pq_average(categories, is_thing)
        assert ours["counts"][group]["categories"] == average["n"]
        for metric in ("pq", "sq", "rq"):
            assert ours[metric][group] / 100 == pytest.approx(average[metric], abs=1e-9)
            values = dict(zip(categories, ours[metric]["per_category"].values(), strict=True))
            assert {c: (values[c] or 0) / 100 for c in each} == pytest.approx(
                {c: value[metric] for c, value in each.items()}, abs=1e-9
            )
    for id_, counts in zip(categories, ours["counts"]["per_category"].values(), strict=True):
        assert counts == {name: getattr(theirs[id_], name) for name in ("tp", "fp", "fn")}
    return ours


def coco_mini(images):
    """Ids and rows of some images of val2017, and the categories."""
    if not COCO_MINI.exists():
        pytest.skip(f"{COCO_MINI} is not here")
    content = json.loads((COCO_MINI / "panoptic_val2017.json").read_text())
    entries = content["annotations"][images]
    pngs = [(COCO_MINI / "panoptic_val2017" / e["file_name"]).read_bytes() for e in entries]
    maps = [(rgb_ids.read_png(data), e["segments_info"]) for data, e in zip(pngs, entries, strict=True)]
    return maps, content["categories"]


def shifted(rng, truth, prediction, categories):
    return truth, (np.roll(prediction[0], rng.integers(-30, 31, 2), (0, 1)), prediction[1])


def merged(rng, truth, prediction, categories):
    """Some segments into others."""
    ids, rows = prediction[0].copy(), prediction[1]
    for row in rows:
        if rng.random() < 0.3:
            ids[ids == row["id"]] = rng.choice(rows)["id"]
    return truth, (ids, rows)


def split(rng, truth, prediction, categories):
    """What lies right of a column becomes segments of their own."""
    ids, rows = prediction[0].copy(), list(prediction[1])
    column, free = int(rng.integers(ids.shape[1])), 16_000_000
    for number, row in enumerate(prediction[1]):
        right = ids[:, column:]
        right[right == row["id"]] = free + number
        rows.append({**row, "id": free + number})
    return truth, (ids, rows)


def wrong_classes(rng, truth, prediction, categories):
    guesses = [{**row, "category_id": int(rng.choice(categories)["id"])} for row in prediction[1]]
    return truth, (prediction[0], [g if rng.random() < 0.3 else r for g, r in zip(guesses, prediction[1], strict=True)])


def void(rng, truth, prediction, categories):
    """A rectangle of either side."""
    sides = []
    for ids, rows in (truth, prediction):
        ids, (y, x) = ids.copy(), (int(rng.integers(n)) for n in ids.shape)
        ids[y : y + ids.shape[0] // 2, x : x + ids.shape[1] // 2] = 0
        sides.append((ids, rows))
    return tuple(sides)


def crowds(rng, truth, prediction, categories):
    """Some segments of the truth, which may then share a category."""
    return (truth[0], [{**row, "iscrowd": int(rng.random() < 0.4)} for row in truth[1]]), prediction


PERTURBATIONS = (shifted, merged, split, wrong_classes, void, crowds)


def perturbed(rng, truth, categories, perturbations):
    """A truth and a prediction; each lists what it has pixels of."""
    prediction = truth
    for perturb in perturbations:
        truth, prediction = perturb(rng, truth, prediction, categories)
    return with_pixels(*truth), with_pixels(*prediction)


def with_pixels(ids, rows):
    """Files whose PNG and JSON have other ids than one another are refused."""
    present, listed = set(np.unique(ids).tolist()), [row["id"] for row in rows]
    return np.where(np.isin(ids, listed), ids, 0), [row for row in rows if row["id"] in present]


@pytest.mark.parametrize("perturb", PERTURBATIONS, ids=lambda p: p.__name__)
def test_each_kind_of_error_on_coco_equals_panopticapi(tmp_path, perturb):
    maps, categories = coco_mini(slice(PERTURBATIONS.index(perturb), None, 5))
    rng = np.random.default_rng(0)
    files = write_files(tmp_path / "set", [perturbed(rng, truth, categories, [perturb]) for truth in maps], categories)
    summary = assert_equals_panopticapi(files)
    counts = summary["counts"]["all"]
    assert counts["tp"] > 20
    assert perturb is crowds or counts["fp"] + counts["fn"] > 5


def test_all_kinds_of_errors_on_coco_equal_panopticapi_and_hotcoco(tmp_path):
    maps, categories = coco_mini(slice(None))
    rng = np.random.default_rng(1)
    files = write_files(tmp_path / "set", [perturbed(rng, t, categories, PERTURBATIONS) for t in maps], categories)
    summary = assert_equals_panopticapi(files)
    assert min(summary["counts"]["all"].values()) > 25
    assert_equals_hotcoco(files)


def test_cocos_own_files_score_100(tmp_path):
    """Crowds are not predicted: they would be false positives where they are not the last of their category."""
    maps, categories = coco_mini(slice(0, 10))
    kept = [(np.where(np.isin(ids, [r["id"] for r in rows if not r["iscrowd"]]), ids, 0), rows) for ids, rows in maps]
    predicted = [(ids, [r for r in rows if not r["iscrowd"]]) for ids, rows in kept]
    summary = write_files(tmp_path / "set", list(zip(maps, predicted, strict=True)), categories).score()
    assert [summary["pq"][group] for group in GROUPS] == [100, 100, 100]


def assert_equals_hotcoco(files):
    hotcoco = pytest.importorskip("hotcoco.panoptic")
    theirs = hotcoco.pq_compute(*map(str, files.arguments))
    ours = files.score()
    for group in GROUPS:
        for metric in ("pq", "sq", "rq"):
            value = theirs[group.capitalize()][metric]
            assert ours[metric][group] == (None if value < 0 else pytest.approx(100 * value, abs=1e-9))
    each = zip(files.panopticapi()[1], ours["counts"]["per_category"].values(), strict=True)
    known = {id_: counts for id_, counts in each if any(counts.values())}
    assert known == {
        id_: {name: row[name] for name in ("tp", "fp", "fn")}
        for id_, row in theirs["per_class"].items()
        if row["tp"] + row["fp"] + row["fn"]
    }


def random_files(folder, seed, images):
    rng = np.random.default_rng(seed)
    pairs = [[with_pixels(m.ids, list(map(row_of, m.segments))) for m in random_pair(rng)] for _ in range(images)]
    return write_files(folder / "set", pairs, LABELS.to_coco())


def row_of(segment):
    category = LABELS.categories[segment.category].dataset_id
    return {"id": segment.id, "category_id": category, "iscrowd": int(segment.is_crowd)}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_random_files_equal_panopticapi(tmp_path_factory, seed, images):
    assert_equals_panopticapi(random_files(tmp_path_factory.mktemp("pq"), seed, images))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_random_files_equal_hotcoco(tmp_path_factory, seed, images):
    assert_equals_hotcoco(random_files(tmp_path_factory.mktemp("pq"), seed, images))
