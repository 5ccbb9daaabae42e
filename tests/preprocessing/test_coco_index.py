import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from infra.errors import TesseraError
from preprocessing.coco import read_index
from preprocessing.files import File
from preprocessing.source import read_sample, shared_pictures
from tests.support.coco_folder import CocoFolder

MINI = Path(__file__).resolve().parents[3] / "shared/data/coco_mini"


def refusal(coco: CocoFolder) -> str:
    with pytest.raises(TesseraError) as caught:
        coco.index()
    return str(caught.value)


def rejections(coco: CocoFolder) -> list[tuple[str, str]]:
    return [(r.file, r.reason) for r in coco.index().rejected]


def test_a_sound_set_is_read_whole_and_in_order(coco: CocoFolder):
    index = coco.index()
    assert [r.image_id for r in index.records] == list(range(1, 13))
    assert index.rejected == ()
    assert len(index.labels) == 7


@pytest.mark.skipif(not MINI.exists(), reason=f"{MINI} is not there")
@pytest.mark.parametrize(("split", "count"), [("train2017", 100), ("val2017", 50)])
def test_real_coco_is_read_whole(split: str, count: int):
    index = read_index(MINI, split)
    assert (len(index.records), len(index.rejected), len(index.labels)) == (count, 0, 133)
    for record in index.records[::10]:
        image, truth = read_sample(record, index.labels)
        assert image.startswith(b"\xff\xd8")
        assert truth.size == record.size
        assert [s.area for s in truth.segments] == [row["area"] for row in record.segments_info]


@pytest.mark.parametrize("part", ["root", "json", "masks", "images"])
def test_a_missing_part_is_named(coco: CocoFolder, part: str):
    path = getattr(coco, part)
    path.unlink() if path.is_file() else shutil.rmtree(path)
    assert refusal(coco).startswith(f"{path}: not found")


def test_another_split_is_missed_by_its_name(coco: CocoFolder):
    with pytest.raises(TesseraError, match=r"panoptic_test2017\.json: not found"):
        read_index(coco.root, "test2017")


@pytest.mark.parametrize("part", ["masks", "images"])
def test_a_file_in_place_of_a_folder_is_named(coco: CocoFolder, part: str):
    path = getattr(coco, part)
    shutil.rmtree(path)
    path.touch()
    assert str(path) in refusal(coco)


def test_a_split_may_have_a_dot_in_its_name(coco: CocoFolder):
    coco.json.rename(coco.json.with_name("panoptic_train_v1.5.json"))
    coco.masks.rename(coco.masks.with_name("panoptic_train_v1.5"))
    coco.images.rename(coco.images.with_name("train_v1.5"))
    assert len(read_index(coco.root, "train_v1.5").records) == 12


@pytest.mark.parametrize("text", ["", "{", '{"images": [', "\0", "null", "5", "[]", "[{}]", '"text"'])
def test_a_json_that_is_no_object_is_named(coco: CocoFolder, text: str):
    coco.json.write_text(text)
    assert str(coco.json) in refusal(coco)


@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
def test_a_json_without_a_list_is_named(coco: CocoFolder, name: str):
    with coco.editing() as content:
        del content[name]
    assert f"{coco.json}: lacks ['{name}']" in refusal(coco)


def test_a_detection_json_is_told_apart_by_its_annotations(coco: CocoFolder):
    with coco.editing() as content:
        content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "segmentation": []}]
    assert "detection JSON" in refusal(coco)


def test_a_detection_json_is_told_apart_by_its_categories(coco: CocoFolder):
    with coco.editing() as content:
        for category in content["categories"]:
            del category["isthing"]
    assert str(coco.json) in refusal(coco)
    assert "detection JSON" in refusal(coco)


def test_a_repeated_category_is_named(coco: CocoFolder):
    with coco.editing() as content:
        content["categories"].append(content["categories"][3])
    assert "[18]" in refusal(coco)


def test_an_empty_set_is_an_error(coco: CocoFolder):
    with coco.editing() as content:
        content["images"], content["annotations"] = [], []
    assert f"{coco.json}: the data set is empty" in refusal(coco)


def test_a_png_without_entry_is_no_sample(coco: CocoFolder):
    for name in ("stray.png", "._macos.png"):
        shutil.copy(coco.mask(0), coco.masks / name)
    assert rejections(coco) == []
    assert [(d.file, d.usable) for d in coco.index().unused] == [(str(coco.masks / "stray.png"), True)]
    assert len(coco.index().records) == 12


def test_a_json_for_a_part_of_the_images_makes_a_smaller_set(coco: CocoFolder):
    with coco.editing() as content:
        content["images"], content["annotations"] = content["images"][:4], content["annotations"][:4]
    assert rejections(coco) == []
    assert (len(coco.index().records), len(coco.index().unused)) == (4, 8)


@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, {"a": 1}, [7], [None], "text"], ids=str)
def test_a_list_of_something_else_is_named(coco: CocoFolder, name: str, value):
    with coco.editing() as content:
        content[name] = value
    assert str(coco.json) in refusal(coco)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(coco: CocoFolder):
    coco.json.parent.chmod(0)
    try:
        assert "Permission denied" in refusal(coco)
    finally:
        coco.json.parent.chmod(0o755)


@pytest.mark.parametrize("value", [2, "yes", None, 0.5])
def test_a_category_is_a_thing_or_not(coco: CocoFolder, value):
    with coco.editing() as content:
        content["categories"][0]["isthing"] = value
    assert f"{coco.json}: category" in refusal(coco)


def test_an_image_without_annotation_is_set_aside(coco: CocoFolder):
    with coco.editing() as content:
        content["images"].append({"id": 99, "file_name": "lone.jpg", "height": 48, "width": 48})
    assert rejections(coco) == [(str(coco.images / "lone.jpg"), "the image has no annotation in the JSON")]


def test_an_annotation_without_image_is_set_aside(coco: CocoFolder):
    with coco.editing() as content:
        content["images"].pop(4)
    assert rejections(coco) == [(str(coco.mask(4)), "image id 5 is not in the JSON's images, expected once")]
    assert [r.image_id for r in coco.index().records] == [1, 2, 3, 4, *range(6, 13)]


def test_an_image_annotated_twice_is_set_aside_with_both(coco: CocoFolder):
    with coco.editing() as content:
        content["annotations"].append(content["annotations"][6])
    assert rejections(coco) == [(str(coco.mask(6)), "2 entries have the image id 7, expected one")] * 2
    assert [r.image_id for r in coco.index().records] == [*range(1, 7), *range(8, 13)]


def test_an_image_listed_twice_is_set_aside(coco: CocoFolder):
    with coco.editing() as content:
        content["images"].append({**content["images"][6], "file_name": "other.jpg"})
    assert rejections(coco) == [(str(coco.mask(6)), "image id 7 is listed 2 times in the JSON's images, expected once")]
    assert 7 not in [r.image_id for r in coco.index().records]


@pytest.mark.parametrize("kind", ["images", "annotations"])
@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd", "a/../../../b.png"])
def test_a_file_name_that_leads_outside_is_set_aside(coco: CocoFolder, kind: str, name: str):
    with coco.editing() as content:
        content[kind][2]["file_name"] = name
    assert any(name in reason and "outside" in reason for _, reason in rejections(coco))
    assert 3 not in [r.image_id for r in coco.index().records]


def test_files_may_lie_in_folders_below(coco: CocoFolder):
    for path in (coco.image(2), coco.mask(2)):
        (path.parent / "aachen").mkdir()
        path.rename(path.parent / "aachen" / path.name)
    with coco.editing() as content:
        for kind in ("images", "annotations"):
            content[kind][2]["file_name"] = f"aachen/{content[kind][2]['file_name']}"
    assert rejections(coco) == []
    assert coco.sample(2)[1].size == (48, 48)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("annotations", "image_id", None),
        ("annotations", "image_id", "no image"),
        ("annotations", "image_id", [3]),
        ("annotations", "file_name", None),
        ("annotations", "file_name", 5),
        ("annotations", "file_name", "a\0b.png"),
        ("annotations", "segments_info", None),
        ("annotations", "segments_info", [5]),
        ("images", "file_name", 5),
        ("images", "file_name", "a\0b.jpg"),
        ("images", "height", None),
        ("images", "width", "wide"),
        ("images", "width", 48.5),
        ("images", "width", True),
        ("annotations", "image_id", True),
        ("annotations", "image_id", 3.5),
        ("images", "id", "3"),
    ],
)
def test_an_entry_of_the_wrong_type_costs_its_own_sample_alone(coco: CocoFolder, kind: str, name: str, value):
    with coco.editing() as content:
        content[kind][2][name] = value
    assert_only_the_third_is_lost(coco)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("annotations", "image_id"),
        ("annotations", "file_name"),
        ("annotations", "segments_info"),
        ("images", "id"),
        ("images", "file_name"),
        ("images", "height"),
    ],
)
def test_an_entry_that_lacks_a_field_costs_its_own_sample_alone(coco: CocoFolder, kind: str, name: str):
    with coco.editing() as content:
        del content[kind][2][name]
    assert_only_the_third_is_lost(coco)


def test_sizes_may_be_left_open(coco: CocoFolder):
    with coco.editing() as content:
        content["images"][2] |= {"height": None, "width": None}
        del content["images"][3]["height"], content["images"][3]["width"]
    assert [coco.record(i).size for i in (2, 3, 4)] == [None, None, (48, 48)]
    assert coco.sample(2)[1].size == coco.sample(3)[1].size == (48, 48)


def test_whole_floats_are_integers(coco: CocoFolder):
    plain = [(r.image_id, r.size, coco.sample(p)[1].segments) for p, r in enumerate(coco.index().records)]
    with coco.editing() as content:
        for image in content["images"]:
            image |= {name: float(image[name]) for name in ("id", "height", "width")}
        for category in content["categories"]:
            category |= {"id": float(category["id"]), "isthing": bool(category["isthing"])}
            category["color"] = [float(channel) for channel in category["color"]]
        for annotation in content["annotations"]:
            annotation["image_id"] = float(annotation["image_id"])
            for row in annotation["segments_info"]:
                row |= {name: float(row[name]) for name in ("id", "category_id", "iscrowd", "area")}
    index = coco.index()
    assert all(type(r.image_id) is int for r in index.records)
    assert [(r.image_id, r.size, coco.sample(p)[1].segments) for p, r in enumerate(index.records)] == plain


def test_two_entries_without_image_id_cost_themselves_alone(coco: CocoFolder):
    with coco.editing() as content:
        del content["annotations"][3]["image_id"], content["annotations"][8]["image_id"]
    assert [r.image_id for r in coco.index().records] == [1, 2, 3, 5, 6, 7, 8, 10, 11, 12]
    assert any("image_id" in reason for _, reason in rejections(coco))


def test_names_as_image_ids_are_numbered_and_always_alike(coco: CocoFolder):
    """As Cityscapes' own converter to COCO's layout writes them."""
    with coco.editing() as content:
        for image, annotation in zip(content["images"], content["annotations"], strict=True):
            image["id"] = annotation["image_id"] = f"aachen_{image['id']:06d}"
    ids = [record.image_id for record in coco.index().records]
    assert len(set(ids)) == 12
    assert ids[0] == 225_080_815_496
    assert 0 <= min(ids) <= max(ids) < 10**12


def test_a_set_whose_every_sample_is_set_aside_tells_why(coco: CocoFolder):
    with coco.editing() as content:
        for annotation in content["annotations"]:
            annotation["image_id"] = 1.5
    assert "image_id is 1.5" in refusal(coco)


def assert_only_the_third_is_lost(coco: CocoFolder):
    """Whichever of read_index, fingerprint and read_sample finds it, the kind of error is the one for samples."""
    index = coco.index()
    others = [r for r in index.records if r.image_id != 3]
    assert [r.image_id for r in others] == [1, 2, *range(4, 13)]
    if len(index.records) == len(others):
        assert index.rejected
        return
    coco.record(2).fingerprint()
    assert coco.reason(2)


def test_pictures_of_another_split_are_known_by_name_and_bytes(coco: CocoFolder):
    index = coco.index()
    other = replace(index, records=index.records[::-1])
    assert [r.image_id for r in shared_pictures(index, other)] == list(range(1, 13))
    shutil.copytree(coco.images, coco.root / "other")
    for position in range(2):
        coco.image(position).write_bytes(coco.image(position).read_bytes() + b"more" * position)
    there = str(coco.root / "other")
    moved = [replace(r, image=File(r.image.path.replace(str(coco.images), there))) for r in index.records]
    assert [r.image_id for r in shared_pictures(index, replace(index, records=tuple(moved)))] == [1, *range(3, 13)]
