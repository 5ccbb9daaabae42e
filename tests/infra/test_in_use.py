"""Work says what it needs, retention looks: of the two at least one sees the other."""

import os
import re
import threading
import time
from pathlib import Path

import pytest

from infra import in_use as module
from infra.errors import TesseraError
from infra.in_use import FOLDER, Running, in_use, running, surveying, sweeping
from infra.store import FolderStore, Store, open_store

KILLED, SWEPT = f"{FOLDER}/{'a' * 32}.json", f"{FOLDER}/retention-{'b' * 32}.json"


def used(store: Store) -> tuple[str, ...]:
    with surveying(store) as mark:
        return running(mark, watch=False).held


def swept(store: Store) -> Running:
    with sweeping(store) as mark:
        return running(mark, watch=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks that are beaten each 50 ms and dead after a second."""
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(module, "_DEAD_SECONDS", 1.0)


def dated(store: Store, key: str, seconds: float) -> None:
    """Date the mark so many seconds from now."""
    os.utime(Path(store.url, key), (time.time() + seconds,) * 2)


def test_what_is_in_use_is_known_until_its_end(store: Store):
    with in_use(store, "train/a/", "evaluate/b/"), in_use(store, "train/c/"):
        assert used(store) == ("evaluate/b/", "train/a/", "train/c/")
    assert used(store) == ()
    assert not [*store.list()]


def test_work_waits_for_a_retention_that_has_begun(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.02)
    began = threading.Event()

    def work():
        with in_use(store, "train/"):
            began.set()

    with sweeping(store) as mark:
        assert running(mark, watch=True) == Running((), ())
        worker = threading.Thread(target=work)
        worker.start()
        assert not began.wait(0.5)
    assert began.wait(10)
    worker.join()


def test_retention_sees_work_that_has_begun_and_work_does_not_wait_for_the_dead(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    store.write(SWEPT, b"")
    store.write(KILLED, b'{"prefixes": ["train/x/"]}')
    store.write(f"{FOLDER}/.DS_Store", b"")
    assert swept(store) == Running(("train/x/",), ())
    monkeypatch.setattr(module, "_DEAD_SECONDS", 2.0)
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.2)
    time.sleep(3.1)  # times of listings have whole seconds
    with in_use(store, "train/y/"):
        assert swept(store) == Running(("train/y/",), (KILLED, SWEPT))


def test_a_mark_of_the_future_is_alive_and_retention_refuses(tmp_path: Path):
    store = open_store(str(tmp_path))
    store.write(KILLED, b'{"prefixes": ["train/x/"]}')
    dated(store, KILLED, 20 * 60)
    for watch in (True, False):
        with (
            pytest.raises(TesseraError, match=f"{KILLED}: dated .* after this moment.*nothing was deleted"),
            sweeping(store) as mark,
        ):
            running(mark, watch)
    dated(store, KILLED, 30)  # other servers of one store, whole seconds
    assert used(store) == swept(store).held == ("train/x/",)


def test_a_mark_that_beats_is_not_dead_whatever_its_date(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch):
    """The clock of who works is an hour late, or that of who sweeps is early."""
    store, write = open_store(str(tmp_path)), FolderStore.write

    def late(self: FolderStore, key: str, data: bytes) -> None:
        write(self, key, data)
        if data:  # a sweep's is empty
            dated(self, key, -3600)

    monkeypatch.setattr(FolderStore, "write", late)
    with in_use(store, "train/x/"):
        time.sleep(0.1)
        with pytest.raises(TesseraError, match=rf"{FOLDER}/\w+\.json: dated .*it has just been written"):
            swept(store)


def test_a_killed_retention_of_tomorrow_stops_work_as_long_as_any_other(
    tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
):
    store = open_store(str(tmp_path))
    store.write(SWEPT, b"")
    dated(store, SWEPT, 86400)
    began = time.monotonic()
    with in_use(store, "train/"):
        assert 1.0 <= time.monotonic() - began < 30
    assert re.search(f"{SWEPT}: left by a retention that was killed", caplog.text)
    assert not [*store.list()]


def test_it_is_said_again_and_again(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.05)
    with in_use(store, "train/"):
        (entry,) = store.list(f"{FOLDER}/")
        end = time.monotonic() + 10
        while next(iter(store.list(f"{FOLDER}/"))).modified == entry.modified:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_store_that_fails_later_does_not_end_the_work(tmp_path, monkeypatch: pytest.MonkeyPatch):
    store = open_store(str(tmp_path))

    def fails(*_):
        raise TesseraError("away")

    with in_use(store, "train/"):
        monkeypatch.setattr(FolderStore, "delete", fails)
        monkeypatch.setattr(FolderStore, "write", fails)
    assert [*store.list(f"{FOLDER}/")]
