import multiprocessing
import os
import pickle
import random
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from math import inf
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from threading import Barrier, Thread
from urllib.parse import urlsplit

import boto3
import pytest

from infra.errors import NoSuchObject, StoreError, TesseraError
from infra.seaweed import S3Server
from infra.store import Store, _entry, open_store

PAYLOAD = random.Random(0).randbytes(5_000_000)


@pytest.mark.parametrize("data", [b"", b"x", PAYLOAD], ids=["empty", "byte", "5MB"])
def test_what_is_written_is_read(store: Store, data: bytes):
    assert not store.exists("a/b.bin")
    store.write("a/b.bin", data)
    assert store.exists("a/b.bin")
    assert store.read("a/b.bin") == data
    with store.open("a/b.bin") as stream:
        assert stream.read(10) + stream.read() == data


def test_a_write_replaces(store: Store):
    store.write("key", b"a long first version")
    store.write("key", b"second")
    assert store.read("key") == b"second"


@pytest.mark.parametrize("key", ["ü 100%+&?#.txt", "a=b/c:d@e", "..a/b..", "ends with space "])
def test_odd_keys_are_kept_as_they_are(store: Store, key: str):
    store.write(key, b"x")
    assert store.read(key) == b"x"
    assert [entry.key for entry in store.list()] == [key]


def test_a_missing_key_is_named_in_full(store: Store):
    for read in (store.read, store.open, store.stat):
        with pytest.raises(NoSuchObject, match=store.url_for("no/such.tar")):
            read("no/such.tar")


def test_readers_and_listings_never_see_half_an_object(store: Store):
    """A thousandfold byte is either version; anything else is a torn read."""
    versions = [bytes([value]) * 3_000_000 for value in range(8)]
    store.write("state", versions[0])
    writer = Thread(target=lambda: [store.write("state", version) for version in versions])
    writer.start()
    reads = 0
    while writer.is_alive():
        with suppress(TesseraError):  # allowed: "it was replaced while being read"
            assert store.read("state") in versions
            reads += 1
        assert [entry.key for entry in store.list()] == ["state"]
    assert reads
    assert store.read("state") == versions[-1]


def test_of_racing_creators_one_wins(store: Store):
    barrier = Barrier(16)

    def create(number: int) -> bool:
        barrier.wait()
        return store.create("lock/manifest.json", b"%d" % number)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(16)))
    assert won.count(True) == 1
    assert store.read("lock/manifest.json") == b"%d" % won.index(True)
    assert [entry.key for entry in store.list()] == ["lock/manifest.json"]


def test_list_sorts_by_key_and_takes_any_prefix(store: Store):
    # Folder by folder, a/x would come before a-b.
    keys = ["a-b", "a.b", "a/x", "a/y/z", "aa", "b"]
    for key in reversed(keys):
        store.write(key, key.encode())
    assert [entry.key for entry in store.list()] == keys
    assert [entry.key for entry in store.list("a/")] == ["a/x", "a/y/z"]
    assert [entry.key for entry in store.list("a/y")] == ["a/y/z"]
    assert [entry.key for entry in store.list("a")] == keys[:-1]
    assert list(store.list("none/such")) == list(store.list("b/c")) == []


def test_list_tells_size_and_time(store: Store):
    store.write("key", b"12345")
    store.write("folder/inside", b"")
    _, entry = store.list()
    for found in (entry, store.stat("key")):
        assert (found.key, found.size) == ("key", 5)
        assert found.modified.tzinfo is UTC
        assert abs(datetime.now(UTC) - found.modified) < timedelta(minutes=1)
    with pytest.raises(NoSuchObject, match="folder"):
        store.stat("folder")


def test_an_unwritten_store_is_empty(store: Store):
    assert list(store.list()) == []


def test_list_goes_past_one_page(store: Store):
    keys = [f"{number:04}" for number in range(1005)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.write(key, b""), keys))
    assert [entry.key for entry in store.list()] == keys


def test_delete_may_be_repeated(store: Store):
    store.write("a/b", b"x")
    for _ in range(2):
        store.delete("a/b")
        assert not store.exists("a/b")
    store.delete("never/there")


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/etc/passwd",
        "..",
        "../up",
        "a/../../up",
        "a//b",
        "a/",
        ".",
        "a/./b",
        "a\0b",
        "a\nb",
        ".partial-1",
    ],
)
def test_hostile_keys_are_refused(store: Store, key: str):
    for act in (store.read, store.open, store.exists, store.delete, store.url_for):
        with pytest.raises(TesseraError, match="is no key"):
            act(key)
    for put in (store.write, store.create):
        with pytest.raises(TesseraError, match="is no key"):
            put(key, b"x")


@pytest.mark.parametrize("prefix", ["/", "..", "../", "a/../..", "/etc/"])
def test_hostile_prefixes_are_refused(store: Store, prefix: str):
    with pytest.raises(TesseraError, match="is no key"):
        store.list(prefix)


def test_a_store_travels_by_pickle_and_over_fork(store: Store):
    """Children that used the parent's connection would read each other's answers."""
    keys = [f"{number:02}" for number in range(40)]
    for key in keys:
        store.write(key, key.encode() * 50_000)
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(copy.read, keys, chunksize=1) == [key.encode() * 50_000 for key in keys]
    assert store.read(keys[0]) == keys[0].encode() * 50_000


def test_check_passes_and_leaves_nothing(store: Store):
    store.check()
    assert list(store.list()) == []


def test_root_urls_are_normalised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path / "my data")
    for url in (
        "my data",
        "./my data/",
        folder,
        f"{folder}/",
        f"file://{folder}",
        f"file://{tmp_path}/my%20data/",
    ):
        assert open_store(url).url == folder
    assert open_store("s3://bucket/").url == "s3://bucket"
    assert open_store("s3://bucket/a/b/").url_for("c/d") == "s3://bucket/a/b/c/d"
    assert open_store("/").url_for("c") == "/c"


@pytest.mark.parametrize(
    "url", ["", "s3://", "s3:///key", "s3://bucket/../up", "gs://bucket", "file://relative/folder"]
)
def test_root_urls_that_are_none_are_refused(url: str):
    with pytest.raises(TesseraError):
        open_store(url)


@contextmanager
def cutting_proxy(server: S3Server, limits: list[float]) -> Iterator[str]:
    """An endpoint that forwards to the server; its first connections break after so many bytes of body,
    or before any answer (-1).
    """
    target = urlsplit(server.endpoint)
    budgets = iter(limits)

    class Relay(BaseRequestHandler):
        def handle(self):
            budget = next(budgets, inf)
            with socket.create_connection((target.hostname, target.port)) as upstream:
                Thread(target=self.pump, args=(self.request, upstream, inf), daemon=True).start()
                head = self.head(upstream)
                if head.startswith(b"HTTP/1.1 100"):
                    self.request.sendall(head)
                    head = self.head(upstream)
                if budget >= 0:
                    self.request.sendall(head)
                self.pump(upstream, self.request, budget)

        def head(self, source: socket.socket) -> bytes:
            head = b""
            while not head.endswith(b"\r\n\r\n") and (byte := source.recv(1)):
                head += byte
            return head

        def pump(self, source: socket.socket, sink: socket.socket, budget: float):
            with suppress(OSError):
                while budget > 0 and (data := source.recv(int(min(budget, 65536)))):
                    sink.sendall(data)
                    budget -= len(data)
            for end in (source, sink):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    with ThreadingTCPServer(("127.0.0.1", 0), Relay) as proxy:
        proxy.daemon_threads = True
        Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
        proxy.shutdown()
    assert next(budgets, None) is None, "fewer connections than cuts"


@pytest.fixture
def s3_store(s3_env: S3Server) -> Store:
    return open_store(f"s3://{s3_env.bucket}/{uuid.uuid4().hex}")


@pytest.mark.parametrize("limits", [[2_500_000], [1_500_000, 70_000, 0, 0, 2_000_000], [4_999_999]])
def test_a_stream_outlives_cut_connections(s3_store: Store, s3_env: S3Server, monkeypatch, limits: list[float]):
    s3_store.write("shard.tar", PAYLOAD)
    with cutting_proxy(s3_env, limits) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with s3_store.open("shard.tar") as stream:
            assert b"".join(iter(lambda: stream.read(100_000), b"")) == PAYLOAD


def test_a_cut_stream_is_an_error_without_patience(s3_store: Store, s3_env: S3Server, monkeypatch):
    s3_store.write("shard.tar", PAYLOAD)
    monkeypatch.setenv("TESSERA_STORE_PATIENCE", "0")
    for read in (s3_store.read, lambda key: s3_store.open(key).read()):
        with cutting_proxy(s3_env, [2_500_000]) as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            with pytest.raises(TesseraError, match=s3_store.url_for("shard.tar")):
                read("shard.tar")


def test_a_listing_outlives_cut_connections(s3_store: Store, s3_env: S3Server, monkeypatch):
    keys = [f"{number:03}" for number in range(20)]
    for key in keys:
        s3_store.write(key, b"")
    with cutting_proxy(s3_env, [-1, 0, 200, 2000]) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert [entry.key for entry in s3_store.list()] == keys


@pytest.mark.parametrize("lost", [1, 4])
def test_a_creator_whose_answers_are_lost_has_won(s3_store: Store, s3_env: S3Server, monkeypatch, lost: int):
    with cutting_proxy(s3_env, [-1] * lost) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setattr("infra.s3_store._keeping", {(endpoint, s3_env.bucket)})  # no probe before it
        assert s3_store.create("manifest.json", b"mine")
        assert not s3_store.create("manifest.json", b"other")
    assert s3_store.read("manifest.json") == b"mine"


def test_a_cut_stream_never_continues_with_another_object(s3_store: Store, s3_env: S3Server, monkeypatch):
    s3_store.write("shard.tar", PAYLOAD)
    with cutting_proxy(s3_env, [2_500_000]) as endpoint:
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            stream = s3_store.open("shard.tar")
        s3_store.write("shard.tar", PAYLOAD[::-1])
        with stream, pytest.raises(TesseraError, match="replaced while being read"):
            stream.read()


def test_check_names_an_unreachable_endpoint(s3_store: Store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(TesseraError, match=r"s3://.*http://127\.0\.0\.1:1.*AWS_ENDPOINT_URL"):
        s3_store.check()
    assert time.monotonic() - start < 10


def test_check_names_an_endpoint_that_is_no_url(s3_store: Store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:8333")
    with pytest.raises(TesseraError, match=r"localhost:8333.*AWS_ENDPOINT_URL must"):
        s3_store.check()


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_check_names_the_wrong_credential(s3_store: Store, monkeypatch, name: str):
    monkeypatch.setenv(name, "wrong")
    with pytest.raises(TesseraError, match=rf"s3://.*set {name} "):
        s3_store.check()


def test_check_names_absent_credentials(s3_store: Store, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(TesseraError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        s3_store.check()


@pytest.mark.usefixtures("s3_env")
def test_check_names_a_missing_bucket():
    with pytest.raises(TesseraError, match=r"s3://no-such-bucket/.*create the bucket"):
        open_store("s3://no-such-bucket/prefix").check()


def test_check_names_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    for url in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TesseraError, match=rf"{url}.*choose a folder"):
            open_store(str(url)).check()


def test_what_is_too_large_for_one_request_goes_up_in_parts_and_is_one_object(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("infra.s3_store._ONE_PUT", 1 << 20)
    store, data = open_store(f"s3://{s3_env.bucket}/parts"), os.urandom(20 << 20)
    store.write("large", data)
    assert store.read("large") == data
    assert [(entry.key, entry.size) for entry in store.list()] == [("large", len(data))]


def test_uploads_in_parts_that_nobody_ended_are_listed_apart_and_can_be_discarded(s3_store: Store):
    bucket, _, prefix = s3_store.url.removeprefix("s3://").partition("/")
    boto3.client("s3", region_name="us-east-1").create_multipart_upload(Bucket=bucket, Key=f"{prefix}/a/large.tar")
    assert not [*s3_store.list()]
    (left,) = s3_store.partials()
    assert left.key.startswith("a/large.tar")
    assert abs(datetime.now(UTC) - left.modified) < timedelta(minutes=1)
    for _ in range(2):
        s3_store.discard(left)
        assert not [*s3_store.partials()]


def test_a_time_that_no_calendar_has_is_the_fault_of_its_object(tmp_path: Path):
    """File systems keep what the kernel's limit leaves of it."""
    store = open_store(str(tmp_path))
    store.write("a", b"")
    with pytest.raises(OSError, match="years 1 to 9999"):
        _entry("a", os.stat_result((*(tmp_path / "a").stat()[:7], 0, 253402300800, 0)))


def test_an_object_larger_than_the_memory_is_refused(tmp_path: Path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(StoreError, match=f"{tmp_path}/a: it has {1 << 42} bytes"):
        open_store(str(tmp_path)).read("a")
