import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infra.errors import TesseraError
from preprocessing import ade20k, layouts
from preprocessing.source import BadSample, Defect, Index, read_sample, stable_id

WALL, SKY, BED, PERSON, CAR, FLAG = 1, 3, 8, 13, 21, 150
FULL = {row["id"]: row["full"][0] for row in ade20k.facts()}
STEM = "ADE_train_00000001"

# category mapping of the instance challenge: instance class (from 1) -> scene parsing class
# (facebookresearch/Mask2Former, datasets/ade20k_instance_catid_mapping.txt)
INSTANCE_CLASSES = [8, 9, 11, 13, 15, 16, 19, 20, 21, 23, 24, 25, 28, 31, 32, 33, 34, 36, 37, 38, 39, 40, 42, 43, 44]
INSTANCE_CLASSES += [45, 46, 48, 50, 51, 54, 56, 57, 58, 59, 63, 65, 66, 67, 68, 70, 71, 72, 73, 74, 75, 76, 77, 79, 81]
INSTANCE_CLASSES += [82, 83, 84, 86, 87, 88, 89, 90, 91, 93, 94, 96, 98, 99, 103, 104, 105, 108, 109, 111, 112, 113]
INSTANCE_CLASSES += [116, 117, 119, 120, 121, 122, 124, 125, 126, 127, 128, 130, 131, 133, 134, 135, 136, 137, 138]
INSTANCE_CLASSES += [139, 140, 143, 144, 145, 147, 148, 149, 150]


def defects(index: Index) -> list[Defect]:
    return [d for record in index.records for d in record.examine(index.labels).defects]


def reason(index: Index) -> str:
    with pytest.raises(BadSample) as caught:
        read_sample(index.records[0], index.labels)
    return str(caught.value)


def segments_of(index: Index) -> list[tuple[int, bool, int]]:
    """Dataset id, crowd, area."""
    truth = read_sample(index.records[0], index.labels)[1]
    assert [s.id for s in truth.segments] == list(range(1, len(truth.segments) + 1))
    return [(index.labels.categories[s.category].dataset_id, s.is_crowd, s.area) for s in truth.segments]


def test_the_table_has_the_challenges_classes():
    labels = ade20k.categories()
    assert (len(labels), int(labels.is_thing.sum())) == (150, 100)
    assert [c.dataset_id for c in labels.categories] == list(range(1, 151))
    assert [c.dataset_id for c in labels.categories if c.is_thing] == INSTANCE_CLASSES
    assert len(set(labels.names)) == len({c.color for c in labels.categories}) == 150
    full = [index for row in ade20k.facts() for index in row["full"]]
    assert (len(full), len(set(full))) == (153, 153)


# ---- ADEChallengeData2016


class Challenge:
    """A data set of the challenge that a test may damage at will."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, part: str, stem: str = STEM, split: str = "training") -> Path:
        return self.root / part / split / f"{stem}{'.jpg' if part == 'images' else '.png'}"

    def write(self, semantic: np.ndarray, instance: np.ndarray, stem: str = STEM) -> None:
        """instance: (H, W, 2), class and number."""
        for part in ("images", "annotations", "annotations_instance"):
            self.path(part, stem).parent.mkdir(parents=True, exist_ok=True)
        rgb = np.concatenate([instance, np.zeros_like(instance[..., :1])], axis=-1)
        Image.new("RGB", semantic.shape[::-1]).save(self.path("images", stem))
        Image.fromarray(semantic.astype(np.uint8)).save(self.path("annotations", stem))
        Image.fromarray(rgb.astype(np.uint8)).save(self.path("annotations_instance", stem))

    def index(self) -> Index:
        return ade20k.read_index(self.root, "training")


SEMANTIC = np.array([[WALL, WALL, BED, BED], [SKY, WALL, BED, BED], [SKY, 0, PERSON, PERSON]])
INSTANCE = np.zeros((3, 4, 2), int)
INSTANCE[:2, 2] = [1, 7]  # bed
INSTANCE[:2, 3] = [1, 2]  # another one
INSTANCE[2, 1:3] = [4, 9]  # person


@pytest.fixture
def challenge(tmp_path: Path) -> Challenge:
    made = Challenge(tmp_path / "ADEChallengeData2016")
    made.write(SEMANTIC, INSTANCE)
    return made


def test_instances_lie_over_stuff_and_bare_things_are_void(challenge: Challenge):
    index = challenge.index()
    assert segments_of(index) == [(WALL, 0, 3), (SKY, 0, 2), (BED, 0, 2), (BED, 0, 2), (PERSON, 0, 2)]
    assert read_sample(index.records[0], index.labels)[1].ids[2, 3] == 0  # a person without an instance
    assert defects(index) == []


def by_mask2former(semantic: np.ndarray, instance: np.ndarray) -> list[tuple[int, tuple]]:
    """What prepare_ade20k_pan_seg.py makes of it, painted pixel by pixel: class and pixels of each segment."""
    painted: dict[tuple[int, int], tuple] = {}
    for y, x in np.ndindex(semantic.shape):
        if semantic[y, x] and semantic[y, x] not in INSTANCE_CLASSES:
            painted[y, x] = (0, int(semantic[y, x]))
        if instance[y, x, 1]:
            painted[y, x] = (int(instance[y, x, 1]), INSTANCE_CLASSES[instance[y, x, 0] - 1])
    segments: dict[tuple, list] = {}
    for where, segment in painted.items():
        segments.setdefault(segment, []).append(where)
    return sorted((number_class[1], tuple(sorted(where))) for number_class, where in segments.items())


@given(st.lists(st.tuples(st.integers(0, 150), st.sampled_from([0, 0, 1, 2, 255])), min_size=12, max_size=12))
def test_any_pair_is_merged_as_mask2former_does(tmp_path_factory: pytest.TempPathFactory, pixels: list):
    made = Challenge(tmp_path_factory.mktemp("ade"))
    semantic, number = np.array(pixels).reshape(3, 4, 2).transpose(2, 0, 1)
    instance = np.stack([np.where(number, 1 + number % 100, 0), number], axis=-1)
    made.write(semantic, instance)
    index = made.index()
    truth = read_sample(index.records[0], index.labels)[1]
    found = []
    for segment in truth.segments:
        where = tuple((int(y), int(x)) for y, x in np.argwhere(truth.ids == segment.id))
        found.append((index.labels.categories[segment.category].dataset_id, where))
    assert sorted(found) == by_mask2former(semantic, instance)


@pytest.mark.parametrize("part", ["annotations", "annotations_instance"])
@pytest.mark.parametrize(("mode", "told"), [("I;16", "16-bit gray"), ("RGBA", "transparen"), ("LA", "transparen")])
def test_a_png_of_another_kind_is_named(challenge: Challenge, part: str, mode: str, told: str):
    Image.new(mode, (4, 3)).save(challenge.path(part))
    found = reason(challenge.index())
    assert f"{challenge.path(part)}: not a readable PNG (it is " in found
    assert told in found


def test_pngs_of_two_sizes_are_told(challenge: Challenge):
    Image.new("RGB", (4, 5)).save(challenge.path("annotations_instance"))
    told = f"{challenge.path('annotations_instance')}: the instance PNG is 4x5, the semantic 4x3"
    assert told == reason(challenge.index())


def test_an_image_of_another_size_is_told(challenge: Challenge):
    Image.new("RGB", (4, 5)).save(challenge.path("images"))
    assert "the image is 4x5, its annotation is 4x3" in reason(challenge.index())


def test_a_class_there_is_none_of_is_named(challenge: Challenge):
    challenge.write(np.where(SEMANTIC == SKY, 151, SEMANTIC), np.where(INSTANCE == [4, 9], [101, 9], INSTANCE))
    told = [(d.problem, d.segment, d.usable) for d in defects(challenge.index())]
    assert told == [
        ("class 151, expected 0 to 150 (2 px, the first at x=0, y=1)", 151, False),
        ("instance class 101, expected 1 to 100 (2 px, the first at x=1, y=2)", 101, False),
    ]


def test_an_instance_of_two_classes_is_named(challenge: Challenge):
    instance = INSTANCE.copy()
    instance[2, 2, 0] = 1
    challenge.write(SEMANTIC, instance)
    assert "instance 9 has the classes [1, 4], expected one" in reason(challenge.index())


def test_an_instance_class_without_number_is_told_and_void(challenge: Challenge):
    instance = INSTANCE.copy()
    instance[2, :, 1] = 0
    challenge.write(SEMANTIC, instance)
    (defect,) = defects(challenge.index())
    assert defect.usable
    assert "instance class 4 without an instance number" in defect.problem
    assert (PERSON, 0, 2) not in segments_of(challenge.index())


def test_a_number_without_class_is_a_defect(challenge: Challenge):
    instance = INSTANCE.copy()
    instance[0, 0, 1] = 3
    challenge.write(SEMANTIC, instance)
    assert "instance class 0, expected 1 to 100" in reason(challenge.index())


@pytest.mark.parametrize("part", ["images", "annotations", "annotations_instance"])
def test_a_file_without_mates_is_rejected(challenge: Challenge, part: str):
    challenge.write(SEMANTIC, INSTANCE, "ADE_train_00000002")
    challenge.path(part).unlink()
    index = challenge.index()
    assert [r.image_id for r in index.records] == [stable_id("ADE_train_00000002")]
    ((image_id, text),) = [(r.image_id, r.reason) for r in index.rejected]
    assert (image_id, text) == (stable_id(STEM), f"no {challenge.path(part).name} in {challenge.path(part).parent}")


@pytest.mark.parametrize("part", ["images", "annotations", "annotations_instance"])
def test_a_missing_folder_is_named(challenge: Challenge, part: str):
    (challenge.root / part).rename(challenge.root / "elsewhere")
    with pytest.raises(TesseraError, match=rf"{part}/training: not found, nor ADEChallengeData2016/{part}/training"):
        challenge.index()


def test_the_root_may_be_the_folder_around_it(challenge: Challenge):
    around = layouts.read_index(challenge.root.parent, "training", "ade20k")
    assert [r.fingerprint() for r in around.records] == [r.fingerprint() for r in challenge.index().records]


def test_the_published_zip_is_read_beside_the_unpacked_instances(challenge: Challenge, tmp_path: Path):
    target = tmp_path / "zips"
    target.mkdir()
    with zipfile.ZipFile(target / "ADEChallengeData2016.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for part in ("images", "annotations"):
            path = challenge.path(part)
            archive.write(path, path.relative_to(challenge.root.parent))
    (challenge.root / "annotations_instance").rename(target / "annotations_instance")
    index = ade20k.read_index(target, "training")
    (record,) = pickle.loads(pickle.dumps(index.records))
    assert index.rejected == ()
    assert read_sample(record, index.labels)[1].segments[2].area == 2


def test_random_damage_is_never_more_than_a_bad_sample(challenge: Challenge):
    rng, index = np.random.default_rng(0), challenge.index()
    for part in ("annotations", "annotations_instance"):
        whole = challenge.path(part).read_bytes()
        for _ in range(100):
            data = np.frombuffer(whole, np.uint8).copy()
            data[rng.integers(0, data.size, 3)] = rng.integers(0, 256, 3)
            challenge.path(part).write_bytes(data.tobytes())
            try:
                read_sample(index.records[0], index.labels)
            except BadSample as problem:
                assert str(problem)  # noqa: PT017
        challenge.path(part).write_bytes(whole)


# ---- the full data set


class Full:
    """A data set of the full ADE20K that a test may damage at will."""

    def __init__(self, root: Path, edition: int) -> None:
        self.edition = edition
        folder = {2016: "ADE20K_2016_07_26/images", 2021: "ADE20K_2021_17_01/images/ADE"}[edition]
        self.root, self.folder = root, root / folder / "training/urban/street"
        self.folder.mkdir(parents=True)

    def path(self, end: str, stem: str = STEM) -> Path:
        return self.folder / f"{stem}{end}"

    @property
    def text(self) -> Path:
        return self.path(".json" if self.edition == 2021 else "_atr.txt")

    def write(self, index: np.ndarray, instance: np.ndarray, stem: str = STEM) -> None:
        rgb = np.stack([index // 256 * 10, index % 256, instance], axis=-1)
        Image.new("RGB", index.shape[::-1]).save(self.path(".jpg", stem))
        Image.fromarray(rgb.astype(np.uint8)).save(self.path("_seg.png", stem))
        Image.fromarray(rgb.astype(np.uint8)).save(self.path("_parts_1.png", stem))

    def write_names(self, names: dict[int, str]) -> None:
        """By class index."""
        rows = [{"id": i, "name": n, "name_ndx": k, "raw_name": "?"} for i, (k, n) in enumerate(names.items())]
        lines = [f'{i:03} # 0 # 0 # {row["name"]} # ? # ""' for i, row in enumerate(rows, start=1)]
        content = json.dumps({"annotation": {"object": rows}}) if self.edition == 2021 else "\n".join(lines)
        self.text.write_text(content)

    def read(self) -> Index:
        return ade20k.read_full_index(self.root, "training")


LICENSE_PLATE = 1436  # any class that is not one of the 150
INDEX = np.array([[FULL[SKY], FULL[SKY], 783, 774], [FULL[CAR], FULL[CAR], FULL[CAR], LICENSE_PLATE], [0] * 4])
NUMBER = np.array([[1, 1, 2, 3], [4, 5, 0, 6], [0] * 4])
NAMES = {FULL[SKY]: "sky", 774: "door", 783: "double door", LICENSE_PLATE: "license plate"}
NAMES[FULL[CAR]] = "car, auto, automobile, machine, motorcar"


@pytest.fixture(params=[2016, 2021])
def full(tmp_path: Path, request: pytest.FixtureRequest) -> Full:
    made = Full(tmp_path / "full", request.param)
    made.write(INDEX, NUMBER)
    made.write_names(NAMES)
    return made


def test_the_150_are_found_and_all_else_is_void(full: Full):
    index = full.read()
    door = 15
    assert segments_of(index) == [(SKY, 0, 2), (door, 0, 1), (door, 0, 1), (CAR, 0, 1), (CAR, 0, 1)]
    assert defects(index) == []
    assert index.rejected == ()
    truth = read_sample(index.records[0], index.labels)[1]
    assert not truth.ids[1, 2:].any()  # a car without an instance, and a class of the others


def test_the_root_may_be_the_edition(full: Full):
    inside = layouts.read_index(next(full.root.iterdir()), "training", "ade20k-full")
    assert [r.fingerprint() for r in inside.records] == [r.fingerprint() for r in full.read().records]


@pytest.mark.parametrize("number", range(1, 151))
def test_each_class_is_found_by_all_of_its_indices(number: int):
    by_index = ade20k._class_by_index()
    for index in ade20k.facts()[number - 1]["full"]:
        assert by_index[index] == number
        assert index // 256 * 10 <= 255


def test_editions_may_order_synonyms_differently(full: Full):
    full.write(np.full((2, 2), 3109), np.ones((2, 2), int))
    full.write_names({3109: "screen, crt screen"})
    assert defects(full.read()) == []


def test_a_class_that_the_text_lacks_is_told(full: Full):
    full.write_names({k: n for k, n in NAMES.items() if n != "sky"})
    (defect,) = defects(full.read())
    problem = f"it does not list 'sky', class index {FULL[SKY]} of the PNG"
    assert (defect.problem, defect.file, defect.usable) == (problem, str(full.text), True)


def test_another_editions_numbers_are_refused(tmp_path: Path):
    made = Full(tmp_path, 2021)
    made.write(INDEX, NUMBER)
    made.write_names({**NAMES, FULL[SKY]: "zebra"})
    assert f"class index {FULL[SKY]} is called 'zebra', expected 'sky'" in reason(made.read())


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '{"annotation": {"object": [{"name": "sky"}]}}', "1 # 0"])
def test_a_text_that_cannot_be_understood_is_told(full: Full, text: str):
    full.text.write_text(text)
    (defect,) = defects(full.read())
    assert (defect.file, defect.usable) == (str(full.text), True)
    assert "names cannot be read" in defect.problem


def test_a_missing_text_is_no_hindrance(full: Full):
    full.text.unlink()
    assert defects(full.read()) == []


def test_bytes_that_are_no_utf8_do_not_hurt(tmp_path: Path):
    made = Full(tmp_path, 2016)
    made.write(INDEX, NUMBER)
    made.write_names(NAMES)
    made.text.write_bytes(made.text.read_bytes().replace(b'""', b'"caf\xe9"'))
    assert defects(made.read()) == []


def test_a_red_that_is_no_code_is_named(full: Full):
    rgb = np.asarray(Image.open(full.path("_seg.png"))).copy()
    rgb[0, 0, 0] += 3
    Image.fromarray(rgb).save(full.path("_seg.png"))
    assert "expected a multiple of 10 (1 px, the first at x=0, y=0)" in reason(full.read())


def test_a_full_png_of_another_kind_is_named(full: Full):
    Image.new("RGBA", (4, 3)).save(full.path("_seg.png"))
    assert "it is 8-bit RGB with transparency with transparent pixels, expected 8-bit RGB" in reason(full.read())


@pytest.mark.parametrize(("gone", "kept"), [(".jpg", "_seg.png"), ("_seg.png", ".jpg")])
def test_a_full_image_without_mate_is_rejected(full: Full, gone: str, kept: str):
    full.write(INDEX, NUMBER, "ADE_train_00000002")
    full.path(gone).unlink()
    index = full.read()
    assert [r.image_id for r in index.records] == [stable_id("ADE_train_00000002")]
    ((file, reason),) = [(r.file, r.reason) for r in index.rejected]
    assert file == str(full.path(kept))
    assert reason.startswith(f"no urban/street/{STEM}{gone} in {full.root}")


def test_the_full_zip_is_read_as_the_folder_is(full: Full, tmp_path: Path):
    target = tmp_path / "zips"
    target.mkdir()
    with zipfile.ZipFile(target / "download.zip", "w") as archive:
        for path in sorted(p for p in full.root.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(full.root))
    index = ade20k.read_full_index(target, "training")
    assert [r.fingerprint() for r in index.records] == [r.fingerprint() for r in full.read().records]
    assert segments_of(index) == segments_of(full.read())


def test_the_full_layout_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(TesseraError, match=r"images/training: not found, nor images/ADE/training.*full ADE20K"):
        ade20k.read_full_index(tmp_path, "training")
