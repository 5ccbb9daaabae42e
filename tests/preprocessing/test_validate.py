"""The validate command: real COCO with damage of every kind, each found and named."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocessing import rgb_ids
from preprocessing.layouts import read_index
from preprocessing.source import Defect
from preprocessing.validate import Findings, examine_index, histogram, main
from tests.support.cases import made
from tests.support.coco_folder import CocoFolder, cut

MINI = Path(__file__).resolve().parents[3] / "shared/data/coco_mini"
SPLIT = "val2017"


class Patient:
    """A copy of real COCO; `hurt` damages one image after the other and notes what is to be found."""

    def __init__(self, root: Path) -> None:
        self.folder = CocoFolder(root, SPLIT)
        self.content = json.loads(self.folder.json.read_text())
        self.at = -1
        self.expected: list[tuple[str, int | None, bool, str]] = []

    def next(self) -> None:
        self.at += 1

    @property
    def entry(self) -> dict:
        return self.content["annotations"][self.at]

    @property
    def rows(self) -> list[dict]:
        return self.entry["segments_info"]

    @property
    def listed(self) -> dict:
        return next(i for i in self.content["images"] if i["id"] == self.entry["image_id"])

    @property
    def image(self) -> Path:
        return self.folder.images / self.listed["file_name"]

    @property
    def mask(self) -> Path:
        return self.folder.masks / self.entry["file_name"]

    def ids(self) -> np.ndarray:
        return rgb_ids.read_png(self.mask.read_bytes())

    def save(self) -> None:
        self.folder.json.write_text(json.dumps(self.content))

    def expect(self, file: Path, problem: str, usable: bool = False) -> None:
        self.expected.append((str(file), self.entry["image_id"], usable, problem))


def missing_image(p: Patient) -> None:
    p.image.unlink()
    p.expect(p.image, "cannot be read (No such file")


def cut_image(p: Patient) -> None:
    cut(p.image)
    p.expect(p.image, "not a readable image")


def text_as_image(p: Patient) -> None:
    p.image.write_bytes(b"<html>404</html>")
    p.expect(p.image, "not a readable image")


def image_of_another_size(p: Patient) -> None:
    Image.new("RGB", (10, 20)).save(p.image)
    p.expect(p.image, "the image is 10x20, the JSON says")


def rotated_image(p: Patient) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(p.image.read_bytes())).save(p.image, exif=exif)
    p.expect(p.image, "EXIF says", usable=True)


def deep_image(p: Patient) -> None:
    width, height = p.listed["width"], p.listed["height"]
    Image.fromarray(np.full((height, width), 40_000, np.uint16)).save(p.image, "PNG")
    p.expect(p.image, "more than 8 bits")


def missing_mask(p: Patient) -> None:
    p.mask.unlink()
    p.expect(p.mask, "cannot be read (No such file")


def cut_mask(p: Patient) -> None:
    cut(p.mask)
    p.expect(p.mask, "not a readable panoptic PNG")


def gray_mask(p: Patient) -> None:
    Image.fromarray(p.ids().astype(np.uint8)).save(p.mask)
    p.expect(p.mask, "8-bit RGB")


def mask_of_another_size(p: Patient) -> None:
    p.mask.write_bytes(rgb_ids.write_png(np.pad(p.ids(), ((0, 3), (0, 0)), mode="edge")))
    p.expect(p.mask, "the PNG is")
    for row in p.rows:  # those at the edge have grown
        row.pop("area"), row.pop("bbox")


def unlisted_segment(p: Patient) -> None:
    ids = p.ids()
    p.rows.append({"id": 5, "category_id": 1, "iscrowd": 0})
    ids[0, :3], ids[1, :3] = 5, 7_654_321
    p.mask.write_bytes(rgb_ids.write_png(ids))
    for row in p.rows:
        row.pop("area", None), row.pop("bbox", None)
    p.expect(p.mask, "segment 7654321 covers 3 px, the first at x=0, y=1, but is not in the JSON")


def segment_without_pixels(p: Patient) -> None:
    p.rows.append({"id": 7_654_321, "category_id": 1, "iscrowd": 0})
    p.expect(p.mask, "segment 7654321 is in the JSON but has no pixel")


def unknown_category(p: Patient) -> None:
    p.rows[0]["category_id"] = 12
    p.expect(p.mask, f"segment {p.rows[0]['id']} has the unknown category 12")


def repeated_segment(p: Patient) -> None:
    p.rows.append(p.rows[0])
    p.expect(p.mask, f"segment {p.rows[0]['id']} is listed more than once")


def id_zero(p: Patient) -> None:
    p.rows.append({"id": 0, "category_id": 1})
    p.expect(p.mask, "segment id 0; expected 1 to 16777215")


def id_missing(p: Patient) -> None:
    p.rows.append({"category_id": 1})
    p.expect(p.mask, "segment None has no integer 'id'")


def lying_area(p: Patient) -> None:
    p.rows[0]["area"] += 1
    p.expect(p.mask, f"has the area {p.rows[0]['area']} in the JSON, counted {p.rows[0]['area'] - 1}", usable=True)


def lying_box(p: Patient) -> None:
    p.rows[0]["bbox"] = [0, 0, 1, 1]
    p.expect(p.mask, "has the bbox [0, 0, 1, 1] in the JSON, counted", usable=True)


def stuff_crowd(p: Patient) -> None:
    things = {c["id"] for c in p.content["categories"] if c["isthing"]}
    row = next(row for row in p.rows if row["category_id"] not in things)
    row["iscrowd"] = 1
    p.expect(p.mask, f"segment {row['id']} is stuff and a crowd", usable=True)


def stuff_twice(p: Patient) -> None:
    things = {c["id"] for c in p.content["categories"] if c["isthing"]}
    first, second, *_ = (row for row in p.rows if row["category_id"] not in things)
    first["category_id"] = second["category_id"]
    p.expect(p.mask, f"segment {first['id']} is one of several of its stuff category", usable=True)


def all_void(p: Patient) -> None:
    p.mask.write_bytes(rgb_ids.write_png(np.zeros_like(p.ids())))
    p.rows.clear()
    p.expect(p.mask, "every pixel is void", usable=True)


def name_outside(p: Patient) -> None:
    outside = f"{p.folder.masks}/../../secret.png"
    p.expected.append((outside, p.entry["image_id"], False, "leads outside the data set"))
    p.expected.append((str(p.mask), None, True, "the PNG has no entry in the JSON"))
    p.entry["file_name"] = "../../secret.png"


def image_not_listed(p: Patient) -> None:
    p.content["images"].remove(p.listed)
    file = str(p.mask)
    problem = f"image id {p.entry['image_id']} is not in the JSON's images"
    p.expected.append((file, p.entry["image_id"], False, problem))


def annotated_twice(p: Patient) -> None:
    p.content["annotations"].append(p.entry)
    p.expect(p.mask, f"2 entries have the image id {p.entry['image_id']}")


def mask_without_entry(p: Patient) -> None:
    shutil.copy(p.mask, p.folder.masks / "stray.png")
    p.expected.append((str(p.folder.masks / "stray.png"), None, True, "the PNG has no entry in the JSON"))


def image_without_annotation(p: Patient) -> None:
    p.content["images"].append({"id": 999_999_999, "file_name": "lone.jpg", "height": 10, "width": 10})
    p.expected.append((str(p.folder.images / "lone.jpg"), 999_999_999, False, "the image has no annotation"))


DAMAGE = [
    missing_image, cut_image, text_as_image, image_of_another_size, rotated_image, deep_image, missing_mask, cut_mask,
    gray_mask, mask_of_another_size, unlisted_segment, segment_without_pixels, unknown_category, repeated_segment,
    id_zero, id_missing, lying_area, lying_box, stuff_crowd, stuff_twice, all_void, name_outside, image_not_listed,
    annotated_twice, mask_without_entry, image_without_annotation,
]  # fmt: skip


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    if not MINI.exists():
        pytest.skip(f"{MINI} is not there")
    for part in (f"annotations/panoptic_{SPLIT}", SPLIT):
        shutil.copytree(MINI / part, tmp_path / part)
    shutil.copy(MINI / f"annotations/panoptic_{SPLIT}.json", tmp_path / "annotations")
    return Patient(tmp_path)


def run(patient: Patient) -> tuple[list[Defect], set[str]]:
    """All defects, and the masks of the images that the damage went to."""
    patient.save()
    _, findings = examine_index(read_index(patient.folder.root, SPLIT), SPLIT, 1, lambda line: None)
    return findings.defects, {file for file, *_ in patient.expected}


def test_each_of_26_kinds_of_damage_is_found_and_named_and_nothing_else(patient: Patient):
    for damage in DAMAGE:
        patient.next()
        if damage is stuff_twice:
            things = {c["id"] for c in patient.content["categories"] if c["isthing"]}
            while sum(row["category_id"] not in things for row in patient.rows) < 2:
                patient.next()
        damage(patient)
    assert len(patient.expected) >= 26
    defects, files = run(patient)
    for file, image_id, usable, problem in patient.expected:
        of_it = [d for d in defects if (d.file, d.image_id, d.usable) == (file, image_id, usable)]
        assert any(problem in d.problem for d in of_it), (file, problem, of_it)
    assert {d.file for d in defects} <= files


def test_the_same_picture_twice_is_told_across_splits(patient: Patient):
    train = patient.folder.root / "annotations/panoptic_train2017"
    shutil.copytree(patient.folder.masks, train)
    shutil.copytree(patient.folder.images, patient.folder.root / "train2017")
    shutil.copy(patient.folder.json, train.with_suffix(".json"))
    page = patient.folder.root / "page.html"
    assert main([str(patient.folder.root), "--workers", "1", "--page", str(page)]) == 0
    assert page.read_text().count("the same picture as") >= 50


def test_the_command_says_by_its_exit_code_whether_the_set_can_be_used(coco: CocoFolder, tmp_path: Path):
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "preprocessing.validate", str(coco.root), "--workers", "2", "--page", str(page)]
    sound = subprocess.run(command, capture_output=True, text=True)
    assert sound.returncode == 0, sound.stderr
    assert "train2017: 12 of 12 samples can be used; 48x48 px" in sound.stdout
    assert "can be trained on" in sound.stdout
    cut(coco.mask(3))
    hurt = subprocess.run(command, capture_output=True, text=True)
    assert hurt.returncode == 1
    assert f"! {coco.mask(3)} (image 4): not a readable panoptic PNG" in hurt.stdout
    assert "train2017: 1 of 12 samples are unusable, above the limit of 1.0%" in hurt.stdout
    assert f"{coco.mask(3)}" in page.read_text()
    assert subprocess.run([*command, "--bad-share", "0.1"], capture_output=True).returncode == 0


def test_what_cannot_be_read_at_all_is_one_sentence(coco: CocoFolder, tmp_path: Path, capsys: pytest.CaptureFixture):
    page = tmp_path / "page.html"
    assert main([str(tmp_path / "nowhere"), "--page", str(page)]) == 1
    assert "nowhere: not found" in capsys.readouterr().out
    coco.json.write_text("{")
    assert main([str(coco.root), "--page", str(page), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "not valid JSON" in out
    assert "val2017: 1 of 1 samples" in out


def test_splits_of_other_categories_cannot_be_used_together(coco: CocoFolder, tmp_path: Path, capsys):
    with coco.editing() as content:
        content["categories"][0]["name"] = "other"
    assert main([str(coco.root), "--page", str(tmp_path / "page.html"), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "train2017, val2017 list different categories: " in out
    assert "1 'other' (thing) against 1 'disk' (thing)" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--workers", "0"], "at least 1"), (["--bad-share", "nan"], "0 to 1"), (["--page", "/nope/x.html"], "cannot be")],
    ids=str,
)
def test_a_wrong_argument_is_told_before_anything_is_read(coco: CocoFolder, capsys, arguments: list[str], told: str):
    with pytest.raises(SystemExit) as end:
        main([str(coco.root), *arguments])
    assert end.value.code == 2
    assert told in capsys.readouterr().err


def test_names_that_are_no_text_are_shown_all_the_same(coco: CocoFolder, tmp_path: Path):
    (Path(os.fsdecode(os.fsencode(coco.masks) + b"/\xff\xfe.png"))).write_bytes(b"")
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "preprocessing.validate", str(coco.root), "--workers", "1", "--page", str(page)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, "\\udcff" in run.stdout, "Traceback" in run.stderr) == (0, True, False)


def test_the_histogram_counts_what_the_pixels_say(coco: CocoFolder):
    labels, findings = examine_index(read_index(coco.root, coco.split), coco.split, 1, lambda line: None)
    rows = histogram(labels, findings)
    truths = [coco.sample(position)[1] for position in range(12)]
    for i, row in enumerate(rows):
        areas = [s.area for truth in truths for s in truth.segments if s.category == i]
        assert (row["segments"], row["share"]) == (len(areas), sum(areas) / (12 * 48 * 48))
        assert row["images"] == sum(any(s.category == i for s in truth.segments) for truth in truths)
    void = sum(int((truth.ids == 0).sum()) for truth in truths)
    assert findings.void_pixels == void
    assert findings.sizes == {(48, 48): 12}
    assert findings.crowds == sum(s.is_crowd for truth in truths for s in truth.segments)


def test_any_number_of_processes_finds_the_same(coco: CocoFolder):
    cut(coco.image(2))
    one, two = (examine_index(read_index(coco.root, coco.split), coco.split, n, lambda line: None)[1] for n in (1, 2))
    assert one == two


@pytest.mark.parametrize("samples", [100, 200, 300, 1000])
def test_just_the_share_that_is_allowed_is_no_more_than_it(samples: int):
    findings = Findings(images=samples, usable=samples - samples // 100)
    assert findings.bad_share == 0.01
    assert Findings(images=samples - 1, usable=samples - samples // 100 - 1, rejected=1).bad_share > 0.01


def validated(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main([str(folder), "--page", str(folder / "page.html"), "--workers", "1"])
    return code, capsys.readouterr().out


def test_a_colour_that_one_split_lacks_is_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, out = validated(made("6-colour-missing-in-one-split", tmp_path), capsys)
    assert code == 0
    assert "can be trained on" in out


def test_a_background_that_is_left_out_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, out = validated(made("14-background-as-void", tmp_path), capsys)
    assert code == 0
    assert out.count("80% of the pixels are void and no stuff is labelled: void means 'not labelled'") == 2


def test_a_split_without_any_segment_cannot_be_used(coco: CocoFolder, tmp_path: Path, capsys):
    with coco.editing() as content:
        for entry in content["annotations"]:
            entry["segments_info"] = []
    for position in range(12):
        coco.write_ids(position, np.zeros((48, 48), np.int32))
    code, out = validated(coco.root, capsys)
    assert code == 1
    assert "train2017: every pixel is void, there is nothing to learn or to measure" in out
