"""The S3 store while its server is killed, hangs or is swamped: operations wait, then go on or tell."""

import logging
import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf
from threading import Event, Thread

import pytest

from infra import interrupt
from infra.errors import TesseraError
from infra.s3_store import _Outage
from infra.seaweed import S3Server, seaweed
from infra.store import Store, open_store

CREATORS = 6
LARGE = random.Random(0).randbytes(24_000_000)  # more than sockets hold on the way


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server of its own: it is taken away."""
    with seaweed(tmp_path_factory.mktemp("seaweed"), "outages") as server:
        yield server


@pytest.fixture
def s3_store(s3_env: S3Server) -> Store:
    store = open_store(f"s3://{s3_env.bucket}/{uuid.uuid4().hex}")
    store.write("there", b"before")
    return store


def every_operation(store: Store) -> dict[str, Callable[[], object]]:
    return {
        "read": lambda: store.read("there"),
        "open": lambda: store.open("there").read(),
        "write": lambda: store.write("written", b"after"),
        "create": lambda: store.create("created", b"mine"),
        "exists": lambda: store.exists("there"),
        "list": lambda: [entry.key for entry in store.list("the")],
        "delete": lambda: store.delete("never/there"),
    }


# Where the server hangs: 3 s until a request is given up, 1 s more for one that waits for "100 Continue".
@pytest.mark.parametrize(("kind", "seconds"), [("killed", 1.0), ("hung", 4.5)])
def test_what_is_begun_or_half_read_in_an_outage_ends_well(
    s3_store: Store, s3_env: S3Server, monkeypatch, caplog, kind: str, seconds: float
):
    monkeypatch.setenv("TESSERA_STORE_PATIENCE", "30")
    monkeypatch.setattr("infra.s3_store._SETTLING_SECONDS", inf)  # not a second outage, however slowly it comes back
    monkeypatch.setattr("infra.s3_store._outage", _Outage())
    caplog.set_level(logging.INFO, "tessera.store")
    s3_store.write("large", LARGE)
    caplog.clear()

    def create(number: int) -> bool:
        return s3_store.create("lock", b"%d" % number)

    with s3_store.open("large") as stream, ThreadPoolExecutor(32) as pool:
        start = stream.read(100_000)
        with getattr(s3_env, kind)():
            begun = {name: pool.submit(act) for name, act in every_operation(s3_store).items()}
            creators = [pool.submit(create, number) for number in range(CREATORS)]
            rest = pool.submit(stream.read)
            time.sleep(seconds)
            waiting: list[Future] = [*begun.values(), *creators, rest]
            assert not any(future.done() for future in waiting)
        found = {name: future.result() for name, future in begun.items()}
        won = [future.result() for future in creators]
        assert start + rest.result() == LARGE
    assert found == {
        "read": b"before",
        "open": b"before",
        "write": None,
        "create": True,
        "exists": True,
        "list": ["there"],
        "delete": None,
    }
    assert won.count(True) == 1
    assert s3_store.read("lock") == b"%d" % won.index(True)
    assert s3_store.read("written") == b"after"
    down, up = [(record.levelname, record.getMessage()) for record in caplog.records]  # of 14 threads
    assert down[0] == "WARNING"
    assert down[1].startswith(f"{s3_store.url} does not answer: ")
    assert s3_env.endpoint in down[1]
    assert "waiting up to 30 s" in down[1]
    assert up == ("INFO", f"{s3_store.url} answers again")


def test_patience_has_an_end(s3_store: Store, s3_env: S3Server, monkeypatch):
    monkeypatch.setenv("TESSERA_STORE_PATIENCE", "1")

    def seconds_until_told(act: Callable[[], object]) -> float:
        start = time.monotonic()
        with pytest.raises(TesseraError, match=rf"cannot .* {s3_store.url}.*{s3_env.endpoint}.*; start the server"):
            act()
        return time.monotonic() - start

    acts = every_operation(s3_store).values()
    with s3_env.killed(), ThreadPoolExecutor(len(acts)) as pool:
        assert all(1 <= seconds < 60 for seconds in pool.map(seconds_until_told, acts))


def test_work_that_is_to_end_does_not_wait_for_the_server(s3_store: Store, s3_env: S3Server, monkeypatch):
    monkeypatch.setenv("TESSERA_STORE_PATIENCE", "3000")  # longer than a test may take
    ends = Event()

    def work() -> None:
        interrupt.interruptible(ends)
        s3_store.read("there")

    with s3_env.killed(), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(work)
        time.sleep(0.5)
        assert not waiting.done()
        ends.set()
        with pytest.raises(interrupt.Interrupted):
            waiting.result()
    s3_store.read("there")


def test_a_server_that_hangs_for_longer_than_patience_is_an_error(s3_store: Store, s3_env: S3Server, monkeypatch):
    monkeypatch.setenv("TESSERA_STORE_PATIENCE", "0")
    with s3_env.hung(), pytest.raises(TesseraError, match=f"cannot read {s3_store.url}/there: .*start the server"):
        s3_store.read("there")


def test_what_the_server_refuses_is_an_error_at_once(s3_store: Store, monkeypatch):
    """The patience is that of every day: five minutes."""
    start = time.monotonic()
    assert not s3_store.create("there", b"other")
    assert not s3_store.exists("not/there")
    with pytest.raises(TesseraError, match="not/there"):
        s3_store.read("not/there")
    with pytest.raises(TesseraError, match="create the bucket"):
        open_store("s3://no-such-bucket/prefix").write("key", b"")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for act in every_operation(s3_store).values():
        with pytest.raises(TesseraError, match="set AWS_"):
            act()
    assert time.monotonic() - start < 100


@contextmanager
def refusing(status: int, code: str, times: int) -> Iterator[tuple[str, list[str]]]:
    """An endpoint that answers so to its first requests and then takes what is put; and what it was asked."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # says "100 Continue", for which clients wait a second

        def do_PUT(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            refused = len(asked) <= times
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode() if refused else b""
            self.send_response(status if refused else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Nothing: no lines among those of the tests."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"),
        (500, "InternalError"),
        (429, "TooManyRequests"),
        (400, "RequestTimeout"),
    ],
)
def test_a_swamped_server_is_asked_again(s3_store: Store, monkeypatch, caplog, status: int, code: str):
    caplog.set_level(logging.INFO, "tessera.store")
    monkeypatch.setattr("infra.s3_store._SILENT_SECONDS", 60)  # a busy machine takes more than a second
    with refusing(status, code, times=2) as (endpoint, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        s3_store.write("key", b"data")
    assert len(asked) == 3
    assert not caplog.records  # too short to be told


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (404, "NoSuchBucket"), (501, "NotImplemented")])
def test_a_refusal_is_not_asked_again(s3_store: Store, monkeypatch, status: int, code: str):
    with refusing(status, code, times=9) as (endpoint, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(TesseraError, match=rf"cannot write {s3_store.url}/key: no \({code}\)"):
            s3_store.write("key", b"data")
    assert len(asked) == 1


@pytest.mark.parametrize("patience", ["", "-1", "nan", "soon"])
def test_a_patience_that_is_none_is_refused(s3_store: Store, monkeypatch, patience: str):
    monkeypatch.setenv("TESSERA_STORE_PATIENCE", patience)
    with pytest.raises(TesseraError, match=f"TESSERA_STORE_PATIENCE is '{patience}', expected how many seconds"):
        s3_store.check()
