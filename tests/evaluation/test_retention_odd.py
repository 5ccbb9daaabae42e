"""Retention where clocks are wrong, folders are not to be listed, writers were killed and disks are full."""

import errno
import os
import re
import time
from datetime import timedelta
from pathlib import Path

import pytest

from evaluation import retention
from evaluation.retention import survey, sweep
from infra import in_use
from infra.errors import StoreError, TesseraError
from infra.store import Store, open_store

AT_ONCE = timedelta()
GONE = "0" * 16  # of what is to go
KEPT = "f" * 16


def silent(text: str) -> None:
    pass


def stale(store: Store) -> str:
    """Key of an object that may go, sixty days old."""
    key = f"train/{GONE}/checkpoints/00000001.pt"
    store.write(key, b"1" * 1000)
    dated(store, key, -60 * 86400)
    return key


def dated(store: Store, key: str, seconds: float) -> None:
    os.utime(Path(store.url, key), (time.time() + seconds,) * 2)


@pytest.mark.parametrize("key", [f"{in_use.FOLDER}/{'a' * 32}.json", f"train/{KEPT}/metrics.parquet"])
def test_a_time_in_the_future_is_named_and_nothing_is_deleted(tmp_path: Path, key: str):
    """One heartbeat of a machine whose clock is 20 minutes early, and all else looked old."""
    store = open_store(str(tmp_path))
    stale(store)
    with in_use.in_use(store, f"train/{GONE}/"):
        store.write(key, b'{"prefixes": []}')
        dated(store, key, 20 * 60)
        before = {entry.key for entry in store.list()}
        for look in (lambda: survey(store, AT_ONCE), lambda: sweep(store, AT_ONCE, silent)):
            with pytest.raises(TesseraError, match=f"{key}: dated .* s after this moment.*nothing was deleted"):
                look()
        assert {entry.key for entry in store.list()} == before
        dated(store, key, 0)
        sweep(store, timedelta(days=30), silent)
        assert {entry.key for entry in store.list()} == before


def test_a_retention_that_slept_deletes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whoever waited for it has begun to work by then."""
    store = open_store(str(tmp_path))
    key = stale(store)

    def sleeps(text: str) -> None:
        awake = in_use._uptime()
        monkeypatch.setattr(in_use, "_uptime", lambda: awake + 20 * 60)

    with pytest.raises(TesseraError, match=r"said nothing for 1200 s.*nothing more was deleted"):
        sweep(store, timedelta(days=30), sleeps)
    assert store.exists(key)


def test_an_upload_that_cannot_be_listed_is_told_and_elsewhere_nothing_is_deleted(tmp_path: Path):
    store, told = open_store(str(tmp_path)), list[str]()
    gone = stale(store)
    store.write("inbox/good/1", b"")
    Path(store.url, "inbox/bad").mkdir()
    Path(store.url, "inbox/bad/me").symlink_to("me")
    Path(store.url, "inbox/bad/all").symlink_to("/")
    retention.refuse_foreign(store)
    sweep(store, timedelta(days=30), told.append)
    assert not store.exists(gone)
    for key in ("inbox/bad/all", "inbox/bad/me"):
        assert f"cannot be listed, left as it is: {key}: a link, expected the file itself\n" in told[0]
    stale(store)
    Path(store.url, "train/me").symlink_to("me")
    with pytest.raises(TesseraError, match=r"train/me: .*nothing was deleted"):
        sweep(store, timedelta(days=30), silent)


def partials(store: Store) -> list[str]:
    """Of a writer that was killed two days ago, and of one at work."""
    names = [f"train/{KEPT}/checkpoints/.partial-{number * 32}" for number in "01"]
    for name, days in zip(names, (-2, 0), strict=True):
        Path(store.url, name).parent.mkdir(parents=True, exist_ok=True)
        Path(store.url, name).write_bytes(b"0" * 5000)
        dated(store, name, days * 86400)
    return names


def test_what_killed_writers_left_is_shown_and_goes_after_a_day(tmp_path: Path):
    store, told = open_store(str(tmp_path)), list[str]()
    old, young = partials(store)
    half = [f"data/synthetic-{GONE}.part-abc/set/train2017/1.jpg", f"probe/{'a' * 32}"]
    for key in (*half, f"data/synthetic-{GONE}/train2017/1.jpg"):
        store.write(key, b"")
        dated(store, key, -60 * 86400)
    sweep(store, timedelta(days=30), told.append)
    assert [entry.key for entry in store.list()] == [f"data/synthetic-{GONE}/train2017/1.jpg"]
    assert re.search(r"unfinished writes +2 +10\.0 kB +0 d +2 d +5\.0 kB  1 its writer was killed", told[0])
    assert f"5.0 kB        1     2 d  {old}: its writer was killed" in told[0]
    assert [entry.key for entry in store.partials()] == [young]


@pytest.mark.parametrize("room", ["for an empty file", "for nothing until something is deleted"])
def test_on_a_full_disk_it_runs(tmp_path: Path, room: str, monkeypatch: pytest.MonkeyPatch):
    store, fsync = open_store(str(tmp_path)), os.fsync
    gone, (old, young) = stale(store), partials(store)
    store.write(f"{in_use.FOLDER}/.keep", b"")

    def full(file: int) -> None:
        if os.fstat(file).st_size or (Path(store.url, old).exists() and room.startswith("for nothing")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"), in_use.in_use(store, "train/"):
        pass
    told = list[str]()
    sweep(store, timedelta(days=30), told.append)
    assert not store.exists(gone)
    assert [entry.key for entry in store.partials()] == [young]
    assert ("the store is full: deleted 1 unfinished writes, 5.0 kB" in told) == room.startswith("for nothing")
