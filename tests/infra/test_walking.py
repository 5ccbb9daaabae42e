"""Folders as strangers leave them: one bad entry is told, the others are listed, and nothing takes long or for ever."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra import walking
from infra.errors import StoreError
from infra.store import open_store


def deep(folder: Path, levels: int) -> None:
    here = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("dd", dir_fd=here)
        below = os.open("dd", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "self-link": (lambda f: (f / "me").symlink_to("me"), "bad/me", "symbolic links"),
    "900 deep": (lambda f: deep(f, 900), "bad/dd/dd", "longer than 1024 bytes"),
    "1500 deep": (lambda f: deep(f, 1500), "bad/dd/dd", "longer than 1024 bytes"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    subprocess.run(["rm", "-rf", tmp_path], check=True)  # pytest's own way ends in a RecursionError


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_entry_is_told_and_the_others_are_listed(folder: Path, kind: str):
    spoil, key, why = BAD[kind]
    for name in ("bad", "good"):
        (folder / name).mkdir()
        (folder / name / "1").write_bytes(b"1")
    spoil(folder / "bad")
    store = open_store(str(folder))
    found = store.look()
    assert [entry.key for entry in found.entries] == ["bad/1", "good/1"]
    ((bad, told),) = found.faults
    assert bad.startswith(key)
    assert why in told
    assert store.look("good/").faults == ()
    assert [entry.key for entry in store.list("good/")] == ["good/1"]
    with pytest.raises(StoreError, match=f"cannot list {folder}/{key}.*{why}"):
        store.list()


def test_a_folder_without_rights_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bad").mkdir()
    (tmp_path / "good").write_bytes(b"1")
    scandir = os.scandir

    def refuses(path: Path):  # tests may run as root, who may read all
        if path.name == "bad":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(walking.os, "scandir", refuses)
    found = open_store(str(tmp_path)).look()
    assert ([e.key for e in found.entries], found.faults) == (["good"], (("bad", "Permission denied"),))


def test_links_are_followed_but_not_round_and_not_where_the_listing_is_closed(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1").touch()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train").symlink_to(tmp_path / "images")
    (tmp_path / "set/round").symlink_to(tmp_path)
    (tmp_path / "set/nowhere").symlink_to("nothing")
    os.mkfifo(tmp_path / "set/pipe")
    store = open_store(str(tmp_path))
    assert [e.key for e in store.list()] == ["images/1", "set/train/1"]
    assert [e.key for e in store.look(closed="set/").entries] == ["images/1"]
    told = ["set/nowhere", "set/round", "set/train"]
    assert store.look(closed="set/").faults == tuple((key, "a link, expected the file itself") for key in told)
    assert [key for key, _ in store.look("set/", closed="set/").faults] == told


def test_folders_full_of_links_to_each_other_are_listed_a_few_times_each(tmp_path: Path):
    names = [f"{number:02}" for number in range(12)]  # 12! ways through them
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        for other in names:
            (tmp_path / name / f"to {other}").symlink_to(tmp_path / other)
    found = [*walking.walk(tmp_path)]
    assert {f"{name}/file" for name in names} <= {each.name for each in found if each.status}
    assert {each.fault for each in found if each.fault} == {"links lead to this folder under more than 16 names"}
    assert len(found) < 5000


def test_links_that_lead_nowhere_and_pipes_are_told_to_whoever_asks(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "moved").symlink_to("/moved/away")
    os.mkfifo(tmp_path / "pipe")
    assert [one.name for one in walking.walk(tmp_path)] == ["a"]
    assert {one.name: one.fault for one in walking.walk(tmp_path, nothing=True)} == {
        "a": "",
        "moved": "a link that leads nowhere",
        "pipe": "it is no regular file",
    }
