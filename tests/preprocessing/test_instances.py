"""The layout `instances`: its samples and its index; what is wrong is named, and costs its own sample alone."""

import json
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from infra.errors import TesseraError
from preprocessing import layouts, rle
from preprocessing.instances import Instance, from_instances_and_semantics, read_index
from preprocessing.panoptic_map import PanopticMap
from preprocessing.source import BadSample, Defect, Index, read_sample
from tests.support.instance_maps import CAT, CATEGORIES, DOG, LABELS, SIZE, SKY, box, counts_of, dense, rows_of

BAD_SEGMENTATIONS = [
    ({"size": [8, 6], "counts": [48]}, "the RLE's size is [8, 6], expected [6, 8]"),
    ({"counts": [48]}, "the RLE's size is None"),
    ({"size": [6, 8], "counts": [40]}, "add up to 40, expected 48 = 6 * 8"),
    ({"size": [6, 8], "counts": [50, -2]}, "no list of integers"),
    ({"size": [6, 8], "counts": [47.5, 0.5]}, "no list of integers"),
    ({"size": [6, 8], "counts": None}, "no list of integers"),
    ({"size": [6, 8], "counts": "\x7f"}, "cannot be unpacked at its count 0"),
    ({"size": [6, 8], "counts": "o" * 999}, "cannot be unpacked at its count 0"),
    ({"size": [6, 8], "counts": "`"}, "ends within a count"),
    ([[1, 1, 2, 2]], "a polygon of 4 numbers"),
    ([[1, 1, 2, 2, 3, 3, 4]], "a polygon of 7 numbers"),
    ([1, 1, 2, 2, 3, 3], "a polygon 1, expected"),
    ([[1, 1, 2, 2, 3, "3"]], "other than numbers"),
    ([[1, 1, 2, 2, 3, float("nan")]], "the coordinate nan"),
    ([[1, 1, 2, 2, 3, 1e9]], "the coordinate 1000000000.0"),
    ("[[1,1,2,2,3,3]]", "expected polygons or RLE"),
    (None, "expected polygons or RLE"),
]


# ---- the layout


class Detections:
    """A data set in this layout that a test may damage at will."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.json = root / "annotations/instances_train.json"
        self.semantics, self.images = root / "annotations/semantic_train", root / "train"
        self.semantics.mkdir(parents=True)
        self.images.mkdir()
        self.content: dict = {"images": [], "annotations": [], "categories": CATEGORIES}

    def add(self, semantic: np.ndarray, annotations: list[tuple], name: str = "a.jpg") -> None:
        """annotations: category, segmentation, iscrowd."""
        number = len(self.content["images"]) + 1
        Image.new("RGB", semantic.shape[::-1]).save(self.images / name)
        Image.fromarray(semantic).save(self.semantics / Path(name).with_suffix(".png").name)
        height, width = semantic.shape
        self.content["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        for category, segmentation, crowd in annotations:
            row = {"id": len(self.content["annotations"]) + 1, "image_id": number, "category_id": category}
            self.content["annotations"].append({**row, "segmentation": segmentation, "iscrowd": crowd, "bbox": [0] * 4})
        self.json.write_text(json.dumps(self.content))

    @contextmanager
    def editing(self) -> Iterator[dict]:
        yield self.content
        self.json.write_text(json.dumps(self.content))

    def index(self) -> Index:
        return read_index(self.root, "train")

    def truth(self) -> PanopticMap:
        index = self.index()
        return read_sample(index.records[0], index.labels)[1]

    def defects(self) -> list[Defect]:
        index = self.index()
        return [d for record in index.records for d in record.examine(index.labels).defects]

    def reason(self) -> str:
        index = self.index()
        with pytest.raises(BadSample) as caught:
            read_sample(index.records[0], index.labels)
        return str(caught.value)

    def refusal(self) -> str:
        with pytest.raises(TesseraError) as caught:
            self.index()
        return str(caught.value)


SEMANTIC = np.full(SIZE, SKY, np.uint8)
SEMANTIC[4:] = DOG
ANNOTATIONS = [
    (CAT, [[0, 0, 4, 0, 4, 3, 0, 3]], 0),
    (DOG, {"size": list(SIZE), "counts": counts_of(box(2, 1, 3, 2))}, 0),
    (CAT, {"size": list(SIZE), "counts": counts_of(box(0, 0, 8, 2))}, 1),
]


@pytest.fixture
def detections(tmp_path: Path) -> Detections:
    made = Detections(tmp_path / "set")
    made.add(SEMANTIC, ANNOTATIONS)
    return made


def test_a_sample_is_what_its_arrays_would_give(detections: Detections):
    instances = [Instance(c, dense(rle.runs_of(s, SIZE), SIZE), bool(crowd)) for c, s, crowd in ANNOTATIONS]
    expected = from_instances_and_semantics(SEMANTIC, instances, LABELS)
    assert np.array_equal(detections.truth().ids, expected.ids)
    assert detections.truth().segments == expected.segments
    assert rows_of(expected) == [(CAT, False, 8), (DOG, False, 6), (CAT, True, 7), (SKY, False, 11)]
    assert detections.defects() == []


def test_compressed_rle_is_read(detections: Detections):
    packed = coco_mask.encode(np.asfortranarray(box(2, 1, 3, 2).astype(np.uint8)))["counts"].decode()
    before = detections.truth()
    with detections.editing() as content:
        content["annotations"][1]["segmentation"]["counts"] = packed
    assert np.array_equal(detections.truth().ids, before.ids)


def test_sixteen_bits_hold_larger_ids(tmp_path: Path):
    made = Detections(tmp_path)
    made.content["categories"] = [{"id": 1000, "name": "sky", "isthing": 0}, {"id": 70000, "name": "cat", "isthing": 1}]
    made.add(np.full(SIZE, 1000, np.uint16), [(70000, [[0, 0, 4, 0, 4, 3, 0, 3]], 0)])
    assert [s.category for s in made.truth().segments] == [1, 0]


@pytest.mark.parametrize(("segmentation", "told"), BAD_SEGMENTATIONS)
def test_a_mask_that_cannot_be_read_is_named(detections: Detections, segmentation, told: str):
    with detections.editing() as content:
        content["annotations"][1]["segmentation"] = segmentation
    (defect,) = (d for d in detections.defects() if not d.usable)
    assert defect.problem.startswith("annotation 2: ")
    assert told in defect.problem
    assert (defect.segment, defect.image_id) == (2, 1)


@pytest.mark.parametrize("segmentation", [[], [[9, 0, 14, 0, 14, 3, 9, 3]], [[-7, -5, -2, -5, -2, -1, -7, -1]]])
def test_an_instance_without_a_pixel_is_dropped_and_told(detections: Detections, segmentation: list):
    with detections.editing() as content:
        content["annotations"][1]["segmentation"] = segmentation
    (defect,) = detections.defects()
    assert (defect.problem, defect.usable) == ("annotation 2 has no pixel, or none that others leave it", True)
    assert DOG not in [row[0] for row in rows_of(detections.truth())]


def test_covered_stuff_is_dropped_and_told(detections: Detections):
    whole = {"size": list(SIZE), "counts": [0, 48]}
    with detections.editing() as content:
        content["annotations"] = [{"id": 8, "image_id": 1, "category_id": CAT, "segmentation": whole}]
    assert [d.problem for d in detections.defects()] == ["stuff 'sky' has no pixel, or none that others leave it"]


@pytest.mark.parametrize(
    ("category", "told"), [(9, "9 is unknown"), (SKY, "(sky) is stuff"), (None, "None is unknown")]
)
def test_an_instance_of_no_thing_is_named(detections: Detections, category, told: str):
    with detections.editing() as content:
        content["annotations"][0]["category_id"] = category
    assert "annotation 1: the category" in (reason := detections.reason())
    assert told in reason


def test_an_unknown_category_of_the_png_is_named(detections: Detections):
    semantic = SEMANTIC.copy()
    semantic[5, 6:] = 9
    Image.fromarray(semantic).save(detections.semantics / "a.png")
    assert "the category 9 is unknown (2 px, the first at x=6, y=5)" in detections.reason()


def test_0_and_255_are_void(detections: Detections):
    semantic = SEMANTIC.copy()
    semantic[3, :4], semantic[3, 4:] = 0, 255
    Image.fromarray(semantic).save(detections.semantics / "a.png")
    assert detections.defects() == []
    assert not detections.truth().ids[3].any()


@pytest.mark.parametrize(("mode", "told"), [("RGB", "8-bit RGB"), ("1", "1-bit gray")])
def test_a_png_of_another_kind_is_named(detections: Detections, mode: str, told: str):
    Image.new(mode, SIZE[::-1]).save(detections.semantics / "a.png")
    assert f"it is {told}, expected 8-bit or 16-bit gray" in detections.reason()


def test_a_png_of_another_size_is_told(detections: Detections):
    Image.fromarray(SEMANTIC[:5]).save(detections.semantics / "a.png")
    assert "the semantic PNG is 8x5, the JSON says 8x6" in detections.reason()


@pytest.mark.parametrize("part", ["images", "semantics"])
def test_a_missing_file_is_named(detections: Detections, part: str):
    path = getattr(detections, part) / ("a.jpg" if part == "images" else "a.png")
    path.unlink()
    assert f"{path}: cannot be read (No such file" in detections.reason()


def test_an_image_without_annotations_has_its_stuff(detections: Detections):
    with detections.editing() as content:
        content["annotations"].clear()
    assert rows_of(detections.truth()) == [(SKY, False, 32)]


# ---- its index


def test_things_may_be_told_by_a_file_beside(detections: Detections):
    with detections.editing() as content:
        content["categories"] = [{"id": c["id"], "name": c["name"]} for c in CATEGORIES]
    assert "do not say which are things (isthing); expected annotations/categories.json" in detections.refusal()
    beside = detections.root / "annotations/categories.json"
    for told in (CATEGORIES, {"categories": CATEGORIES}):
        beside.write_text(json.dumps(told))
        assert detections.index().labels == LABELS


def test_a_split_without_instances_has_the_same_table(detections: Detections):
    (detections.root / "annotations/categories.json").write_text(json.dumps(CATEGORIES))
    with detections.editing() as content:
        content["annotations"].clear()
        content["categories"] = [{"id": SKY, "name": "sky"}]
    assert detections.index().labels == LABELS


@pytest.mark.parametrize("own", [{"id": 9, "name": "fox"}, {"id": CAT, "name": "fox"}, {"id": CAT, "isthing": 0}])
def test_a_file_beside_that_disagrees_is_refused(detections: Detections, own: dict):
    (detections.root / "annotations/categories.json").write_text(json.dumps(CATEGORIES))
    with detections.editing() as content:
        content["categories"] = [own]
    assert f"the category {own} is not the" in detections.refusal()


@pytest.mark.parametrize("text", ["", "5", "[5]", '{"categories": 5}', '[{"id": "a"}]', "[{}]", '[{"id": 1}]'])
def test_a_broken_file_beside_is_named(detections: Detections, text: str):
    beside = detections.root / "annotations/categories.json"
    beside.write_text(text)
    assert str(beside) in detections.refusal()


def test_a_category_0_is_refused(detections: Detections):
    with detections.editing() as content:
        content["categories"] = [*CATEGORIES, {"id": 0, "name": "wall", "isthing": 0, "color": [0, 0, 0]}]
    assert "id 0, which is void" in detections.refusal()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", "[" * 100_000, '{"images": [], "annotations": {}, "categories": []}']
)
def test_a_json_that_is_none_is_named(detections: Detections, text: str):
    detections.json.write_text(text)
    assert str(detections.json) in detections.refusal()


@pytest.mark.parametrize("part", ["json", "semantics", "images"])
def test_a_missing_part_is_named(detections: Detections, part: str):
    path = getattr(detections, part)
    path.rename(detections.root / "elsewhere")
    assert detections.refusal().startswith(f"{path}: not found")


@pytest.mark.parametrize(
    "broken",
    [
        {"id": None},
        {"height": 0},
        {"width": "8"},
        {"file_name": None},
        {"file_name": ""},
        {"file_name": "../b.jpg"},
        {"file_name": "/etc/b.jpg"},
        {"file_name": "b\0.jpg"},
    ],
)
def test_an_entry_that_is_broken_costs_its_own_sample_alone(detections: Detections, broken: dict):
    detections.add(SEMANTIC, [], "b.jpg")
    with detections.editing() as content:
        content["images"][1] |= broken
    index = detections.index()
    assert [r.image_id for r in index.records] == [1]
    assert len(index.rejected) == 2  # the entry, and the PNG that nothing names now


def test_what_belongs_to_no_image_is_rejected(detections: Detections):
    Image.fromarray(SEMANTIC).save(detections.semantics / "stray.png")
    with detections.editing() as content:
        content["annotations"] += [{"id": 70, "image_id": 9}, 5]
    told = [r.reason for r in detections.index().rejected]
    assert told == [
        "annotation 70 has the image 9, which is not in the JSON's images",
        "annotation 4 has the image 5, which is not in the JSON's images",
        "the PNG has no image in the JSON",
    ]


def test_an_image_listed_twice_is_rejected(detections: Detections):
    detections.add(SEMANTIC, [], "b.jpg")
    with detections.editing() as content:
        content["images"].append(content["images"][0])
    index = detections.index()
    assert [r.image_id for r in index.records] == [2]
    assert "2 entries have the image id 1" in index.rejected[0].reason


def test_an_empty_set_is_an_error(detections: Detections):
    with detections.editing() as content:
        content["images"], content["annotations"] = [], []
    assert f"{detections.json}: no usable sample" in detections.refusal()


def test_zips_are_read_as_folders_are(detections: Detections, tmp_path: Path):
    target = tmp_path / "zips"
    target.mkdir()
    for part in ("annotations", "train"):
        with zipfile.ZipFile(target / f"{part}_trainval.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(p for p in (detections.root / part).rglob("*") if p.is_file()):
                archive.write(path, path.relative_to(detections.root))
    index = layouts.read_index(target, "train", "instances")
    (record,) = pickle.loads(pickle.dumps(index.records))
    assert index.rejected == ()
    assert record.fingerprint() == detections.index().records[0].fingerprint()
    assert np.array_equal(read_sample(record, index.labels)[1].ids, detections.truth().ids)


def test_the_fingerprint_changes_with_the_annotations(detections: Detections):
    before = detections.index().records[0].fingerprint()
    with detections.editing() as content:
        content["annotations"][0]["iscrowd"] = 1
    assert detections.index().records[0].fingerprint() != before
