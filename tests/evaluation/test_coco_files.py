"""PQ of files: equal to panopticapi and hotcoco on real and random maps; whatever is wrong with a file is said."""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from panopticapi.evaluation import pq_compute_single_core
from PIL import Image

from evaluation.coco_files import main, score_files
from infra.errors import TesseraError
from preprocessing import rgb_ids
from tests.evaluation.test_pq_truth import LABELS, random_pair

COCO_MINI = Path(__file__).resolve().parents[3] / "shared/data/coco_mini/annotations"
GROUPS = {"all": None, "things": True, "stuff": False}


@dataclass(frozen=True)
class Files:
    """Both sides in COCO's layout in one folder: truth.json, truth/1.png and so on."""

    root: Path

    def json(self, side):
        return self.root / f"{side}.json"

    def png(self, side, image):
        return self.root / side / f"{image}.png"

    @property
    def arguments(self):
        return self.json("truth"), self.json("prediction"), self.root / "truth", self.root / "prediction"

    def score(self):
        return score_files(*self.arguments)

    @contextmanager
    def editing(self, side):
        content = json.loads(self.json(side).read_text())
        yield content
        self.json(side).write_text(json.dumps(content))

    def panopticapi(self):
        """Its statistics object and the categories, from the same files."""
        true, predicted = (json.loads(self.json(side).read_text()) for side in ("truth", "prediction"))
        by_image = {entry["image_id"]: entry for entry in predicted["annotations"]}
        pairs = [(entry, by_image[entry["image_id"]]) for entry in true["annotations"]]
        categories = {c["id"]: c for c in true["categories"]}
        return pq_compute_single_core(0, pairs, *self.arguments[2:], categories), categories


def write_files(root, pairs, categories):
    """pairs: (ids, rows) of truth and of prediction; areas are counted."""
    for side, maps in zip(("truth", "prediction"), zip(*pairs, strict=True), strict=True):
        (root / side).mkdir(parents=True)
        annotations, images = [], []
        for image, (ids, rows) in enumerate(maps, start=1):
            (root / side / f"{image}.png").write_bytes(rgb_ids.write_png(ids))
            area = dict(zip(*(values.tolist() for values in np.unique(ids, return_counts=True)), strict=True))
            info = [{"iscrowd": 0, **row, "area": area.get(row["id"], 0), "bbox": [0, 0, 1, 1]} for row in rows]
            annotations.append({"image_id": image, "file_name": f"{image}.png", "segments_info": info})
            height, width = ids.shape
            images.append({"id": image, "file_name": f"{image}.jpg", "height": height, "width": width})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{side}.json").write_text(json.dumps(content))
    return Files(root)


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
    """A truth and a prediction; the latter lists what it has pixels of."""
    prediction = truth
    for perturb in perturbations:
        truth, prediction = perturb(rng, truth, prediction, categories)
    present = set(np.unique(prediction[0]).tolist())
    return truth, (prediction[0], [row for row in prediction[1] if row["id"] in present])


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
    pairs = [[(m.ids, list(map(row_of, m.segments))) for m in random_pair(rng)] for _ in range(images)]
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


IDS = np.array([[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 70_000, 70_000]], np.int32)
ROWS = [{"id": i, "category_id": c} for i, c in ((1, 3), (2, 7), (70_000, 90))]


@pytest.fixture
def files(tmp_path):
    """One image with equal sides."""
    return write_files(tmp_path / "set", [[(IDS, ROWS)] * 2], LABELS.to_coco())


def message(files):
    """Of the error; the folder's path left out."""
    with pytest.raises(TesseraError) as caught:
        files.score()
    return str(caught.value).replace(f"{files.root}/", "")


@pytest.mark.parametrize("size", [(3, 5), (4, 3), (12, 1)])
def test_another_size_is_refused(files, size):
    files.png("prediction", 1).write_bytes(rgb_ids.write_png(np.resize(IDS, size)))
    assert message(files) == f"prediction/1.png: {size[1]}x{size[0]} px, the truth is 4x3"


def remove_prediction(content):
    content["annotations"].clear()


def other_image(content):
    content["annotations"][0]["image_id"] = 2


@pytest.mark.parametrize("edit", [remove_prediction, other_image])
def test_an_image_without_prediction_is_named(files, edit):
    with files.editing("prediction") as content:
        edit(content)
    assert message(files) == "prediction.json: no prediction for image 1"


def test_predictions_of_other_images_are_not_counted(files):
    before = files.score()
    with files.editing("prediction") as content:
        content["annotations"].append({"image_id": 9, "file_name": "none.png", "segments_info": []})
    assert files.score() == before


def grey(path):
    Image.fromarray(IDS.astype(np.uint8)).save(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "missing": (Path.unlink, "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "not a PNG"),
    "no picture": (lambda path: path.write_text("<html>"), "not a PNG"),
    "cut short": (cut, "cut short"),
    "grey": (grey, "8-bit RGB"),
    "a folder": (folder, "Is a directory"),
}


@pytest.mark.parametrize("side", ["truth", "prediction"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_an_unreadable_png_is_named(files, side, kind):
    damage, reason = DAMAGE[kind]
    damage(files.png(side, 1))
    assert message(files).startswith(f"{side}/1.png: not a readable panoptic PNG (")
    assert reason in message(files)


def test_a_predicted_id_only_in_the_png_is_refused(files):
    with files.editing("prediction") as content:
        del content["annotations"][0]["segments_info"][0]
    assert message(files) == f"prediction/1.png: 4 px have ids that are not in the JSON: {IDS.ravel()[0]}"


def test_a_predicted_id_only_in_the_png_is_named(files):
    with files.editing("prediction") as content:
        del content["annotations"][0]["segments_info"][2]
    assert "70000" in message(files)


def test_a_predicted_id_only_in_the_json_is_named(files):
    with files.editing("prediction") as content:
        content["annotations"][0]["segments_info"].append({"id": 5, "category_id": 3})
    assert message(files) == "prediction/1.png: segment 5 of the JSON has no pixel in it"


@pytest.mark.parametrize("side", ["truth", "prediction"])
def test_a_repeated_id_is_refused(files, side):
    with files.editing(side) as content:
        content["annotations"][0]["segments_info"].append({"id": 2, "category_id": 3})
    assert message(files) == f"{side}/1.png: the JSON lists a segment of it more than once"


@pytest.mark.parametrize("side", ["truth", "prediction"])
@pytest.mark.parametrize("category", [4, 0, -1, "3", None])
def test_an_unknown_category_is_named(files, side, category):
    with files.editing(side) as content:
        content["annotations"][0]["segments_info"][1]["category_id"] = category
    assert message(files) == f"{side}/1.png: the category {category!r} is not in the truth's JSON"


@pytest.mark.parametrize("side", ["truth", "prediction"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\xfa", b"{'a': 1}", None])
def test_broken_json_is_named(files, side, content):
    files.json(side).unlink() if content is None else files.json(side).write_bytes(content)
    assert message(files).startswith(f"{side}.json: not readable JSON (")


@pytest.mark.parametrize("side", ["truth", "prediction"])
@pytest.mark.parametrize("content", ["[]", "5", "null", "{}", '{"annotations": null}', '{"annotations": {}}'])
def test_json_of_something_else_is_named(files, side, content):
    files.json(side).write_text(content)
    assert message(files) == f"{side}.json: expected a COCO panoptic JSON with annotations"


def without(*names):
    return {name: value for name, value in LABELS.to_coco()[0].items() if name not in names}


BAD_CATEGORIES = [[], None, {}, [{}], ["cat"], [without("id")], [without("isthing")], [without(), without()]]


@pytest.mark.parametrize("categories", BAD_CATEGORIES)
def test_bad_categories_are_refused_with_the_truths_json(files, categories):
    with files.editing("truth") as content:
        content["categories"] = categories
    assert message(files).startswith("truth.json: categor")


def test_missing_categories_are_refused_but_predictions_need_none(files):
    before = files.score()
    for side in ("prediction", "truth"):
        with files.editing(side) as content:
            del content["categories"]
        if side == "prediction":
            assert files.score() == before
    assert message(files) == "truth.json: categories: the list is empty"


def at(*path):
    """Sets, or without a value removes, what is at that path of an entry of `annotations`."""

    def edit(annotations, *value):
        *inner, last = [0, *path]
        for key in inner:
            annotations = annotations[key]
        if value:
            annotations[last] = value[0]
        else:
            del annotations[last]

    return edit


ROW = ("segments_info", 1)
MALFORMED = {
    "entry is null": (at(), None),
    "entry is a list": (at(), [1]),
    "no image_id": (at("image_id"),),
    "image_id is a list": (at("image_id"), [1]),
    "no file_name": (at("file_name"),),
    "file_name is a number": (at("file_name"), 1),
    "file_name is null": (at("file_name"), None),
    "no segments_info": (at("segments_info"),),
    "segments_info is null": (at("segments_info"), None),
    "segments_info is an object": (at("segments_info"), {"1": {}}),
    "row is null": (at(*ROW), None),
    "row is a list": (at(*ROW), [2, 7]),
    "row has no id": (at(*ROW, "id"),),
    "id is null": (at(*ROW, "id"), None),
    "id is a list": (at(*ROW, "id"), [2]),
    "id is beyond int32": (at(*ROW, "id"), 2**31),
    "category_id is a list": (at(*ROW, "category_id"), [7]),
}


@pytest.mark.parametrize("side", ["truth", "prediction"])
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_entry_is_refused_with_its_file(files, side, kind):
    edit, *value = MALFORMED[kind]
    with files.editing(side) as content:
        edit(content["annotations"], *value)
    assert message(files).startswith(side)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("[" * 100_000, id="nested deeper than Python reads"),
        pytest.param('{"annotations": [], "categories": 5}', id="categories are a number"),
        pytest.param(
            '{"annotations": [], "categories": [{"id": Infinity, "name": "a", "isthing": 1}]}', id="id is infinite"
        ),
    ],
)
def test_a_malformed_json_is_refused(files, content):
    files.json("truth").write_text(content)
    assert message(files).startswith("truth.json: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("id", 2.5, id="an id that is no integer"),
        pytest.param("id", 0, id="the id of void"),
        pytest.param("id", -1, id="a negative id"),
        pytest.param("id", 2**24, id="an id that no PNG holds"),
        pytest.param("iscrowd", "0", id="a text, which counts as true"),
        pytest.param("iscrowd", 2, id="panopticapi takes only 1 as a crowd"),
    ],
)
def test_odd_values_in_the_truth_are_refused(files, name, value):
    with files.editing("truth") as content:
        content["annotations"][0]["segments_info"][1][name] = value
    assert message(files).startswith("truth")


def test_a_row_without_category_or_with_a_text_as_id_is_refused(files):
    with files.editing("prediction") as content:
        content["annotations"][0]["segments_info"][1]["id"] = "two"
    assert message(files).startswith("prediction/1.png: ")
    with files.editing("prediction") as content:
        content["annotations"][0]["segments_info"][1] = {"id": 2}
    assert message(files).startswith("prediction/1.png: ")


@pytest.mark.parametrize("side", ["truth", "prediction"])
def test_two_entries_for_one_image_are_refused(files, side):
    with files.editing(side) as content:
        content["annotations"] *= 2
    assert "image 1" in message(files)


TABLE = """\
             PQ     SQ     RQ  categories
all       55.56  66.67  55.56           3
things    33.33  50.00  33.33           2
stuff    100.00 100.00 100.00           1
"""


def one_wrong_class(files):
    """One thing is called the other one: one false positive, one false negative."""
    with files.editing("prediction") as content:
        content["annotations"][0]["segments_info"][2]["category_id"] = 3


def test_the_command_prints_a_table_with_a_dash_for_what_does_not_occur(files, capsys):
    one_wrong_class(files)
    command = [str(path) for path in files.arguments[:2]]
    assert main(command) == 0
    assert capsys.readouterr() == (TABLE, "")
    with files.editing("truth") as content:
        content["annotations"] = []
    assert main(command) == 0
    assert [line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]] == [["-", "-", "-", "0"]] * 3


def test_the_command_takes_other_folders_of_pngs(files, capsys):
    for side in ("truth", "prediction"):
        (files.root / side).rename(files.root / f"{side} elsewhere")
    jsons = [str(path) for path in files.arguments[:2]]
    assert main(jsons) == 1
    folders = [
        f"--{name}-pngs={files.root / side} elsewhere"
        for name, side in (("truth", "truth"), ("predicted", "prediction"))
    ]
    assert main([*jsons, *folders]) == 0
    assert "100.00" in capsys.readouterr().out


def test_the_command_says_what_is_wrong_and_exits_with_1(files, capsys):
    files.png("truth", 1).unlink()
    assert main([str(path) for path in files.arguments[:2]]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {files.png('truth', 1)}: not a readable panoptic PNG")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["truth.json"], ["a", "b", "c"], ["a", "b", "--pngs", "c"]])
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: python -m evaluation.coco_files" in capsys.readouterr().err


def test_it_runs_as_a_module(files):
    command = [sys.executable, "-m", "evaluation.coco_files", *files.arguments[:2]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split() == ["all", "100.00", "100.00", "100.00", "3"]
