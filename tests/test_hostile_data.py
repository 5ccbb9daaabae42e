"""Data sets and uploads made to do harm, each read by the function that meets it first."""

import json
import logging
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaluation import plots
from infra.errors import TesseraError
from infra.page import page
from infra.store import open_store
from preprocessing.files import File
from preprocessing.inbox import Decision, refuse_faults, uploads
from preprocessing.labels import LabelTable
from preprocessing.layouts import read_index
from preprocessing.shards import ShardConfig
from preprocessing.source import read_sample
from preprocessing.tree import Tree
from tests.support.coco_folder import CocoFolder
from tests.support.hostile import Act, Cases, write_coco
from tests.support.odd_images import bomb, encoded, scene
from tests.support.shard_sets import make_set

SCRIPT = "--><script>alert(1)</script>"
case = Cases()


# ---- data sets: the whole way from the folder to a set of shards that may lose no sample


def precomputed(root: Path, split: str, layout: str = "coco") -> object:
    config = ShardConfig(grid=None, radius=0)
    return make_set(open_store(str(root.parent / "store")), read_index(root, split, layout), config)


def coco_case(name: str, *told: str) -> Callable[[Callable[[CocoFolder], Any]], Act]:
    """A change to the first of two samples."""

    def add(change: Callable[[CocoFolder], Any]) -> Act:
        def act(folder: Path) -> object:
            coco = write_coco(folder)
            change(coco)
            return precomputed(coco.root, coco.split)

        return case(name, *told)(act)

    return add


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    """Another chunk behind the header, which ends at byte 33."""
    return png[:33] + chunk(kind, body) + png[33:]


PLAIN = encoded(scene(24, 24), "PNG")
ZEROS = zlib.compress(bytes(10**8))
IMAGE, MASK = r"image 1, .*train2017/000000000001\.jpg: ", r"annotations/panoptic_train2017/000000000001\.png: "


def huge_jpeg() -> bytes:
    data = encoded(scene(24, 24), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]


IMAGES = {
    "png-bomb": (bomb(11_000), "claims 11000x11000 pixels, at most 89478485"),
    "png-bomb-larger": (bomb(60_000), "3600000000 pixels"),
    "jpeg-bomb": (huge_jpeg(), "4294836225 pixels"),
    "png-text-bomb": (with_chunk(PLAIN, b"zTXt", b"k\0\0" + ZEROS), "MAX_TEXT_CHUNK"),
    "png-icc-bomb": (with_chunk(PLAIN, b"iCCP", b"k\0\0" + ZEROS), "MAX_TEXT_CHUNK"),
    "image-eps": (encoded(scene(24, 24), "EPS"), "of no format that is known"),
    "image-html": (b"<html><script>alert(1)</script></html>", "of no format that is known"),
}
for name, (data, why) in IMAGES.items():
    coco_case(name, IMAGE, rf"not a readable image \(.*{why}")(lambda coco, data=data: coco.image(0).write_bytes(data))
    if name.startswith("png") and "text" not in name and "icc" not in name:
        coco_case(f"{name}-as-mask", IMAGE, rf"{MASK}not a readable panoptic PNG \(.*claims")(
            lambda coco, data=data: coco.mask(0).write_bytes(data)
        )


@coco_case("mask-idat-bomb", IMAGE, rf"{MASK}not a readable panoptic PNG \(.*too long")
def _(coco: CocoFolder) -> None:
    coco.mask(0).write_bytes(PLAIN[:33] + chunk(b"IDAT", ZEROS) + chunk(b"IEND", b""))


@coco_case("file-endless", IMAGE, "1099511627776 bytes are too many for one file")
def _(coco: CocoFolder) -> None:
    os.truncate(coco.image(0), 1 << 40)  # a sparse one, which takes no room


@coco_case("file-pipe", IMAGE, "no regular file")
def _(coco: CocoFolder) -> None:
    mask = coco.mask(0)
    mask.unlink()
    os.mkfifo(mask)


OUTSIDE = "leads outside the data set"
NAMES = {
    "traversal": ("../../../../etc/passwd", OUTSIDE),
    "hidden-traversal": ("a/./../../000000000002.png", OUTSIDE),
    "absolute": ("/etc/passwd", OUTSIDE),
    "nul": ("000000000001.png\0.jpg", r"file_name is '000000000001\.png\\x00\.jpg', expected a path"),
    "newline": ("1.png\nINFO all is well", r"file_name is '1\.png\\nINFO all is well', expected a path"),
    "bidi": ("\u202egnp.1", "expected a path"),
    "number": (7, "file_name is 7, expected a path"),
    "backslash": ("..\\..\\secret.png", "cannot be read"),
    "drive": ("C:\\secret.png", "cannot be read"),
    "pipe": ("pipe:touch ran", "pipe:touch ran: cannot be read"),
    "http": ("http://127.0.0.1/1.png", "http:/.*: cannot be read"),
    "file": ("file:///etc/passwd", "file:/.*: cannot be read"),
    "long": ("x" * 300, "File name too long"),
}
for name, (file_name, why) in NAMES.items():
    for part in ("images", "annotations"):

        def rename(coco: CocoFolder, part: str = part, file_name: object = file_name) -> None:
            with coco.editing() as content:
                content[part][0]["file_name"] = file_name

        coco_case(f"file_name-{name}-in-{part}", "image 1, ", why)(rename)


def edited(name: str, change: Callable[[dict], Any], *told: str) -> None:
    def edit(coco: CocoFolder) -> None:
        with coco.editing() as content:
            change(content)

    coco_case(name, r"panoptic_train2017(\.json|/000000000001\.png): ", *told)(edit)


def with_id(number: Any) -> Callable[[dict], Any]:
    def change(content: dict) -> None:
        content["images"][0]["id"] = content["annotations"][0]["image_id"] = number

    return change


edited("id-negative", with_id(-5), "image_id is -5, expected 0 to 2")
edited("id-huge", with_id(10**30), "image_id is 1000000000.*, expected 0 to 2")
edited("id-nan", with_id(float("nan")), "image_id is nan, expected an integer or a name")
edited("color-outside", lambda c: c["categories"][0].update(color=[300, 0, 0]), "three integers from 0 to 255 as color")
edited("category-newline", lambda c: c["categories"][0].update(name="a\nb"), "expected a printable name")
edited("category-surrogate", lambda c: c["categories"][0].update(name="\ud800"), "expected a printable name")


@coco_case("json-nested", r"panoptic_train2017\.json: not valid JSON")
def _(coco: CocoFolder) -> None:
    coco.json.write_text("[" * 100_000)


@coco_case("json-huge-integer", r"panoptic_train2017\.json: not valid JSON")
def _(coco: CocoFolder) -> None:
    coco.json.write_text(f'{{"images": [{"9" * 5000}]}}')


@coco_case("json-endless", r"panoptic_train2017\.json: cannot be read \(1099511627776 bytes are too many")
def _(coco: CocoFolder) -> None:
    os.truncate(coco.json, 1 << 40)


@case("cityscapes-bomb", r"a_gtFine_instanceIds\.png: not a readable PNG \(it claims 11000x11000")
def _(folder: Path) -> object:
    for part, name, data in (("gtFine", "gtFine_instanceIds", bomb(11_000)), ("leftImg8bit", "leftImg8bit", PLAIN)):
        (folder / "set" / part / "train/x").mkdir(parents=True)
        (folder / "set" / part / "train/x" / f"a_{name}.png").write_bytes(data)
    return precomputed(folder / "set", "train", "cityscapes")


@case("ade20k-bomb", r"annotations_instance/train/a\.png: not a readable PNG \(it claims 11000x11000")
def _(folder: Path) -> object:
    for part, name, data in (
        ("images", "a.jpg", encoded(scene(24, 24), "JPEG")),
        ("annotations", "a.png", encoded(scene(24, 24).convert("L"), "PNG")),
        ("annotations_instance", "a.png", bomb(11_000)),
    ):
        (folder / "set" / part / "train").mkdir(parents=True)
        (folder / "set" / part / "train" / name).write_bytes(data)
    return precomputed(folder / "set", "train", "ade20k")


def detections(folder: Path, side: int, annotations: list[dict]) -> object:
    """An image of 1000 x 1000 pixels that the JSON says has `side`."""
    root, picture = folder / "set", Image.new("L", (1000, 1000))
    for part in ("train", "annotations/semantic_train"):
        (root / part).mkdir(parents=True)
        picture.save(root / part / "a.png")
    listed = [{"id": 1, "file_name": "a.png", "height": side, "width": side}]
    content = {"images": listed, "annotations": annotations, "categories": [{"id": 1, "name": "a", "isthing": 1}]}
    (root / "annotations/instances_train.json").write_text(json.dumps(content))
    return precomputed(root, "train", "instances")


def mask_of(side: int) -> dict:
    return {"image_id": 1, "category_id": 1, "segmentation": {"size": [side, side], "counts": [0, side * side]}}


@case("rle-bomb", r"semantic_train/a\.png: the semantic PNG is 1000x1000, the JSON says 100000x100000")
def _(folder: Path) -> object:
    return detections(folder, 10**5, [mask_of(10**5)])


@case("masks-without-end", r"semantic_train/a\.png: 9000 masks cover 9000000000 pixels of one image, at most")
def _(folder: Path) -> object:
    return detections(folder, 1000, [mask_of(1000)] * 9000)


@case("zip-in-zip-bomb", r"outer\.zip/panoptic\.zip: not a readable zip .*inflate from \d+ bytes to \d+.* a zip bomb")
def _(folder: Path) -> object:
    with zipfile.ZipFile(folder / "outer.zip", "w", zipfile.ZIP_DEFLATED) as outer:
        outer.writestr("panoptic.zip", bytes(20_000_000))
    return Tree(folder).folder("panoptic")


@case("json-in-zip-bomb", r"set\.zip/annotations/panoptic_train2017\.json: cannot be read \(it would inflate from")
def _(folder: Path) -> object:
    """Of 300 kB, which would be 7 GB of empty lists."""
    (folder / "set").mkdir()
    with zipfile.ZipFile(folder / "set/set.zip", "w", zipfile.ZIP_DEFLATED) as made:
        for name in ("train2017/1.jpg", "annotations/panoptic_train2017/1.png"):
            made.writestr(name, PLAIN)
        with made.open("annotations/panoptic_train2017.json", "w") as member:
            member.write(b'{"images": [')
            for _ in range(300):
                member.write(b"[],[],[],[]," * 87_000)
            member.write(b"[]]}")
    return precomputed(folder / "set", "train2017")


# ---- the inbox


@case("inbox-link", r"inbox/monday/train2017/1\.jpg: a link, expected the file itself")
def _(folder: Path) -> None:
    images = folder / "inbox/monday/train2017"
    images.mkdir(parents=True)
    (images / "1.jpg").symlink_to("/etc/passwd")
    (folder / "inbox/monday/_SUCCESS").touch()
    store = open_store(str(folder))
    refuse_faults(store, uploads(store)[0])


@case("inbox-link-to-a-folder", r"inbox/monday: a link, expected the file itself")
def _(folder: Path) -> None:
    (folder / "inbox").mkdir()
    write_coco(folder / "elsewhere")
    (folder / "inbox/monday").symlink_to(folder / "elsewhere/coco")
    store = open_store(str(folder))
    refuse_faults(store, uploads(store)[0])


@pytest.mark.parametrize("name", case.known)
def test_it_is_refused_by_name(name: str, tmp_path: Path):
    case.check(name, tmp_path)


# ---- what is read all the same, and does nothing


def test_ghostscript_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    act, _ = case.known["image-eps"]
    with pytest.raises(TesseraError):
        act(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("exif", [b"garbage", b"MM\0*\0\0"])
def test_an_image_whose_exif_is_garbage_is_read_and_told_of(tmp_path: Path, exif: bytes):
    coco = write_coco(tmp_path)
    coco.image(0).write_bytes(with_chunk(PLAIN, b"eXIf", exif))
    record, labels = coco.record(0), coco.index().labels
    read_sample(record, labels)
    problems = [defect.problem for defect in record.examine(labels).defects]
    assert "its EXIF data cannot be read: taken as it lies" in problems


def test_a_line_break_in_a_name_begins_no_line_of_a_log(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox/x\nINFO promoted").touch()
    with caplog.at_level(logging.WARNING):
        uploads(open_store(str(tmp_path)))
    decided = Decision("x\nINFO promoted", "1", "known", "now")
    for told in (caplog.messages[0], decided.brief(""), str(decided), str(File("/x\nINFO promoted"))):
        assert r"x\nINFO promoted" in told
        assert told.isprintable()


def test_no_name_is_markup_in_a_page():
    assert SCRIPT not in page("page.html", SCRIPT, {SCRIPT: SCRIPT})
    rows = [{"size": 1, "instances": 2, "iou": 3.0, "pq": {"things": 1.0}}]
    assert "<script" not in plots.sizes({SCRIPT: rows, "$x^^$ of </svg>": rows})
    templates = [*Path().glob("[!.]*/*.html")]
    assert len(templates) == 6
    as_it_is = {name for path in templates for name in re.findall(r"(\S+) *\| *safe", path.read_text())}
    assert as_it_is == {"sizes", "curves", "chart"}  # SVG by matplotlib; all else is escaped


def test_a_table_of_categories_that_holds_its_limits_is_read():
    rows = [{"id": 1, "name": "naïve <b>", "isthing": 1, "color": [0, 255, 7]}]
    assert LabelTable.from_coco(rows).names == ("naïve <b>",)
