import hashlib
import io
import logging
import multiprocessing
import os
import resource
import tarfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import processes
from infra.errors import TesseraError
from infra.seaweed import S3Server, seaweed
from infra.store import Store, open_store
from preprocessing.sample import FIELDS
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import Shard, ShardConfig, ShardSet
from tests.support.coco_folder import CocoFolder
from tests.support.shard_sets import make_set

CONFIG = ShardConfig(grid=(20, 30), radius=9, samples=4)


@pytest.fixture
def shards(store: Store, coco: CocoFolder) -> ShardSet:
    """Three shards of four images, in a folder and on S3."""
    return make_set(store, coco.index(), CONFIG)


def shard_of(store: Store, tar: bytes, samples: int, key: str = "a.tar") -> Shard:
    """A shard that somebody else has written."""
    store.write(key, tar)
    ids = tuple(range(samples))
    return Shard(key, ids, ids, len(tar), hashlib.sha256(tar).hexdigest(), ())


def tar_of(files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_a_shard_is_what_webdataset_reads(store: Store, shards: ShardSet, tmp_path: Path):
    for shard in shards.shards:
        (tmp_path / "copy.tar").write_bytes(store.read(shard.key))
        theirs = list(wds.WebDataset(str(tmp_path / "copy.tar"), shardshuffle=False))
        ours = list(read_shard_samples(store.url, shard))
        assert [int(item["__key__"]) for item in theirs] == list(shard.image_ids)
        assert ours == [{k: v for k, v in item.items() if not k.startswith("__")} for item in theirs]


@given(st.lists(st.tuples(*[st.binary(max_size=1500)] * 4), max_size=5), st.text("ab._-", max_size=60), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_plain_tar_is_read(tmp_path_factory: pytest.TempPathFactory, samples: list, more: str, padded: bool):
    """Of any sizes, with further files and, as tar allows, without the zeros at its end."""
    store = open_store(str(tmp_path_factory.getbasetemp() / "plain tars"))
    wanted = [dict(zip([*sorted(FIELDS), f"x{more}"], contents, strict=True)) for contents in samples]
    tar = tar_of({f"{number:06d}.{name}": data for number, files in enumerate(wanted) for name, data in files.items()})
    end = sum(512 + len(data) + -len(data) % 512 for files in wanted for data in files.values())
    shard = shard_of(store, tar if padded else tar[:end], len(wanted))
    assert list(read_shard_samples(store.url, shard)) == wanted


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_precompute_never_writes_are_refused(tmp_path: Path, form: int):
    store = open_store(str(tmp_path))
    shard = shard_of(store, tar_of({f"{'folder/' * 15}1.{name}": b"x" for name in FIELDS}, form), 1)
    with pytest.raises(TesseraError, match=r"a\.tar: expected only plain files with names of 100 bytes at most"):
        list(read_shard_samples(store.url, shard))


@pytest.mark.parametrize("lost", sorted(FIELDS))
def test_samples_without_a_file_are_not_counted(tmp_path: Path, lost: str):
    store = open_store(str(tmp_path))
    names = [f"{number}.{name}" for number in range(3) for name in FIELDS if (number, name) != (1, lost)]
    with pytest.raises(TesseraError, match=r"a\.tar: holds 1 whole samples, its record says 3"):
        list(read_shard_samples(store.url, shard_of(store, tar_of(dict.fromkeys(names, b"x")), 3)))


DAMAGES = {
    "cut": lambda tar: tar[: len(tar) // 1024 * 512],
    "cut between blocks": lambda tar: tar[: len(tar) // 2 + 7],
    "empty": lambda tar: b"",
    "zeros": lambda tar: bytes(len(tar)),
    "zeros at the end": lambda tar: tar[: len(tar) // 2] + bytes(len(tar) - len(tar) // 2),
    "one bit": lambda tar: tar[:700] + bytes([tar[700] ^ 1]) + tar[701:],
    "longer": lambda tar: tar + b"\0",
    "no tar": lambda tar: b"Sign in, please",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_before_its_first_sample(store: Store, shards: ShardSet, damage: str):
    shard, damaged = shards.shards[1], DAMAGES[damage](store.read(shards.shards[1].key))
    store.write(shard.key, damaged)
    with pytest.raises(TesseraError) as caught:
        next(read_shard_samples(store.url, shard))
    told = str(caught.value)
    assert told.startswith(f"{store.url_for(shard.key)}: expected {shard.bytes} bytes of sha256 {shard.sha256}, ")
    assert f"found {len(damaged)} of {hashlib.sha256(damaged).hexdigest()}; delete it and run precompute again" in told


def test_a_shard_in_the_place_of_another_is_named(store: Store, shards: ShardSet):
    first, second, _ = shards.shards
    store.write(first.key, store.read(second.key))
    with pytest.raises(TesseraError, match=f"{first.key}.* {first.sha256}, .* {second.sha256};"):
        next(read_shard_samples(store.url, first))


def test_a_missing_shard_is_named(store: Store, shards: ShardSet):
    store.delete(shards.shards[0].key)
    with pytest.raises(TesseraError, match=f"cannot read {store.url_for(shards.shards[0].key)}"):
        next(read_shard_samples(store.url, shards.shards[0]))


@pytest.fixture
def s3(s3_env: S3Server) -> Store:
    return open_store(f"s3://{s3_env.bucket}/{uuid.uuid4().hex}")


@pytest.fixture
def on_s3(s3: Store, coco: CocoFolder) -> ShardSet:
    return make_set(s3, coco.index(), CONFIG)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the shards will be kept."""
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "node" / "cache"))
    return tmp_path / "node" / "cache" / "shards"


def whole(store: Store, shards: ShardSet) -> list[dict[str, bytes]]:
    return [fields for shard in shards.shards for fields in read_shard_samples(store.url, shard)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def hashes(shards: ShardSet) -> list[str]:
    return sorted(shard.sha256 for shard in shards.shards)


def test_what_is_kept_is_not_fetched_again(s3: Store, on_s3: ShardSet, cache: Path):
    before = whole(s3, on_s3)
    assert names(cache) == hashes(on_s3)
    for shard in on_s3.shards:
        s3.delete(shard.key)
    assert whole(s3, on_s3) == before


def test_without_the_variable_nothing_is_kept(s3: Store, on_s3: ShardSet, cache: Path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", "")
    whole(s3, on_s3)
    assert names(cache) == []


def test_a_folder_needs_no_cache(tmp_path: Path, coco: CocoFolder, cache: Path):
    store = open_store(str(tmp_path / "store"))
    whole(store, make_set(store, coco.index(), CONFIG))
    assert names(cache) == []


def test_another_store_with_the_same_keys_is_not_confused(s3: Store, on_s3: ShardSet, cache: Path, s3_env: S3Server):
    other = open_store(f"s3://{s3_env.bucket}/{uuid.uuid4().hex}")
    shard = shard_of(other, s3.read(on_s3.shards[1].key), 4, key=on_s3.shards[0].key)
    first = list(read_shard_samples(s3.url, on_s3.shards[0]))
    assert list(read_shard_samples(other.url, shard)) != first
    assert len(names(cache)) == 2


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("gigabytes", ["50", "0.00004"])
def test_a_damaged_copy_is_fetched_again(
    s3: Store, on_s3: ShardSet, cache: Path, monkeypatch, damage: str, gigabytes: str
):
    """Also where the cache is full of it."""
    monkeypatch.setenv("TESSERA_CACHE_GB", gigabytes)
    one = replace(on_s3, shards=on_s3.shards[:1])
    before = whole(s3, one)
    copy = cache / one.shards[0].sha256
    sound = copy.read_bytes()
    assert 20_000 < len(sound) < 40_000
    copy.write_bytes(DAMAGES[damage](sound))
    assert whole(s3, one) == before
    assert copy.read_bytes() == sound


def test_a_damaged_shard_is_not_kept(s3: Store, on_s3: ShardSet, cache: Path):
    s3.write(on_s3.shards[0].key, b"damaged")
    with pytest.raises(TesseraError, match=on_s3.shards[0].key):
        whole(s3, on_s3)
    assert names(cache) == []


def test_a_full_cache_stays_as_it_is(s3: Store, on_s3: ShardSet, cache: Path, monkeypatch, caplog):
    first, second, _ = on_s3.shards
    monkeypatch.setenv("TESSERA_CACHE_GB", str((first.bytes + second.bytes + 1) / 1e9))
    assert whole(s3, on_s3) == whole(s3, on_s3)
    assert names(cache) == sorted([first.sha256, second.sha256])
    assert not caplog.records


@pytest.mark.parametrize("gigabytes", ["much", "-1", "nan", ""])
def test_a_limit_that_is_none_is_refused(s3: Store, on_s3: ShardSet, cache: Path, monkeypatch, gigabytes: str):
    monkeypatch.setenv("TESSERA_CACHE_GB", gigabytes)
    with pytest.raises(TesseraError, match=f"TESSERA_CACHE_GB is '{gigabytes}', expected how many GB"):
        whole(s3, on_s3)


def test_a_cache_that_cannot_be_written_is_done_without(s3: Store, on_s3: ShardSet, cache: Path, caplog):
    cache.parent.parent.mkdir()
    cache.parent.write_text("no folder")
    check_done_without(s3, on_s3, caplog)


def test_a_full_disk_is_done_without(s3: Store, on_s3: ShardSet, cache: Path, caplog):
    """A limit on the size of files fails a write in its midst, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        check_done_without(s3, on_s3, caplog)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(cache) == []


def check_done_without(s3: Store, shards: ShardSet, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert len(whole(s3, shards)) == 12
        assert len(whole(s3, shards)) == 12
    (record,) = caplog.records
    assert "read without TESSERA_CACHE from now on: cannot" in record.getMessage()


def test_the_processes_of_a_node_share_it(s3: Store, on_s3: ShardSet, cache: Path):
    before = {shard.key: list(read_shard_samples(s3.url, shard)) for shard in on_s3.shards}
    for path in cache.iterdir():
        path.unlink()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(partial(_listed, s3.url), on_s3.shards * 4, chunksize=1)
    assert found == [before[shard.key] for shard in on_s3.shards * 4]
    assert names(cache) == hashes(on_s3)


def _listed(store_url: str, shard: Shard) -> list[dict[str, bytes]]:
    return list(read_shard_samples(store_url, shard))


@pytest.mark.parametrize("sha256", ["../../secret", "/etc/passwd", "a/../b", ""])
def test_no_hash_of_a_manifest_reaches_outside(s3: Store, on_s3: ShardSet, cache: Path, sha256: str):
    secret = cache.parent.parent / "secret"
    secret.parent.mkdir()
    secret.write_text("kept")
    with pytest.raises(TesseraError, match=on_s3.shards[0].key):
        next(read_shard_samples(s3.url, replace(on_s3.shards[0], sha256=sha256)))
    assert secret.read_text() == "kept"
    assert names(cache) == []


@pytest.fixture
def own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[partial[AbstractContextManager[S3Server]]]:
    """Starts a server that has its place, its objects and its secret at every start."""
    ports = processes.free_ports(10)
    monkeypatch.setattr(processes, "free_ports", lambda _: ports)
    monkeypatch.setattr("secrets.token_hex", lambda _: "0" * 40)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    return partial(seaweed, tmp_path / "objects", "restarted")


def test_a_reader_outlives_a_restart_of_the_server(own_server, coco: CocoFolder, monkeypatch):
    store = open_store("s3://restarted/run")
    with own_server() as server:
        for name, value in server.environ().items():
            monkeypatch.setenv(name, value)
        shards = make_set(store, coco.index(), CONFIG)
        before = whole(store, shards)
        reader = read_all(store, shards)
        found = [next(reader)]
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, reader)  # asks for the second shard while there is no server
        with own_server():
            assert found + rest.result() == before


def test_a_server_that_stays_away_is_an_error_that_names_the_shard(own_server, coco: CocoFolder, monkeypatch):
    monkeypatch.setenv("TESSERA_STORE_PATIENCE", "1")
    store = open_store("s3://restarted/run")
    with own_server() as server:
        for name, value in server.environ().items():
            monkeypatch.setenv(name, value)
        shards = make_set(store, coco.index(), CONFIG)
        reader = read_all(store, shards)
        next(reader)
    with pytest.raises(TesseraError, match=f"{store.url_for(shards.shards[1].key)}: .*start the server"):
        list(reader)


def read_all(store: Store, shards: ShardSet) -> Iterator[dict[str, bytes]]:
    return (fields for shard in shards.shards for fields in read_shard_samples(store.url, shard))
