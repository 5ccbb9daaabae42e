"""One winner among creators, on file systems with hard links, without them, and where the answer to one is lost."""

import errno
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra import exclusive
from infra.errors import TesseraError
from infra.store import FolderStore, Store, open_store

CASE = Path(__file__).parents[2].parent / "shared" / "data" / "cases" / "25-no-hard-links"


@pytest.fixture(params=[errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK], ids=errno.errorcode.get)
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_args: object, **_more: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "link", link)


def _race(store: Store) -> list[bool]:
    with multiprocessing.get_context("fork").Pool(4) as pool, ThreadPoolExecutor(8) as threads:
        far = pool.starmap_async(store.create, [("a/lock", b"%d" % n) for n in range(8)], chunksize=1)
        near = list(threads.map(lambda n: store.create("a/lock", b"%d" % n), range(8, 16)))
        return far.get() + near


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_one_creator_wins_and_nothing_is_left(tmp_path: Path):
    store = open_store(str(tmp_path))
    store.check()
    for _ in range(5):
        won = _race(store)
        assert won.count(True) == 1
        assert store.read("a/lock") == b"%d" % won.index(True)
        assert [*(tmp_path / "a").iterdir()] == [tmp_path / "a" / "lock"]
        store.delete("a/lock")


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_whoever_is_killed_while_creating_blocks_nobody_for_ever(tmp_path: Path, monkeypatch):
    store = open_store(str(tmp_path))
    killed = multiprocessing.get_context("fork").Process(target=_killed_while_renaming, args=(store,))
    killed.start()
    killed.join()
    assert len([*store.partials()]) == 2  # what it wrote, and its claim
    assert not store.exists("lock")
    monkeypatch.setattr(exclusive, "_HELD_SECONDS", 0.2)
    assert store.create("lock", b"mine")
    assert store.read("lock") == b"mine"


def _killed_while_renaming(store: Store) -> None:
    Path.rename = lambda *_: os._exit(9)  # type: ignore[method-assign, assignment, return-value]
    store.create("lock", b"theirs")


def test_a_creator_whose_answer_is_lost_has_won(tmp_path: Path, monkeypatch):
    store, link = open_store(str(tmp_path)), os.link

    def lossy(source: str, target: str, **more: bool) -> None:
        link(source, target, **more)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))  # what a mount says that asked again

    monkeypatch.setattr(os, "link", lossy)
    assert store.create("lock", b"mine")
    monkeypatch.undo()
    assert not store.create("lock", b"other")
    assert store.read("lock") == b"mine"


@pytest.mark.parametrize("kind", ["EPERM", "ENOSYS"])
def test_a_job_s_storage_may_have_no_hard_links(tmp_path: Path, kind: str):
    if not CASE.exists():
        pytest.skip("needs shared/data/cases/25-no-hard-links")
    program = f"from infra.store import open_store; open_store({str(tmp_path)!r}).check()"
    environment = {**os.environ, "PYTHONPATH": f"{CASE}:{Path(__file__).parents[2]}", "NO_LINKS": kind}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "mount it for writing"),
        (errno.EACCES, "choose a folder that this user may read and write"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_the_remedy_fits_what_the_disk_says(tmp_path: Path, monkeypatch, error: int, remedy: str):
    store = open_store(str(tmp_path))

    def fails(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fails)
    for put in (store.write, store.create):
        with pytest.raises(TesseraError, match=f"{tmp_path}/key: .*{remedy}"):
            put("key", b"x")
    assert not [*store.partials()]


def test_what_killed_writers_leave_is_listed_apart_and_can_be_discarded(tmp_path: Path):
    store = FolderStore(str(tmp_path))
    store.write("a/whole", b"x")
    (tmp_path / "a" / ".partial-1").write_bytes(b"12345")
    (tmp_path / ".partial-2").touch()
    assert [entry.key for entry in store.list()] == ["a/whole"]
    assert [(entry.key, entry.size) for entry in store.partials()] == [(".partial-2", 0), ("a/.partial-1", 5)]
    assert all(abs(time.time() - entry.modified.timestamp()) < 60 for entry in store.partials())
    for entry in [*store.partials(), *store.partials()]:
        store.discard(entry)
    assert not [*store.partials()]
    (whole,) = store.list()
    with pytest.raises(TesseraError, match="a/whole"):
        store.discard(whole)
    assert store.read("a/whole") == b"x"
