"""Whatever is wrong with files to be scored is said with the file's name; the command that scores them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.coco_files import main
from infra.errors import TesseraError
from preprocessing import rgb_ids
from tests.evaluation.test_pq_truth import LABELS
from tests.support.pq_files import write_files

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
    assert message(files) == f"prediction/1.png: {size[1]}x{size[0]} px, the truth is 4x3 px"


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
    "a folder": (folder, "no regular file"),
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
