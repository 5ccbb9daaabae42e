"""A set in any of the usual layouts gives what it gives in COCO's; what is not found is named where it lies."""

import os
import shutil
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.errors import TesseraError
from preprocessing import coco as coco_layout
from preprocessing.source import BadSample, Index, read_sample
from tests.support.cases import case
from tests.support.coco_folder import CocoFolder


def rename(coco: CocoFolder, part: str, change: Callable[[str], str]) -> None:
    """Other file names in the JSON."""
    with coco.editing() as content:
        for entry in content[part]:
            entry["file_name"] = change(entry["file_name"])


def move(coco: CocoFolder, source: str, target: str) -> None:
    (coco.root / target).parent.mkdir(parents=True, exist_ok=True)
    (coco.root / source).rename(coco.root / target)


def into_top_folder(coco: CocoFolder) -> None:
    coco.root.rename(coco.root.with_name("moved"))
    coco.root.mkdir()
    coco.root.with_name("moved").rename(coco.root / "COCO2017")


def zipped(coco: CocoFolder, *, top: str = "", also: Callable[[str], str] = str) -> None:
    """All of it in one zip at the root."""
    files = [path for path in sorted(coco.root.rglob("*")) if path.is_file()]
    data = {path.relative_to(coco.root).as_posix(): path.read_bytes() for path in files}
    shutil.rmtree(coco.root)
    coco.root.mkdir()
    with zipfile.ZipFile(coco.root / "dataset.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in data.items():
            archive.writestr(also(f"{top}{name}"), content)


def accented(coco: CocoFolder, in_json: str, on_disk: str) -> None:
    """Names with an accent, in two forms."""

    def spelled(name: str, form: Any) -> str:
        return unicodedata.normalize(form, f"G\u00f6rlitz {name}")

    for part in ("images", "annotations"):
        rename(coco, part, lambda name: spelled(name, in_json))
    for path in (*coco.images.iterdir(), *coco.masks.iterdir()):
        path.rename(path.with_name(spelled(path.name, on_disk)))


def linked(coco: CocoFolder) -> None:
    """Images in a folder that is a link, beside a link to itself and one around."""
    move(coco, "train2017", "elsewhere")
    coco.images.mkdir()
    (coco.images / "all").symlink_to(coco.root / "elsewhere")
    (coco.images / "me").symlink_to("me")
    (coco.images / "round").symlink_to(coco.images)


LAYOUTS: dict[str, Callable[[CocoFolder], object]] = {
    "images/<split>": lambda coco: move(coco, "train2017", "images/train2017"),
    "panoptic_<split> at the root": lambda coco: move(coco, "annotations/panoptic_train2017", "panoptic_train2017"),
    "an empty folder in its place": lambda coco: (
        move(coco, "train2017", "images/train2017"),
        coco.images.mkdir(),
    ),
    "litter in its place": lambda coco: (
        move(coco, "train2017", "images/train2017"),
        coco.images.mkdir(),
        (coco.images / ".DS_Store").write_bytes(b"x"),
    ),
    "one folder deeper": into_top_folder,
    "one folder deeper in a zip": lambda coco: zipped(coco, top="COCO2017/"),
    "names in the zip from the root": lambda coco: zipped(coco, top="/"),
    "names in the zip from here": lambda coco: zipped(coco, top="./"),
    "backslashes in the zip": lambda coco: zipped(coco, also=lambda name: name.replace("/", "\\")),
    "images named with their folder": lambda coco: rename(coco, "images", lambda name: f"train2017/{name}"),
    "images named with their folders": lambda coco: rename(coco, "images", lambda name: f"images/train2017/{name}"),
    "PNGs named with their folder": lambda coco: rename(coco, "annotations", lambda name: f"panoptic_train2017/{name}"),
    "PNGs named as the images": lambda coco: rename(coco, "annotations", lambda name: name.replace(".png", ".jpg")),
    "named in full as the images": lambda coco: rename(
        coco, "annotations", lambda name: f"panoptic_train2017/{name}".replace(".png", ".jpg")
    ),
    "images in the folder twice": lambda coco: (
        move(coco, "train2017", "x"),
        move(coco, "x", "train2017/train2017"),
    ),
    "composed in the JSON, not on disk": lambda coco: accented(coco, "NFC", "NFD"),
    "composed on disk, not in the JSON": lambda coco: accented(coco, "NFD", "NFC"),
    "not composed in a zip": lambda coco: (accented(coco, "NFC", "NFD"), zipped(coco)),
    "folders that are links": linked,
}


def samples(index: Index) -> list[tuple[int, bytes, bytes]]:
    read = [(record.image_id, *read_sample(record, index.labels)) for record in index.records]
    return [(number, data, truth.ids.tobytes()) for number, data, truth in read]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_usual_layouts_give_the_same_samples(coco: CocoFolder, name: str):
    before = samples(coco.index())
    LAYOUTS[name](coco)
    index = coco.index()
    assert samples(index) == before
    assert (index.rejected, index.unused) == ((), ())


MISPLACED: dict[str, tuple[Callable[[CocoFolder], object], str]] = {
    "deeper": (
        lambda coco: move(coco, "annotations", "a/b/annotations"),
        r"there is a/b/annotations/panoptic_train2017\.json$",
    ),
    "two": (
        lambda coco: (
            [shutil.copytree(coco.root / "annotations", coco.root / top / "annotations") for top in "ab"]
            + [shutil.rmtree(coco.root / "annotations")]
        ),
        r"there is a/annotations/panoptic_train2017\.json; there is b/annotations/panoptic_train2017\.json$",
    ),
    "case": (
        lambda coco: move(coco, "annotations", "Annotations"),
        r"there is Annotations/panoptic_train2017\.json$",
    ),
    "similar": (
        lambda coco: move(coco, "annotations/panoptic_train2017.json", "annotations/panoptic_train.json"),
        r"there is annotations/panoptic_(train|val2017)\.json",
    ),
    "in a zip": (
        lambda coco: zipped(coco, top="a/b/"),
        r"dataset\.zip has a/b/annotations/panoptic_train2017\.json$",
    ),
    "PNGs in another folder": (
        lambda coco: move(coco, "annotations/panoptic_train2017", "masks/panoptic_train2017"),
        r"panoptic_train2017: not found, nor panoptic_train2017 .*there is masks/panoptic_train2017$",
    ),
    "in a zip in a folder": (
        lambda coco: (zipped(coco), move(coco, "dataset.zip", "data/dataset.zip")),
        r"data/dataset\.zip is not looked into there$",
    ),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_what_is_not_found_is_named_where_it_lies(coco: CocoFolder, name: str):
    spoil, told = MISPLACED[name]
    spoil(coco)
    with pytest.raises(TesseraError, match=told):
        coco.index()


def test_a_missing_file_is_told_with_what_is_there_instead(coco: CocoFolder):
    coco.image(3).rename(coco.image(3).with_suffix(".JPG"))
    reason = coco.reason(3)
    assert "000000000004.jpg: cannot be read (there is none, but there is 000000000004.JPG)" in reason


def test_a_name_that_several_files_have_is_none(coco: CocoFolder):
    """Folders in the folder, and in two of them the same name: which is meant, nobody knows."""
    for folder in ("a", "b"):
        shutil.copytree(coco.images, coco.root / "images/train2017" / folder)
    shutil.rmtree(coco.images)
    with pytest.raises(BadSample, match=r"there is none, but there is [ab]/000000000001\.jpg, [ab]/000000000001\.jpg"):
        coco.sample(0)


def test_a_tree_that_holds_part_of_a_set_does_not_lend_it(coco: CocoFolder):
    """Labels of another task in a folder of the split's name are no images."""
    move(coco, "train2017", "labels/train2017")
    with pytest.raises(TesseraError, match=r"train2017: not found, nor images/train2017 .*there is labels/train2017$"):
        coco.index()


def test_what_cannot_be_listed_is_told_where_a_file_is_missing(coco: CocoFolder):
    move(coco, "train2017/000000000002.jpg", "train2017/part/000000000002.jpg")
    (coco.images / "me").symlink_to("me")
    with pytest.raises(BadSample, match=r"there is none, but there is part/000000000002\.jpg"):
        coco.sample(1)
    (coco.images / "part/000000000002.jpg").unlink()
    with pytest.raises(BadSample, match=r"there is none; .*train2017/me cannot be listed \(.*symbolic links"):
        coco.sample(1)
    coco.sample(2)


@pytest.mark.parametrize("name", ["7-zip-with-top-folder", "8-unicode-nfd"])
def test_the_cases_that_people_sent(tmp_path: Path, name: str):
    (script,) = case(name).glob("make.*")
    program = "sh" if script.suffix == ".sh" else "python"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run([program, script, tmp_path / "set"], check=True, env={**os.environ, "PATH": path})
    for split in ("train2017", "val2017"):
        index = coco_layout.read_index(tmp_path / "set", split)
        assert index.rejected == ()
        assert len(samples(index)) == len(index.records) > 0
