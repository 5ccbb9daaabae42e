"""Data made to do harm: each case, read by the function that meets it first, is refused in one sentence that names it.

No case may take much memory, whatever it claims. docs/security.md lists them beside those that other tests hold.
"""

import hashlib
import io
import json
import logging
import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from evaluation import plots
from evaluation.coco_files import score_files
from evaluation.predict_files import predict_chunk
from evaluation.predict_plan import plan_prediction
from evaluation.report import page
from infra import artifacts
from infra.errors import TesseraError
from infra.store import open_store
from preprocessing.files import File, Tree
from preprocessing.inbox import Decision, refuse_links, uploads
from preprocessing.labels import LabelTable
from preprocessing.layouts import read_index
from preprocessing.sample import FIELDS, decode_image, from_fields
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import Shard, ShardConfig
from preprocessing.source import read_sample
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.coco_folder import CocoFolder
from tests.support.odd_images import bomb, encoded, scene
from tests.support.shard_sets import make_set
from training.backbones.weights import parse, read_weights
from training.checkpoints import read_state

MOST = 300 << 20
"""Bytes by which no case may let the process grow."""
SCRIPT = "--><script>alert(1)</script>"
Act = Callable[[Path], object]
CASES: dict[str, tuple[Act, tuple[str, ...]]] = {}
"""By name: what reads it, given an empty folder, and what the refusal tells (regular expressions)."""


def case(name: str, *told: str) -> Callable[[Act], Act]:
    def add(act: Act) -> Act:
        assert name not in CASES
        CASES[name] = act, told
        return act

    return add


@contextmanager
def little_memory() -> Iterator[None]:
    """The most that is resident within, by Linux' count, which is begun anew; elsewhere nothing is checked."""
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")

    def peak() -> int:
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) << 10

    before = peak()
    yield
    assert peak() - before < MOST


# ---- data sets: the whole way from the folder to a set of shards that may lose no sample


def write_coco(folder: Path) -> CocoFolder:
    return CocoFolder(write_set(folder / "coco", SyntheticConfig(train=2, val=1, size=(24, 24), seed=1)))


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
    return {"image_id": 1, "category_id": 1, "segmentation": {"size": [side, side], "counts": [side * side]}}


@case("rle-bomb", r"semantic_train/a\.png: the semantic PNG is 1000x1000, the JSON says 100000x100000")
def _(folder: Path) -> object:
    return detections(folder, 10**5, [mask_of(10**5)])


@case("masks-without-end", r"semantic_train/a\.png: 9000 masks of 1000x1000 pixels are too many for one image")
def _(folder: Path) -> object:
    return detections(folder, 1000, [mask_of(1000)] * 9000)


@case("zip-in-zip-bomb", r"outer\.zip/panoptic\.zip: not a readable zip .*inflate from \d+ bytes to \d+.* a zip bomb")
def _(folder: Path) -> object:
    with zipfile.ZipFile(folder / "outer.zip", "w", zipfile.ZIP_DEFLATED) as outer:
        outer.writestr("panoptic.zip", bytes(20_000_000))
    return Tree(folder).folder("panoptic")


# ---- the inbox


@case("inbox-link", r"inbox/monday/train2017/1\.jpg: a link, expected the file itself")
def _(folder: Path) -> None:
    images = folder / "inbox/monday/train2017"
    images.mkdir(parents=True)
    (images / "1.jpg").symlink_to("/etc/passwd")
    (folder / "inbox/monday/_SUCCESS").touch()
    store = open_store(str(folder))
    refuse_links(store, uploads(store)[0])


@case("inbox-link-to-a-folder", r"inbox/monday: a link, expected the file itself")
def _(folder: Path) -> None:
    (folder / "inbox").mkdir()
    write_coco(folder / "elsewhere")
    (folder / "inbox/monday").symlink_to(folder / "elsewhere/coco")
    store = open_store(str(folder))
    refuse_links(store, uploads(store)[0])


# ---- shards


def tar_of(*members: tuple[str, bytes, bytes]) -> bytes:
    """Name, kind and content of each."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data)
            info.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def shard_case(name: str, tar: bytes, *told: str) -> None:
    def act(folder: Path) -> object:
        store = open_store(str(folder))
        store.write("a.tar", tar)
        shard = Shard("a.tar", (1,), (1,), len(tar), hashlib.sha256(tar).hexdigest(), ())
        return list(read_shard_samples(store.url, shard))

    case(name, r"/a\.tar: ", *told)(act)


def patched(tar: bytes, at: int, text: bytes) -> bytes:
    return tar[:at] + text + tar[at + len(text) :]


WHOLE = [(f"000000000001.{field}", tarfile.REGTYPE, b"x" * 600) for field in sorted(FIELDS)]
MORE = [(f"000000000002.{field}", tarfile.REGTYPE, b"x" * 600) for field in sorted(FIELDS)]
KINDS = {"link": tarfile.SYMTYPE, "hard-link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE}
for name, kind in KINDS.items():
    shard_case(f"tar-member-{name}", tar_of(("000000000001.jpg", kind, b""), *WHOLE[1:]), "expected only plain files")
shard_case("tar-member-absolute", tar_of(("/etc/passwd", tarfile.REGTYPE, b"")), "holds 0 whole samples")
shard_case("tar-member-traversal", tar_of(("../../x.jpg", tarfile.REGTYPE, b"")), "holds 0 whole samples")
shard_case("tar-member-twice", tar_of(*WHOLE, WHOLE[0]), "holds 0 whole samples, its record says 1")
shard_case("tar-sample-twice", tar_of(*WHOLE, *MORE, *WHOLE), "holds 3 whole samples, its record says 1")
shard_case("tar-size-negative", patched(tar_of(*WHOLE), 124, b"-0000001000\0"), "expected only plain files")
shard_case("tar-size-no-number", patched(tar_of(*WHOLE), 124, b"zzzzzzzzzzz\0"), "expected only plain files")
shard_case("tar-size-huge", patched(tar_of(*WHOLE), 124, b"77777777777\0"), "ends within 000000000001.jpg")
shard_case("tar-name-no-text", patched(tar_of(*WHOLE), 0, b"\xff"), "expected only plain files")


def sample_case(name: str, arrays: dict, *told: str) -> None:
    facts = {"image_id": 7, "file_name": "a", "segments": [], "arrays": arrays}
    fields = {"json": json.dumps(facts).encode(), "jpg": b"", "labels.lz4": pickle.dumps(0), "x.lz4": b""}
    case(name, "a sample is not what precompute writes", '"image_id": 7', *told)(lambda folder: from_fields(fields))


sample_case("sample-of-objects", {"labels": {"dtype": "|O", "shape": [4]}}, "an array labels of object")
sample_case("sample-array-bomb", {"labels": {"dtype": "|u1", "shape": [10**6, 10**6]}}, "1000000000000 bytes")
sample_case("sample-array-unknown", {"x": {"dtype": "|u1", "shape": [4]}}, "an array x of uint8")
sample_case("sample-shape-negative", {"labels": {"dtype": "|u1", "shape": [-1]}})
sample_case("sample-no-lz4", {"labels": {"dtype": "|u1", "shape": [4]}})
case("sample-json-nested", "a sample is not what precompute writes")(lambda _: from_fields({"json": b"[" * 10**5}))
case("sample-image-bomb", "it claims 11000x11000 pixels")(lambda _: decode_image(bomb(11_000)))


# ---- the store's other objects, checkpoints, weights


@case("manifest-nested", r"x/manifest\.json: damaged, expected JSON")
def _(folder: Path) -> object:
    open_store(str(folder)).write("x/manifest.json", b"[" * 100_000)
    return artifacts.read_manifest(open_store(str(folder)), "x")


for scheme in ("pipe:cat /etc/passwd|://", "http://127.0.0.1:9/", "file://etc/", "gs://bucket", "s3://bucket/../x"):
    case(f"storage-{scheme.partition(':')[0]}", "is no (store|key): ")(lambda _, u=scheme: open_store(u))
    case(f"weights-{scheme.partition(':')[0]}", "weights ", re.escape(scheme.partition("/")[0]))(
        lambda _, u=scheme: read_weights(u)
    )


class Harm:
    """Code in a pickle, which would leave a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def saved(value: object, deflated: bool = False) -> bytes:
    buffer, squeezed = io.BytesIO(), io.BytesIO()
    torch.save(value, buffer)
    if not deflated:
        return buffer.getvalue()
    with zipfile.ZipFile(buffer) as parts, zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in parts.infolist():
            packed.writestr(part.filename, parts.read(part))
    return squeezed.getvalue()


def checkpoint(folder: Path, data: bytes) -> object:
    store = open_store(str(folder))
    store.write("train/x/checkpoints/00000003.pt", data)
    return read_state(store, "train/x", 3)


TENSOR = {"step": 3, "a": torch.zeros(1000, 1000)}
SPARSE = {"a": torch.sparse_coo_tensor(torch.zeros((1, 1), dtype=torch.long), torch.ones(1), (10**12,))}
CHECKPOINT = r"train/x/checkpoints/00000003\.pt: expected a checkpoint of step 3: "
case("checkpoint-pickle", CHECKPOINT, "it holds something other than tensors and plain values")(
    lambda f: checkpoint(f, saved(Harm(f / "ran")))
)
case("checkpoint-deflated", CHECKPOINT, "compressed")(lambda f: checkpoint(f, saved(TENSOR, deflated=True)))
case("weights-code", "^weights w: expected safetensors or")(lambda f: parse(saved({"a": Harm(f / "ran")}), "w"))
case("weights-deflated", "^weights w: expected safetensors or")(lambda f: parse(saved(TENSOR, deflated=True), "w"))
case("weights-repeated", r"^weights w: entries with more elements than the file holds: 1 \(a\)")(
    lambda f: parse(saved({"a": torch.zeros(1).expand(10**9)}), "w")
)
case("weights-sparse", r"^weights w: entries with more elements")(lambda f: parse(saved(SPARSE), "w"))
case("weights-on-no-device", r"^weights w: entries with more elements")(
    lambda f: parse(saved({"a": torch.zeros(10**12, device="meta")}), "w")
)


# ---- predictions


def scored(folder: Path, file_name: str) -> object:
    coco = write_coco(folder)
    predicted = folder / "predicted.json"
    content = json.loads(coco.json.read_text())
    content["annotations"][0]["file_name"] = file_name
    predicted.write_text(json.dumps(content))
    return score_files(coco.json, predicted, coco.masks, coco.masks)


for name, file_name in {"traversal": "../../../../../../dev/zero", "device": "/dev/zero"}.items():
    case(f"predicted-name-{name}", r"predicted\.json: image 1: .*/dev/zero' leads outside of ")(
        lambda folder, file_name=file_name: scored(folder, file_name)
    )


@case("predicted-pipe", r"x\.png: not a readable panoptic PNG \(it is no regular file\)")
def _(folder: Path) -> object:
    coco = write_coco(folder)
    os.mkfifo(coco.masks / "x.png")
    with coco.editing() as content:
        content["annotations"][0]["file_name"] = "x.png"
    return score_files(coco.json, coco.json, coco.masks, coco.masks)


@case("predict-endless", r"x\.jpg: 1099511627776 bytes are too many for one file")
def _(folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "photos/x.jpg").touch()
    os.truncate(folder / "photos/x.jpg", 1 << 40)
    plan = plan_prediction(f"{folder}/train/x", str(folder / "photos"), str(folder / "out"))
    (failure,) = predict_chunk(plan.work, plan.items, None).failed
    raise TesseraError(f"{failure.file_name}: {failure.why}")


@case("predict-pipe", "photos: no such file, nor a folder with any")
def _(folder: Path) -> None:
    (folder / "photos").mkdir()
    os.mkfifo(folder / "photos/x.jpg")
    plan_prediction(f"{folder}/train/x", str(folder / "photos"), str(folder / "out"))


@case("predict-list-nested", r"list\.json: no list of images")
def _(folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "photos/x.jpg").write_bytes(b"")
    (folder / "list.json").write_text("[" * 100_000)
    plan_prediction(f"{folder}/train/x", str(folder / "photos"), str(folder / "out"), str(folder / "list.json"))


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_name(name: str, tmp_path: Path):
    act, told = CASES[name]
    with little_memory(), pytest.raises(TesseraError) as caught:
        act(tmp_path)
    sentence = str(caught.value)
    for pattern in told:
        assert re.search(pattern, sentence), sentence
    assert sentence.isprintable(), sentence
    assert len(sentence) < 2000
    assert not (tmp_path / "ran").exists()


# ---- what is read all the same, and does nothing


def test_ghostscript_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    act, _ = CASES["image-eps"]
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


def test_a_pickle_in_a_shard_stays_bytes(tmp_path: Path):
    """webdataset would load `.pkl`, `.pyd` and `.pth`."""
    evil = pickle.dumps(Harm(tmp_path / "ran"))
    more = [(f"000000000001.{kind}", tarfile.REGTYPE, evil) for kind in ("pkl", "pyd", "pth", "cls")]
    tar, store = tar_of(*WHOLE, *more), open_store(str(tmp_path))
    store.write("a.tar", tar)
    shard = Shard("a.tar", (1,), (1,), len(tar), hashlib.sha256(tar).hexdigest(), ())
    (fields,) = read_shard_samples(store.url, shard)
    assert fields["pkl"] == evil
    assert not (tmp_path / "ran").exists()


def test_links_that_lead_round_in_circles_are_listed_once(tmp_path: Path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").touch()
    for name in ("one", "two", "b/three"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "a")
    assert [entry.key for entry in open_store(str(tmp_path)).list()] == ["a/b/file"]


def test_a_line_break_in_a_name_begins_no_line_of_a_log(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox/x\nINFO promoted").touch()
    with caplog.at_level(logging.WARNING):
        uploads(open_store(str(tmp_path)))
    decided = Decision("x\nINFO promoted", "1", "accepted", "now")
    for told in (caplog.messages[0], decided.brief(""), str(decided), str(File("/x\nINFO promoted"))):
        assert r"x\nINFO promoted" in told
        assert told.isprintable()


def test_no_name_is_markup_in_a_page():
    assert SCRIPT not in page("page.html", title=SCRIPT)
    rows = [{"size": 1, "instances": 2, "iou": 3.0, "pq": {"things": 1.0}}]
    assert "<script" not in plots.sizes({SCRIPT: rows, "$x^^$ of </svg>": rows})
    templates = [*Path("evaluation").glob("*.html"), *Path("preprocessing").glob("*.html")]
    as_it_is = {name for path in templates for name in re.findall(r"(\S+) *\| *safe", path.read_text())}
    assert as_it_is == {"sizes", "curves", "chart"}  # SVG by matplotlib; all else is escaped


def test_a_table_of_categories_that_holds_its_limits_is_read():
    rows = [{"id": 1, "name": "naïve <b>", "isthing": 1, "color": [0, 255, 7]}]
    assert LabelTable.from_coco(rows).names == ("naïve <b>",)
