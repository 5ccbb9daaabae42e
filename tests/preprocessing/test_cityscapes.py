import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infra.errors import TesseraError
from preprocessing import layouts
from preprocessing.cityscapes import CATEGORIES, LABELS, read_index
from preprocessing.panoptic_map import PanopticMap
from preprocessing.source import BadSample, Defect, read_sample, stable_id

STEM = "aachen/aachen_000000_000019"
IDS = np.array(
    [
        [0, 1, 7, 7, 7, 7],
        [23, 24, 24001, 24002, 7, 7],
        [23, 24, 24001, 26000, 26000, 65535],
        [29, 29001, 33, 33, 15, 26000],
    ]
)


class City:
    """A data set of `gtFine` and `leftImg8bit` that a test may damage at will."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, ids: np.ndarray, stem: str = STEM, split: str = "train", mode: str = "I;16") -> None:
        dtype = np.uint16 if mode == "I;16" else np.uint8
        self.image(stem, split).parent.mkdir(parents=True, exist_ok=True)
        self.mask(stem, split).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids.astype(dtype)).save(self.mask(stem, split))
        Image.new("RGB", ids.shape[::-1], (9, 99, 199)).save(self.image(stem, split))

    def image(self, stem: str = STEM, split: str = "train") -> Path:
        return self.root / "leftImg8bit" / split / f"{stem}_leftImg8bit.png"

    def mask(self, stem: str = STEM, split: str = "train") -> Path:
        return self.root / "gtFine" / split / f"{stem}_gtFine_instanceIds.png"

    def truth(self) -> PanopticMap:
        index = read_index(self.root, "train")
        return read_sample(index.records[0], index.labels)[1]

    def defects(self) -> tuple[Defect, ...]:
        index = read_index(self.root, "train")
        return index.records[0].examine(index.labels).defects

    def reason(self) -> str:
        index = read_index(self.root, "train")
        with pytest.raises(BadSample) as caught:
            read_sample(index.records[0], index.labels)
        return str(caught.value)


@pytest.fixture
def city(tmp_path: Path) -> City:
    made = City(tmp_path / "cityscapes")
    made.write(IDS)
    return made


def name_of(truth: PanopticMap, y: int, x: int) -> tuple[str, bool] | None:
    segment = truth.ids[y, x] and truth.segments[truth.ids[y, x] - 1]
    return (CATEGORIES.names[segment.category], segment.is_crowd) if segment else None


def test_the_table_has_the_nineteen_evaluated_classes():
    assert (len(CATEGORIES), int(CATEGORIES.is_thing.sum()), len(LABELS) + 1) == (19, 8, 35)
    assert [label.id for label in LABELS] == list(range(34))
    assert sorted(CATEGORIES.contiguous) == [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]


def test_things_are_taken_apart_and_groups_are_crowds(city: City):
    truth = city.truth()
    names = [(CATEGORIES.names[s.category], s.is_thing, s.is_crowd, s.area) for s in truth.segments]
    assert names == [
        ("road", False, False, 6),
        ("sky", False, False, 2),
        ("person", True, True, 2),
        ("bicycle", True, True, 2),
        ("person", True, False, 2),
        ("person", True, False, 1),
        ("car", True, False, 3),
    ]
    assert [s.id for s in truth.segments] == list(range(1, 8))


def test_what_is_not_evaluated_is_void(city: City):
    truth = city.truth()
    void = {0, 1, 15, 29, 29001, 65535}
    assert np.array_equal(truth.ids == 0, np.isin(IDS, list(void)))


def by_hand(ids: np.ndarray) -> set[tuple]:
    """What createPanopticImgs.py makes of it, pixel by pixel: category, crowd and pixels of each segment."""
    pixels: dict[int, list] = {}
    for y, row in enumerate(ids.tolist()):
        for x, value in enumerate(row):
            pixels.setdefault(value, []).append((y, x))
    segments = set()
    for value, where in pixels.items():
        label = next((row for row in LABELS if row.id == (value // 1000 if value > 999 else value)), None)
        if label and label.is_evaluated:
            segments.add((label.id, label.has_instances and value < 1000, tuple(where)))
    return segments


LEGAL = [row.id for row in LABELS] + [row.id * 1000 + i for row in LABELS if row.has_instances for i in (0, 1, 999)]


@given(st.lists(st.sampled_from([*LEGAL, 65535]), min_size=12, max_size=12))
def test_any_map_is_read_as_cityscapes_own_converter_would(tmp_path_factory: pytest.TempPathFactory, values: list[int]):
    made, ids = City(tmp_path_factory.mktemp("city")), np.array(values).reshape(3, 4)
    made.write(ids)
    truth = made.truth()
    found = set()
    for segment in truth.segments:
        where = tuple((int(y), int(x)) for y, x in np.argwhere(truth.ids == segment.id))
        assert len(where) == segment.area
        found.add((CATEGORIES.categories[segment.category].dataset_id, segment.is_crowd, where))
    assert found == by_hand(ids)


def test_eight_bit_ids_are_read_too(city: City):
    city.write(np.full((4, 6), 26), mode="L")
    assert [s.is_crowd for s in city.truth().segments] == [True]


def test_an_id_of_no_label_is_named_with_its_pixels(city: City):
    ids = IDS.copy()
    ids[1:3, 4] = 34
    ids[0, 5] = 40007
    city.write(ids)
    (first, second) = city.defects()
    assert first.problem == "id 34 belongs to none of Cityscapes' labels (2 px, the first at x=4, y=1)"
    assert (first.segment, first.usable, first.file) == (34, False, str(city.mask()))
    assert second.segment == 40007


def test_of_many_wrong_ids_five_are_named(city: City):
    city.write(np.arange(100, 124).reshape(4, 6))
    problems = [d.problem for d in city.defects() if not d.usable]
    assert len(problems) == 6
    assert problems[-1] == "19 more values of this kind"


def test_an_instance_of_stuff_is_told_and_joined(city: City):
    ids = IDS.copy()
    ids[0, 2] = 7001
    city.write(ids)
    (defect,) = city.defects()
    assert defect.usable
    assert "id 7001 numbers an instance of stuff" in defect.problem
    assert name_of(city.truth(), 0, 2) == ("road", False)
    assert city.truth().segments[0].area == 6


def test_a_map_of_void_alone_can_be_trained_on_and_is_told(city: City):
    city.write(np.zeros((4, 6)))
    assert [(d.problem, d.usable) for d in city.defects()] == [("every pixel is void", True)]


@pytest.mark.parametrize(("mode", "told"), [("RGB", "8-bit RGB"), ("1", "1-bit gray")])
def test_a_mask_of_another_kind_is_named(city: City, mode: str, told: str):
    Image.new(mode, (6, 4)).save(city.mask())
    assert city.reason() == f"{city.mask()}: not a readable PNG (it is {told}, expected 8-bit or 16-bit gray)"


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_an_unreadable_mask_is_named(city: City, data: bytes):
    city.mask().write_bytes(data)
    assert f"{city.mask()}: not a readable PNG" in city.reason()


def test_a_jpeg_in_place_of_the_png_is_told(city: City):
    buffer = io.BytesIO()
    Image.new("L", (6, 4)).save(buffer, format="JPEG")
    city.mask().write_bytes(buffer.getvalue())
    assert "not a readable PNG" in city.reason()


def test_random_damage_is_never_more_than_a_bad_sample(city: City):
    rng, index = np.random.default_rng(0), read_index(city.root, "train")
    whole = city.mask().read_bytes()
    for _ in range(200):
        data = np.frombuffer(whole, np.uint8).copy()
        data[rng.integers(0, data.size, 3)] = rng.integers(0, 256, 3)
        city.mask().write_bytes(data.tobytes()[: rng.integers(1, 2 * data.size)])
        try:
            read_sample(index.records[0], index.labels)
        except BadSample as problem:
            assert str(problem)  # noqa: PT017


def test_an_image_of_another_size_is_told(city: City):
    Image.new("RGB", (5, 4)).save(city.image())
    assert city.reason() == f"{city.image()}: the image is 5x4, its annotation is 6x4"


def test_files_without_mates_are_rejected(city: City):
    for stem in ("bonn/bonn_1_1", "bonn/bonn_2_2"):
        city.write(IDS, stem)
    city.image("bonn/bonn_1_1").unlink()
    city.mask("bonn/bonn_2_2").unlink()
    (city.root / "gtFine/train/aachen/aachen_000000_000019_gtFine_polygons.json").write_text("{}")
    index = read_index(city.root, "train")
    assert [r.image_id for r in index.records] == [stable_id("aachen_000000_000019")]
    told = [(r.image_id, r.reason) for r in index.rejected]
    assert (stable_id("bonn_1_1"), f"no bonn/bonn_1_1_leftImg8bit.png in {city.root}/leftImg8bit/train") in told
    assert (stable_id("bonn_2_2"), f"no bonn/bonn_2_2_gtFine_instanceIds.png in {city.root}/gtFine/train") in told
    assert len(told) == 2


def test_one_stem_in_two_cities_is_rejected_twice(city: City):
    city.write(IDS, "bonn/aachen_000000_000019")
    city.write(IDS, "bonn/other")
    index = read_index(city.root, "train")
    assert (len(index.records), len(index.rejected)) == (1, 2)


@pytest.mark.parametrize("part", ["gtFine", "leftImg8bit"])
def test_a_missing_folder_is_named(city: City, part: str):
    (city.root / part).rename(city.root / "elsewhere")
    with pytest.raises(TesseraError, match=f"{part}/train: not found.*Cityscapes' layout"):
        read_index(city.root, "train")


def test_a_set_without_a_pair_tells_why(city: City):
    city.image().unlink()
    (city.image().parent / "README").write_text("")
    with pytest.raises(TesseraError, match=r"gtFine/train: no usable sample \(image .*no aachen"):
        read_index(city.root, "train")


def zipped(root: Path, target: Path, parts: list[str]) -> None:
    target.mkdir(exist_ok=True)
    for part in parts:
        with zipfile.ZipFile(target / f"{part}_trainvaltest.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("README", "as published")
            for path in sorted((root / part).rglob("*.png")):
                archive.write(path, path.relative_to(root))


def test_the_published_zips_are_read_as_folders_are(city: City, tmp_path: Path):
    zipped(city.root, tmp_path / "zips", ["gtFine", "leftImg8bit"])
    unpacked, packed = read_index(city.root, "train"), read_index(tmp_path / "zips", "train")
    assert [r.fingerprint() for r in packed.records] == [r.fingerprint() for r in unpacked.records]
    assert packed.rejected == ()
    (record,) = pickle.loads(pickle.dumps(packed.records))
    assert np.array_equal(read_sample(record, packed.labels)[1].ids, city.truth().ids)


def test_one_half_may_be_zipped(city: City, tmp_path: Path):
    zipped(city.root, tmp_path / "mixed", ["gtFine"])
    (city.root / "leftImg8bit").rename(tmp_path / "mixed/leftImg8bit")
    assert len(layouts.read_index(tmp_path / "mixed", "train", "cityscapes").records) == 1


def test_a_record_is_small(city: City):
    assert len(pickle.dumps(read_index(city.root, "train").records[0])) < 1000
