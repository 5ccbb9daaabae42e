import json
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco_mask

from infra.errors import TesseraError
from preprocessing import layouts, rle
from preprocessing.instances import Instance, from_instances_and_semantics, read_index
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap
from preprocessing.source import BadSample, Defect, Index, read_sample

CAT, DOG, SKY, SEA = 3, 200, 7, 40
CATEGORIES = [
    {"id": CAT, "name": "cat", "isthing": 1, "color": [1, 2, 3]},
    {"id": DOG, "name": "dog", "isthing": 1, "color": [4, 5, 6]},
    {"id": SKY, "name": "sky", "isthing": 0, "color": [7, 8, 9]},
    {"id": SEA, "name": "sea", "isthing": 0, "color": [10, 11, 12]},
]
LABELS = LabelTable.from_coco(CATEGORIES)
SIZE = (6, 8)


def box(x: int, y: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y : y + height, x : x + width] = True
    return mask


def rows_of(truth: PanopticMap) -> list[tuple[int, bool, int]]:
    """Dataset id, crowd, area."""
    assert [s.id for s in truth.segments] == list(range(1, len(truth.segments) + 1))
    assert all(s.area == (truth.ids == s.id).sum() > 0 for s in truth.segments)
    return [(LABELS.categories[s.category].dataset_id, s.is_crowd, s.area) for s in truth.segments]


# ---- merging arrays


def test_instances_lie_over_semantics_and_bare_things_are_void():
    semantic = np.full(SIZE, SKY)
    semantic[3:] = CAT
    truth = from_instances_and_semantics(semantic, [(CAT, box(0, 2, 4, 2), False)], LABELS)
    assert rows_of(truth) == [(CAT, False, 8), (SKY, False, 20)]
    assert not truth.ids[4:].any()


def test_the_smaller_instance_lies_on_top_whatever_the_order():
    large, small, void = box(0, 0, 8, 6), box(1, 1, 2, 2), np.zeros(SIZE, np.uint8)
    for order in ([large, small], [small, large]):
        truth = from_instances_and_semantics(void, [Instance(CAT, mask) for mask in order], LABELS)
        assert {s.area for s in truth.segments} == {44, 4}


def test_of_equal_instances_the_later_lies_on_top():
    first, second = Instance(CAT, box(0, 0, 2, 1)), Instance(DOG, box(1, 0, 2, 1))
    void = np.zeros(SIZE, np.uint8)
    assert rows_of(from_instances_and_semantics(void, [first, second], LABELS)) == [(CAT, 0, 1), (DOG, 0, 2)]
    assert rows_of(from_instances_and_semantics(void, [second, first], LABELS)) == [(DOG, 0, 1), (CAT, 0, 2)]


def test_a_crowd_lies_below_even_what_is_larger():
    crowd, large = Instance(CAT, box(0, 0, 2, 2), True), Instance(CAT, box(1, 0, 7, 6))
    truth = from_instances_and_semantics(np.zeros(SIZE, int), [large, crowd], LABELS)
    assert rows_of(truth) == [(CAT, False, 42), (CAT, True, 2)]


def test_what_is_covered_has_no_segment_and_ids_stay_dense():
    instances = [Instance(CAT, box(0, 0, 2, 2)), Instance(DOG, box(0, 0, 2, 2)), Instance(CAT, np.zeros(SIZE, bool))]
    assert rows_of(from_instances_and_semantics(np.full(SIZE, SEA), instances, LABELS)) == [(DOG, 0, 4), (SEA, 0, 44)]
    truth = from_instances_and_semantics(np.full(SIZE, SEA), [Instance(DOG, box(0, 0, 8, 6))], LABELS)
    assert rows_of(truth) == [(DOG, 0, 48)]


def test_nothing_at_all_is_void_alone():
    truth = from_instances_and_semantics(np.full(SIZE, 255), [], LABELS)
    assert (truth.segments, truth.ids.any()) == ((), False)


def test_255_is_a_category_if_there_is_one():
    labels = LabelTable.from_coco([{"id": 255, "name": "sky", "isthing": 0}])
    (sky,) = from_instances_and_semantics(np.full(SIZE, 255), [], labels).segments
    assert sky.area == 48


def painter(semantic: np.ndarray, instances: list[Instance]) -> dict[tuple[int, int], tuple]:
    """Pixel -> segment, each pixel asking every instance: the topmost one, else the stuff, else nothing."""
    seen: dict[tuple[int, int], tuple] = {}
    for y, x in np.ndindex(semantic.shape):
        if semantic[y, x] in (SKY, SEA):
            seen[y, x] = ("stuff", int(semantic[y, x]))
        best = None
        for number, (category, mask, is_crowd) in enumerate(instances):
            rank = (0 if is_crowd else 1, -mask.sum(), number)
            if mask[y, x] and (best is None or rank > best[0]):
                best = (rank, ("thing", number, category, is_crowd))
        if best:
            seen[y, x] = best[1]
    return seen


masks = hnp.arrays(bool, SIZE)
some_instances = st.lists(st.builds(Instance, st.sampled_from([CAT, DOG]), masks, st.booleans()), max_size=6)


@given(hnp.arrays(np.uint8, SIZE, elements=st.sampled_from([0, CAT, DOG, SKY, SEA, 255])), some_instances)
def test_any_input_is_merged_as_a_slow_painter_does(semantic: np.ndarray, instances: list[Instance]):
    before = semantic.copy(), [i.mask_HW.copy() for i in instances]
    truth = from_instances_and_semantics(semantic, instances, LABELS)
    expected = painter(semantic, instances)
    pairs = {(int(truth.ids[y, x]), expected.get((y, x))) for y, x in np.ndindex(SIZE)}
    assert len({i for i, _ in pairs}) == len({e for _, e in pairs}) == len(pairs)
    for i, segment in pairs - {(0, None)}:
        row = truth.segments[i - 1]
        category = segment[1] if segment[0] == "stuff" else segment[2]
        assert (LABELS.categories[row.category].dataset_id, row.is_crowd) == (
            category,
            segment[0] == "thing" and segment[3],
        )
    assert np.array_equal(semantic, before[0])
    assert all(np.array_equal(i.mask_HW, mask) for i, mask in zip(instances, before[1], strict=True))


@pytest.mark.parametrize(
    ("semantic", "instances", "told"),
    [
        (np.zeros(SIZE), [], "semantics: expected integers"),
        (np.zeros((*SIZE, 3), int), [], "semantics: expected integers"),
        (np.full(SIZE, 9), [], r"semantics: categories \[9\] are not in the table"),
        (np.full(SIZE, -7), [], r"categories \[-7\]"),
        (np.zeros(SIZE, int), [(CAT, box(0, 0, 1, 1).astype(np.uint8), False)], "instance 0: expected bool"),
        (np.zeros(SIZE, int), [(CAT, np.zeros((6, 7), bool), False)], r"instance 0: .* got bool \(6, 7\)"),
        (
            np.zeros(SIZE, int),
            [(CAT, box(0, 0, 1, 1), False), (9, box(0, 0, 1, 1), False)],
            "instance 1: .* 9 is unknown",
        ),
        (np.zeros(SIZE, int), [(SKY, box(0, 0, 1, 1), False)], r"instance 0: the category 7 \(sky\) is stuff"),
    ],
)
def test_what_cannot_be_merged_is_refused(semantic: np.ndarray, instances: list, told: str):
    with pytest.raises(TesseraError, match=told):
        from_instances_and_semantics(semantic, instances, LABELS)


# ---- masks as the JSON writes them


def counts_of(mask: np.ndarray) -> list[int]:
    """Run lengths down the columns, outside first."""
    flat, counts, inside = mask.T.ravel(), [0], False
    for value in flat:
        if value != inside:
            counts.append(0)
            inside = value
        counts[-1] += 1
    return counts


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)))
def test_both_rles_are_decoded(mask: np.ndarray):
    size, packed = list(mask.shape), coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    for counts in (counts_of(mask), packed):
        decoded = rle.decode({"size": size, "counts": counts}, mask.shape)
        assert decoded.flags.c_contiguous
        assert np.array_equal(decoded, mask)


@given(hnp.arrays(bool, st.sampled_from([(700, 900), (1, 100000)]), elements=st.booleans(), fill=st.booleans()))
def test_long_runs_are_decoded(mask: np.ndarray):
    packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert np.array_equal(rle.decode({"size": list(mask.shape), "counts": packed}, mask.shape), mask)


points = st.floats(-16, 16, allow_nan=False)
polygon = st.integers(3, 7).flatmap(lambda n: st.lists(points, min_size=2 * n, max_size=2 * n))


@given(st.lists(polygon.map(lambda p: [max(-6.0, min(12.0, v)) for v in p]), min_size=1, max_size=3))
def test_polygons_are_united_as_pycocotools_does(polygons: list[list[float]]):
    united = np.zeros(SIZE, bool)
    for one in polygons:
        united |= coco_mask.decode(coco_mask.frPyObjects([one], *SIZE))[..., 0].astype(bool)
    assert np.array_equal(rle.decode(polygons, SIZE), united)


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=130), max_size=30))
def test_any_text_is_decoded_or_refused(text: str):
    try:
        assert rle.decode({"size": list(SIZE), "counts": text}, SIZE).shape == SIZE
    except ValueError as problem:
        assert "RLE" in str(problem)  # noqa: PT017


BAD_SEGMENTATIONS = [
    ({"size": [8, 6], "counts": [48]}, "the RLE's size is [8, 6], expected [6, 8]"),
    ({"counts": [48]}, "the RLE's size is None"),
    ({"size": [6, 8], "counts": [40]}, "add up to 40, expected 48 = 6 * 8"),
    ({"size": [6, 8], "counts": [50, -2]}, "no list of integers"),
    ({"size": [6, 8], "counts": [48.0]}, "no list of integers"),
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
    instances = [Instance(c, rle.decode(s, SIZE), bool(crowd)) for c, s, crowd in ANNOTATIONS]
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


@pytest.mark.parametrize("mode", ["RGB", "P", "1", "RGBA"])
def test_a_png_of_another_mode_is_named(detections: Detections, mode: str):
    Image.new(mode, SIZE[::-1]).save(detections.semantics / "a.png")
    assert f"the PNG has the mode {mode}, expected 8-bit or 16-bit gray" in detections.reason()


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
        "annotation 4 has the image None, which is not in the JSON's images",
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
