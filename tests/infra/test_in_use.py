"""Work says what it needs, retention looks: of the two at least one sees the other."""

import threading
import time

import pytest

from infra import in_use as module
from infra.errors import TesseraError
from infra.in_use import FOLDER, dead, in_use, sweeping, used
from infra.store import FolderStore, Store, open_store


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

    with sweeping(store) as held:
        assert held == ()
        worker = threading.Thread(target=work)
        worker.start()
        assert not began.wait(0.5)
    assert began.wait(10)
    worker.join()


def test_retention_sees_work_that_has_begun_and_work_does_not_wait_for_the_dead(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    store.write(f"{FOLDER}/retention-killed.json", b'{"prefixes": []}')
    store.write(f"{FOLDER}/killed.json", b'{"prefixes": ["train/x/"]}')
    with sweeping(store) as held:
        assert held == ("train/x/",)
    monkeypatch.setattr(module, "_DEAD_SECONDS", 1.0)
    time.sleep(2.1)  # times of listings have whole seconds
    with in_use(store, "train/y/"), sweeping(store) as held:
        assert held == ("train/y/",)
        assert dead(store) == [f"{FOLDER}/killed.json", f"{FOLDER}/retention-killed.json"]


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
