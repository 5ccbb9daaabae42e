"""Data sets in zips give what the same data set gives unpacked."""

import io
import os
import shutil
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra import opening
from infra.errors import TesseraError
from infra.store import open_store
from preprocessing.coco import read_index
from preprocessing.files import File, list_zip
from preprocessing.shards import ShardConfig, plan
from preprocessing.source import BadSample, read_sample
from preprocessing.tree import Tree
from tests.support.coco_folder import CocoFolder
from tests.support.shard_sets import make_set

CONFIG = ShardConfig(grid=(20, 30), radius=9, samples=5)
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / f"tessera-{os.getuid()}"


def pack(target: Path, base: Path, paths: list[Path], method: int) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", method) as archive:
        archive.writestr("__MACOSX/._junk", b"")
        for path in paths:
            archive.write(path, path.relative_to(base).as_posix())
    return target


def as_published(coco: CocoFolder, root: Path, outer: int, inner: int) -> Path:
    """train2017.zip, and the annotations' zip with the JSON and the zip of the PNGs in it."""
    pack(root / "train2017.zip", coco.root, sorted(coco.images.iterdir()), STORED)
    annotations = coco.json.parent
    pngs = pack(annotations / f"{coco.masks.name}.zip", annotations, sorted(coco.masks.iterdir()), inner)
    pack(root / "panoptic_annotations_trainval2017.zip", coco.root, [coco.json, pngs], outer)
    pngs.unlink()
    return root


@pytest.mark.parametrize(("outer", "inner"), [(STORED, STORED), (STORED, DEFLATED), (DEFLATED, STORED)])
def test_the_published_zips_give_the_same_shards_as_the_folders(
    coco: CocoFolder, tmp_path: Path, cache: Path, outer: int, inner: int
):
    zipped = read_index(as_published(coco, tmp_path / "zips", outer, inner), coco.split)
    assert zipped.rejected == ()
    store, other = open_store(str(tmp_path / "store")), open_store(str(tmp_path / "other"))
    assert make_set(store, coco.index(), CONFIG) == make_set(other, zipped, CONFIG)
    assert plan(store, zipped, CONFIG).path == plan(store, coco.index(), CONFIG).path
    unpacked = list(cache.glob("*")) if cache.exists() else []
    assert len(unpacked) == (outer == DEFLATED)  # only that has no random access


def test_a_zip_beside_the_json_stands_for_the_folder(coco: CocoFolder):
    before = [read_sample(record, coco.index().labels) for record in coco.index().records]
    pack(coco.masks.with_name(f"{coco.masks.name}.zip"), coco.masks.parent, sorted(coco.masks.iterdir()), DEFLATED)
    shutil.rmtree(coco.masks)
    index = coco.index()
    for (image, truth), record in zip(before, index.records, strict=True):
        assert read_sample(record, index.labels)[0] == image
        assert np.array_equal(read_sample(record, index.labels)[1].ids, truth.ids)


def test_members_may_lie_at_the_top_of_the_zip(coco: CocoFolder):
    pack(coco.masks.with_name(f"{coco.masks.name}.zip"), coco.masks, sorted(coco.masks.iterdir()), DEFLATED)
    shutil.rmtree(coco.masks)
    assert coco.index().rejected == ()


def test_what_is_on_disk_comes_first(coco: CocoFolder):
    with zipfile.ZipFile(coco.root / "a.zip", "w") as archive:
        archive.writestr(f"annotations/{coco.json.name}", b"no JSON")
        archive.writestr(f"{coco.split}/{coco.image(0).name}", b"no image")
    assert coco.sample(0)[0] == coco.image(0).read_bytes()


def test_a_missing_member_is_named_with_its_zip(coco: CocoFolder, tmp_path: Path):
    name = coco.image(3).name
    coco.image(3).unlink()
    index = read_index(as_published(coco, tmp_path / "zips", STORED, STORED), coco.split)
    with pytest.raises(BadSample, match=rf"{name}: cannot be read"):
        read_sample(index.records[3], index.labels)


def test_a_damaged_zip_that_nobody_needs_is_passed_over(coco: CocoFolder):
    (coco.root / "test2017.zip").write_bytes(b"PK half a download")
    assert coco.index().rejected == ()


@pytest.mark.parametrize("outer", [STORED, DEFLATED])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_zip_is_named(coco: CocoFolder, tmp_path: Path, outer: int, damage: str):
    root = as_published(coco, tmp_path / "zips", outer, STORED)
    path = root / "panoptic_annotations_trainval2017.zip"
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "text": b"<html>404</html>", "empty": b""}[damage])
    with pytest.raises(TesseraError, match=rf"{path.name}: not a readable zip"):
        read_index(root, coco.split)


def test_bytes_that_rot_in_the_zip_cost_their_sample_alone(coco: CocoFolder, tmp_path: Path):
    root = as_published(coco, tmp_path / "zips", STORED, STORED)
    index = read_index(root, coco.split)
    member = index.records[3].image.member
    assert member is not None
    path = root / "train2017.zip"
    data = bytearray(path.read_bytes())
    data[member.start + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadSample, match=r"train2017\.zip/train2017/.*: cannot be read \(its checksum"):
        read_sample(index.records[3], index.labels)
    read_sample(index.records[2], index.labels)


def test_a_zip_replaced_after_indexing_is_noticed(coco: CocoFolder, tmp_path: Path):
    root = as_published(coco, tmp_path / "zips", STORED, STORED)
    index = read_index(root, coco.split)
    (root / "train2017.zip").write_bytes(b"PK" + bytes(100_000))
    with pytest.raises(BadSample, match="has changed since"):
        read_sample(index.records[3], index.labels)


def test_a_member_that_says_less_than_it_holds_is_refused(tmp_path: Path):
    """A zip bomb: its directory promises 10 bytes."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", DEFLATED) as archive:
        archive.writestr("a", bytes(10_000_000))
    data = path.read_bytes().replace((10_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    path.write_bytes(data)
    (bomb,) = list_zip(File(str(path)))
    with pytest.raises(OSError, match="longer than the zip says"):
        bomb.read()


def test_a_member_of_more_than_memory_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "large.zip"
    with zipfile.ZipFile(path, "w", DEFLATED) as archive:
        archive.writestr("a", bytes(100_000))
    monkeypatch.setattr(opening, "MOST", 99_999)
    (large,) = list_zip(File(str(path)))
    with pytest.raises(OSError, match="100000 bytes are too many"):
        large.read()


def test_a_member_that_cannot_be_read_is_alone_at_fault(tmp_path: Path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b/c.png", b"data", zipfile.ZIP_LZMA)
        archive.writestr("locked", b"data")
        archive.writestr("sound", b"data")
        archive.infolist()[1].flag_bits |= 1
    files = {file.inside: file for file in list_zip(File(str(path)))}
    assert files["sound"].read() == b"data"
    for name, why in (("b/c.png", "other than deflate"), ("locked", "encrypted")):
        for ask in (files[name].read, files[name].size, files[name].crc):
            with pytest.raises(OSError, match=why):
                ask()


def patched(data: bytes, *changes: tuple[bytes, bytes]) -> bytes:
    """A zip with other bytes of the same number in place of some, in headers and directory."""
    for old, new in changes:
        assert len(old) == len(new)
        assert old in data
        data = data.replace(old, new)
    return data


def packed(*members: tuple[str | zipfile.ZipInfo, bytes], method: int = DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return made.getvalue()


def listed(path: Path, data: bytes) -> dict[str, bytes]:
    path.write_bytes(data)
    return {file.inside: file.read() for file in list_zip(File(str(path)))}


def with_extra(name: str, extra: bytes) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    made.extra = extra
    return made


def unicode_path(name: bytes, of: bytes) -> bytes:
    """Info-ZIP's extra field."""
    body = b"\1" + zlib.crc32(of).to_bytes(4, "little") + name
    return struct.pack("<HH", 0x7075, len(body)) + body


UMLAUT = "G\u00f6rlitz.png"
NAMES = {
    "UTF-8 that says so": (packed((UMLAUT, b"1")), UMLAUT),
    "UTF-8 that does not": (patched(packed(("Gxxrlitz.png", b"1")), (b"Gxxrlitz", UMLAUT[:7].encode())), UMLAUT),
    "cp437": (patched(packed(("Gxrlitz.png", b"1")), (b"Gxrlitz", b"G\x94rlitz")), UMLAUT),
    "no UTF-8 that says it is": (patched(packed((UMLAUT, b"1")), (UMLAUT.encode(), b"G\xff\xferlitz.png"[:13])), None),
    "with the name in UTF-8 beside": (
        patched(
            packed((with_extra("Gxrlitz.png", unicode_path(UMLAUT.encode(), b"G\xf6rlitz.png")), b"1")),
            (b"Gxrlitz", b"G\xf6rlitz"),
        ),
        UMLAUT,
    ),
    "with another's name beside": (
        patched(
            packed((with_extra("Gxrlitz.png", unicode_path(b"other.png", b"another's name")), b"1")),
            (b"Gxrlitz", b"G\x94rlitz"),
        ),
        UMLAUT,
    ),
    "with a damaged name beside": (
        patched(
            packed((with_extra("Gxrlitz.png", unicode_path(b"G\xff", b"G\x94rlitz.png")), b"1")),
            (b"Gxrlitz", b"G\x94rlitz"),
        ),
        UMLAUT,
    ),
    "absolute": (packed(("/a/b.png", b"1")), "a/b.png"),
    "from here": (packed(("./a//b.png", b"1")), "a/b.png"),
    "of Windows": (packed(("a\\b.png", b"1")), "a/b.png"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_member_has_the_name_that_its_packer_meant(tmp_path: Path, name: str):
    data, meant = NAMES[name]
    found = listed(tmp_path / "a.zip", data)
    assert [*found.values()] == [b"1"]
    assert meant in (None, *found)


def test_a_name_that_nobody_can_read_is_in_no_others_way(tmp_path: Path):
    data = packed((UMLAUT, b"1"), ("sound.png", b"2"), ("\u00e9.png", b"3"))
    found = listed(tmp_path / "a.zip", patched(data, (UMLAUT.encode(), b"G\xff\xfarlitz.png")))
    assert [*found.values()] == [b"1", b"2", b"3"]
    assert {"sound.png", "\u00e9.png"} < found.keys()


def test_of_two_members_of_one_name_the_later_one_counts(tmp_path: Path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = packed(("a", b"old"), ("A", b"another"), ("a", b"new"))
    assert listed(tmp_path / "a.zip", data) == {"a": b"new", "A": b"another"}


def test_members_of_a_zip_in_parts_are_at_fault(tmp_path: Path):
    data = bytearray(packed(("elsewhere", b"1"), ("here", b"2")))
    data[data.index(b"PK\1\2") + 34] = 1  # the number of its part
    (tmp_path / "a.zip").write_bytes(data)
    files = {file.inside: file for file in list_zip(File(str(tmp_path / "a.zip")))}
    assert files["here"].read() == b"2"
    with pytest.raises(OSError, match="another part of a zip in parts"):
        files["elsewhere"].read()


def test_members_whose_length_was_not_known_are_read(tmp_path: Path):
    """As of a zip that was written to a pipe (data descriptors), and with the sizes of more than 4 GiB."""

    class Pipe(io.RawIOBase):
        data = b""

        def writable(self) -> bool:
            return True

        def write(self, piece: Any) -> int:
            self.data += bytes(piece)
            return len(piece)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", DEFLATED) as archive, archive.open("a", "w", force_zip64=True) as member:
        member.write(b"data" * 1000)
    assert listed(tmp_path / "a.zip", pipe.data) == {"a": b"data" * 1000}


@pytest.mark.parametrize(("zeros", "refused"), [(16 << 20, False), ((16 << 20) + 1, True)])
def test_a_file_that_inflates_as_only_a_bomb_does_is_refused(tmp_path: Path, zeros: int, refused: bool):
    """A JSON, too: a thousand times its packed size would be as many objects in memory."""
    (tmp_path / "a.zip").write_bytes(packed(("annotations/panoptic_val.json", bytes(zeros))))
    (bomb,) = list_zip(File(str(tmp_path / "a.zip")))
    if not refused:
        assert bomb.read() == bytes(zeros)
        return
    for ask in (bomb.read, bomb.size, bomb.crc):
        with pytest.raises(OSError, match=rf"from \d+ bytes to {zeros}, as only a zip bomb does"):
            ask()


def test_a_file_from_a_zip_is_held_once(tmp_path: Path):
    data = np.random.default_rng(0).integers(0, 4, 8 << 20, np.uint8).tobytes()  # two bits of eight
    (tmp_path / "a.zip").write_bytes(packed(("a", data)))
    del data
    (file,) = list_zip(File(str(tmp_path / "a.zip")))
    tracemalloc.start()
    try:
        assert len(file.read()) == 8 << 20
        assert tracemalloc.get_traced_memory()[1] < 1.7 * (8 << 20)
    finally:
        tracemalloc.stop()


def test_a_pipe_for_a_zip_is_passed_over(coco: CocoFolder):
    os.mkfifo(coco.root / "train2017.zip")
    os.mkfifo(coco.root / "other.zip")
    assert coco.index().rejected == ()
    coco.json.unlink()
    with pytest.raises(TesseraError, match=r"other\.zip: not a readable zip \(it is no regular file\)"):
        coco.index()


def test_names_that_lead_outside_are_only_names(tmp_path: Path):
    (tmp_path / "set").mkdir()
    with zipfile.ZipFile(tmp_path / "set/a.zip", "w") as archive:
        archive.writestr("../secret.txt", b"inside the zip")
    tree = Tree(tmp_path / "set")
    found = tree.file("../secret.txt")
    assert found is not None
    assert found.read() == b"inside the zip"
    assert not (tmp_path / "secret.txt").exists()


def test_sizes_and_checksums_are_the_same_on_disk_and_in_a_zip(tmp_path: Path):
    data = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "one").write_bytes(data)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", DEFLATED) as archive:
        archive.write(tmp_path / "one", "one")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w", DEFLATED) as archive:
        archive.writestr("inner.zip", inner.getvalue())
    (nested,) = list_zip(next(list_zip(File(str(tmp_path / "outer.zip")))))
    loose = File(str(tmp_path / "one"))
    assert (nested.size(), nested.crc(), nested.read()) == (loose.size(), loose.crc(), loose.read())
    assert str(nested) == f"{tmp_path}/outer.zip/inner.zip/one"


def test_a_pipe_in_the_place_of_a_zip_is_refused_without_waiting(tmp_path: Path):
    os.mkfifo(tmp_path / "annotations.zip")
    with pytest.raises(TesseraError, match=r"annotations\.zip: not a readable zip \(it is no regular file\)"):
        [*list_zip(File(str(tmp_path / "annotations.zip")))]
