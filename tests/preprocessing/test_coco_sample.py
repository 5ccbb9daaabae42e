import io
import os

import numpy as np
import pytest
from panopticapi.utils import rgb2id
from PIL import Image

from preprocessing.source import BadSample, read_sample
from tests.support.coco_folder import CocoFolder

CAT, SKY = 1, 92  # dataset ids of a thing and of stuff


def test_ids_are_dense_in_the_jsons_order_and_areas_counted(coco: CocoFolder):
    for position in range(12):
        image, truth = coco.sample(position)
        rows, ids = coco.rows(position), rgb2id(np.asarray(Image.open(coco.mask(position))))
        assert image == coco.image(position).read_bytes()
        assert truth.ids.dtype == np.int32
        assert [s.id for s in truth.segments] == list(range(1, len(rows) + 1))
        assert np.array_equal(truth.ids == 0, ids == 0)
        for row, segment in zip(rows, truth.segments, strict=True):
            assert np.array_equal(truth.ids == segment.id, ids == row["id"])
            assert (segment.area, list(segment.box)) == ((ids == row["id"]).sum(), row["bbox"])


def test_areas_and_boxes_of_the_json_are_not_believed(coco: CocoFolder):
    honest = coco.sample(0)[1].segments
    with coco.editing() as content:
        for row in content["annotations"][0]["segments_info"]:
            row |= {"area": 10**6, "bbox": [-3, 0, 1, 1]}
    assert coco.sample(0)[1].segments == honest


@pytest.mark.parametrize("part", ["image", "mask"])
def test_a_missing_file_is_named(coco: CocoFolder, part: str):
    path = getattr(coco, part)(3)
    path.unlink()
    assert str(path) in (reason := coco.reason(3))
    assert "No such file" in reason


@pytest.mark.parametrize("part", ["image", "mask"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "zeros", "zeros at the end"])
def test_an_unreadable_file_is_named(coco: CocoFolder, part: str, damage: str):
    path = getattr(coco, part)(3)
    whole = path.read_bytes()
    half = whole[: len(whole) // 2]
    damaged = {
        "truncated": half,
        "empty": b"",
        "text": b"<html>404</html>",
        "zeros": bytes(len(whole)),
        "zeros at the end": half + bytes(len(whole) - len(half)),  # a download cut in a preallocated file
    }
    path.write_bytes(damaged[damage])
    assert str(path) in (reason := coco.reason(3))
    assert "not a readable" in reason


@pytest.mark.parametrize("part", ["image", "mask"])
def test_random_damage_is_never_more_than_a_bad_sample(coco: CocoFolder, part: str):
    rng, path, record = np.random.default_rng(0), getattr(coco, part)(3), coco.record(3)
    whole, labels = path.read_bytes(), coco.index().labels
    for _ in range(300):
        data = np.frombuffer(whole, np.uint8).copy()
        data[rng.integers(0, data.size, 3)] = rng.integers(0, 256, 3)
        path.write_bytes(data.tobytes()[: rng.integers(1, 2 * data.size)])
        try:
            read_sample(record, labels)
        except BadSample as problem:
            assert str(problem)  # noqa: PT017


@pytest.mark.parametrize(("mode", "told"), [("RGBA", "transparent pixels"), ("I;16", "16-bit gray")])
def test_a_mask_of_another_kind_is_named(coco: CocoFolder, mode: str, told: str):
    Image.new(mode, (48, 48)).save(coco.mask(3))
    assert str(coco.mask(3)) in (reason := coco.reason(3))
    assert told in reason


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_an_image_of_another_mode_is_fine(coco: CocoFolder, mode: str):
    Image.new(mode, (48, 48)).save(coco.image(3))
    assert coco.sample(3)[0] == coco.image(3).read_bytes()


def test_an_image_of_another_size_is_told(coco: CocoFolder):
    Image.new("RGB", (40, 48)).save(coco.image(3))
    assert coco.reason(3) == f"{coco.image(3)}: the image is 40x48, the JSON says 48x48"


def test_a_mask_of_another_size_is_told(coco: CocoFolder):
    coco.write_ids(3, coco.ids(3)[:30])
    assert f"{coco.mask(3)}: the PNG is 48x30, the JSON says 48x48" in coco.reason(3)


def test_a_json_with_another_size_is_told(coco: CocoFolder):
    with coco.editing() as content:
        content["images"][3] |= {"height": 64, "width": 32}
    assert f"{coco.image(3)}: the image is 48x48, the JSON says 32x64" in coco.reason(3)


def test_the_rotation_in_exif_is_ignored_as_the_annotations_do(coco: CocoFolder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 48)).save(coco.image(3), exif=exif)
    coco.redraw(3, np.ones((48, 30), np.int32), {1: SKY})
    with coco.editing() as content:
        content["images"][3]["width"] = 30
    assert coco.sample(3)[1].size == (48, 30)


def test_an_id_of_the_png_alone_is_named_with_its_pixels(coco: CocoFolder):
    ids = coco.ids(3)
    ids[10:12, 5:10] = 987654
    coco.write_ids(3, ids)
    expected = "segment 987654 covers 10 px, the first at x=5, y=10, but is not in the JSON"
    assert coco.reason(3) == f"{coco.mask(3)}: {expected}"


def test_an_id_of_the_json_alone_is_named(coco: CocoFolder):
    with coco.editing() as content:
        content["annotations"][3]["segments_info"].append({"id": 987654, "category_id": 1})
    assert coco.reason(3) == f"{coco.mask(3)}: segment 987654 is in the JSON but has no pixel in the PNG"


def test_an_unknown_category_is_named(coco: CocoFolder):
    with coco.editing() as content:
        content["annotations"][3]["segments_info"][0]["category_id"] = 2
    assert coco.reason(3) == f"{coco.mask(3)}: segment {coco.rows(3)[0]['id']} has the unknown category 2"


def test_a_repeated_segment_is_named(coco: CocoFolder):
    with coco.editing() as content:
        rows = content["annotations"][3]["segments_info"]
        rows.append(rows[0])
    assert coco.reason(3) == f"{coco.mask(3)}: segment {rows[0]['id']} is listed more than once"


@pytest.mark.parametrize("value", [0, -1, 2**24, 2**31 - 1, 2**31, 2**40, -(2**40)])
def test_an_id_out_of_range_is_named(coco: CocoFolder, value: int):
    with coco.editing() as content:
        content["annotations"][3]["segments_info"][0]["id"] = value
    assert str(value) in coco.reason(3)


@pytest.mark.parametrize("name", ["id", "category_id"])
@pytest.mark.parametrize("value", [None, "many", "5", True, 5.5, [1], float("inf"), float("nan")])
def test_a_number_that_is_none_is_named(coco: CocoFolder, name: str, value):
    with coco.editing() as content:
        content["annotations"][3]["segments_info"][0][name] = value
    assert name in coco.reason(3)


@pytest.mark.parametrize("value", [5, 0.5, "no", "0", -1, [], {}])
def test_a_crowd_is_one_or_not(coco: CocoFolder, value):
    with coco.editing() as content:
        content["annotations"][3]["segments_info"][0]["iscrowd"] = value
    assert f"iscrowd {value!r}; expected 0 or 1" in coco.reason(3)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("part", ["image", "mask"])
def test_a_pipe_in_the_place_of_a_file_is_named(coco: CocoFolder, part: str):
    path = getattr(coco, part)(3)
    path.unlink()
    os.mkfifo(path)
    assert f"{path}: cannot be read (it is no regular file)" in coco.reason(3)


def test_more_segments_than_labels_is_told(coco: CocoFolder):
    rows = [{"id": i, "category_id": CAT} for i in range(1, 65536)]
    with coco.editing() as content:
        content["annotations"][3]["segments_info"] = rows
    assert "65535 segments" in coco.reason(3)


def test_an_image_that_is_all_void_is_fine(coco: CocoFolder):
    coco.redraw(3, np.zeros((48, 48), np.int32), {})
    truth = coco.sample(3)[1]
    assert truth.segments == ()
    assert not truth.ids.any()


def test_an_image_of_stuff_alone_is_fine(coco: CocoFolder):
    coco.redraw(3, np.full((48, 48), 2**24 - 1, np.int32), {2**24 - 1: SKY})
    (sky,) = coco.sample(3)[1].segments
    assert (sky.is_thing, sky.area, sky.box, sky.centroid) == (False, 48 * 48, (0, 0, 48, 48), None)


def test_a_crowd_has_no_centroid_and_its_neighbour_has(coco: CocoFolder):
    ids = np.ones((48, 48), np.int32)
    ids[:, 24:] = 2
    coco.redraw(3, ids, {1: CAT, 2: CAT})
    with coco.editing() as content:
        content["annotations"][3]["segments_info"][0]["iscrowd"] = 1
    crowd, cat = coco.sample(3)[1].segments
    assert (crowd.is_crowd, crowd.is_thing, crowd.centroid) == (True, True, None)
    assert (cat.is_crowd, cat.centroid) == (False, (35.5, 23.5))


def test_a_one_pixel_instance_is_its_own_centroid(coco: CocoFolder):
    ids = np.zeros((48, 48), np.int32)
    ids[7, 40] = 5
    coco.redraw(3, ids, {5: CAT})
    (cat,) = coco.sample(3)[1].segments
    assert (cat.area, cat.box, cat.centroid) == (1, (40, 7, 1, 1), (40.0, 7.0))


def test_a_jpeg_as_mask_is_a_bad_sample(coco: CocoFolder):
    buffer = io.BytesIO()
    Image.open(coco.image(3)).save(buffer, format="JPEG")
    coco.mask(3).write_bytes(buffer.getvalue())
    assert f"{coco.mask(3)}: not a readable panoptic PNG (the data is not a PNG)" in coco.reason(3)


def test_what_the_json_leaves_open_is_no_lie_and_an_unknown_category_is_none(coco: CocoFolder):
    """Stuff of the first category beside it: it was counted as one of that."""
    ids = np.ones((48, 48), np.int32)
    ids[:, 24:] = 2
    coco.redraw(3, ids, {1: SKY, 2: 12345})
    with coco.editing() as content:
        content["categories"] = [c for c in content["categories"] if c["id"] == SKY]
        for row in content["annotations"][3]["segments_info"]:
            row |= {"area": None, "bbox": []}
    found = coco.record(3).examine(coco.index().labels)
    assert [(d.problem, d.segment) for d in found.defects] == [("segment 2 has the unknown category 12345", 2)]
    assert [(s.id, s.category, s.area) for s in found.truth.segments] == [(1, 0, 24 * 48)]
    assert np.array_equal(found.truth.ids, np.where(ids == 1, 1, 0))


@pytest.mark.parametrize("value", [1.9, "1", True, None, [1], 1e300])
@pytest.mark.parametrize("name", ["id", "category_id"])
def test_ids_that_are_no_integers_are_named(coco: CocoFolder, name: str, value):
    with coco.editing() as content:
        content["annotations"][3]["segments_info"][0][name] = value
    assert f"no integer {name!r} but {value!r}" in coco.reason(3)
