"""What files to be scored say twice agrees, or is refused with the first difference; numbers are taken as written."""

import logging

import pytest

from evaluation.coco_files import main
from tests.evaluation.test_coco_files_checks import IDS, ROWS, files, message
from tests.evaluation.test_pq_truth import LABELS
from tests.support.cases import case, made
from tests.support.pq_files import write_files

__all__ = ["files"]


def command(root, capsys):
    """Exit code and what is said."""
    code = main([str(root / "truth.json"), str(root / "predictions.json")])
    return code, capsys.readouterr().err


def test_predictions_whose_categories_have_other_ids_are_refused(capsys):
    code, told = command(case("4-predictions-other-category-ids"), capsys)
    assert code == 1
    assert "category {'id': 1, 'name': 'car'" in told
    assert "has 1 'sky' (stuff)" in told


def test_a_truth_of_16_bits_is_never_scored(tmp_path, capsys):
    code, told = command(made("22-truth-png-16-bit", tmp_path), capsys)
    assert code == 1
    assert "truth/7.png" in told


@pytest.mark.parametrize("side", ["truth", "prediction"])
@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        pytest.param(
            lambda rows: rows.append({"id": 5, "category_id": 3}), "segment 5 of the JSON has no pixel", id="row"
        ),
        pytest.param(lambda rows: rows.pop(2), "2 px have ids that are not in the JSON: 70000", id="segment"),
    ],
)
def test_a_png_that_does_not_fit_its_json_is_refused(files, side, edit, problem):
    with files.editing(side) as content:
        edit(content["annotations"][0]["segments_info"])
    assert problem in message(files)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda c: c.update(name="other"), id="another name"),
        pytest.param(lambda c: c.update(id=8), id="another id for the name"),
        pytest.param(lambda c: c.update(isthing=1 - c["isthing"]), id="thing or stuff"),
    ],
)
def test_categories_that_contradict_the_truth_are_refused(files, edit):
    with files.editing("prediction") as content:
        edit(content["categories"][1])
    assert message(files).startswith("prediction.json: category {")


def test_lists_of_categories_may_be_shorter_longer_of_another_order_and_without_colours(files):
    before = files.score()
    with files.editing("prediction") as content:
        content["categories"] = [{"id": 50, "name": "more"}, *({"id": c["id"]} for c in content["categories"][:0:-1])]
    assert files.score() == before


@pytest.mark.parametrize("side", ["truth", "prediction"])
@pytest.mark.parametrize(("name", "value"), [("height", 5), ("width", 2), ("file_name", "2.jpg"), ("height", None)])
def test_images_that_contradict_each_other_or_their_pngs_are_refused(files, side, name, value):
    with files.editing(side) as content:
        content["images"][0][name] = value
    assert "image 1" in message(files)


def test_images_may_be_left_out_and_have_no_sizes(files):
    before = files.score()
    for side in ("truth", "prediction"):
        with files.editing(side) as content:
            content["images"][0] |= {"height": None, "width": None, "file_name": "elsewhere/1.png"}
        assert files.score() == before
        with files.editing(side) as content:
            del content["images"]
        assert files.score() == before


def test_an_annotation_of_no_image_is_refused(files):
    with files.editing("truth") as content:
        content["images"][0]["id"] = 4
    assert message(files) == "truth.json: image 1 of annotations is not in images"


def test_what_may_be_meant_is_told(tmp_path, caplog):
    files = write_files(tmp_path / "set", [[(IDS, ROWS)] * 2] * 2, LABELS.to_coco())
    before = files.score()
    assert not caplog.messages
    with files.editing("truth") as content:
        content["annotations"][1]["segments_info"][0]["area"] = 77
        content["images"].append({"id": 3})
    with files.editing("prediction") as content:
        for entry, name in zip(content["annotations"], ("2.png", "1.png"), strict=True):
            entry["file_name"] = name
    with caplog.at_level(logging.WARNING):
        assert files.score() == before
    told = [message.replace(f"{files.root}/", "") for message in caplog.messages]
    assert told == [
        "1 images are listed in the truth's JSON and have no entry in its annotations: not scored",
        "prediction/2.png: predicted for image 1, has the name of image 2",
        "prediction/1.png: predicted for image 2, has the name of image 1",
        "truth/2.png: 1 of 3 areas are other ones in the PNG: segment 1 has 77 in the JSON, 4 px",
    ]


@pytest.mark.parametrize("side", ["truth", "prediction"])
def test_whole_floats_are_integers_and_nothing_else_is(files, side):
    before = files.score()
    for place, name in (("segments_info", "category_id"), ("segments_info", "id"), (None, "image_id")):
        with files.editing(side) as content:
            entry = content["annotations"][0]
            target = entry[place][0] if place else entry
            good = target[name]
            target[name] = float(good)
        assert files.score() == before
        for wrong in (good + 0.9, str(good), True):
            with files.editing(side) as content:
                (content["annotations"][0][place][0] if place else content["annotations"][0])[name] = wrong
            assert message(files)
        with files.editing(side) as content:
            (content["annotations"][0][place][0] if place else content["annotations"][0])[name] = good


@pytest.mark.parametrize("side", ["truth", "prediction"])
@pytest.mark.parametrize("spelled", ["{side}/{name}", "masks/{side}/{name}", ".//{name}", "{stem}.jpg"])
def test_pngs_are_found_however_their_names_are_written(files, side, spelled):
    expected = files.score()
    with files.editing(side) as content:
        for entry in content["annotations"]:
            name = entry["file_name"]
            entry["file_name"] = spelled.format(side=side, name=name, stem=name.removesuffix(".png"))
    assert files.score() == expected
