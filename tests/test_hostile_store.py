"""Shards, checkpoints, weights, predictions and what predict is given, each made to do harm."""

import hashlib
import io
import json
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.coco_files import score_files
from evaluation.predict_files import predict_chunk
from evaluation.predict_plan import plan_prediction
from infra import artifacts
from infra.errors import TesseraError
from infra.store import open_store
from preprocessing.sample import FIELDS, decode_image, from_fields
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import Shard
from tests.support.hostile import Cases, write_coco
from tests.support.odd_images import bomb
from training.backbones.weights import parse, read_weights
from training.checkpoints import read_state

case = Cases()


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


@case("predict-pipe", r"photos: no images found; x\.jpg: it is no regular file")
def _(folder: Path) -> None:
    (folder / "photos").mkdir()
    os.mkfifo(folder / "photos/x.jpg")
    plan_prediction(f"{folder}/train/x", str(folder / "photos"), str(folder / "out"))


@case("predict-one-endless", r"x\.jpg: 1099511627776 bytes are too many for one file")
def _(folder: Path) -> None:
    (folder / "x.jpg").touch()
    os.truncate(folder / "x.jpg", 1 << 40)
    plan_prediction(f"{folder}/train/x", str(folder / "x.jpg"), str(folder / "out"))


@case("predict-list-endless", r"list\.json: 1099511627776 bytes are too many for one file")
def _(folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "photos/x.jpg").write_bytes(b"")
    (folder / "list.json").touch()
    os.truncate(folder / "list.json", 1 << 40)
    plan_prediction(f"{folder}/train/x", str(folder / "photos"), str(folder / "out"), str(folder / "list.json"))


@case("predict-list-pipe", r"list\.json: No such file")
def _(folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "photos/x.jpg").write_bytes(b"")
    os.mkfifo(folder / "list.json")
    plan_prediction(f"{folder}/train/x", str(folder / "photos"), str(folder / "out"), str(folder / "list.json"))


@case("predict-list-nested", r"list\.json: no list of images")
def _(folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "photos/x.jpg").write_bytes(b"")
    (folder / "list.json").write_text("[" * 100_000)
    plan_prediction(f"{folder}/train/x", str(folder / "photos"), str(folder / "out"), str(folder / "list.json"))


@pytest.mark.parametrize("name", case.known)
def test_it_is_refused_by_name(name: str, tmp_path: Path):
    case.check(name, tmp_path)


# ---- what is read all the same, and does nothing


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
