"""The commands upload and inbox: all files, `_SUCCESS` last, taken up after a kill; what is no data set is not sent."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from evaluation.champion import Champion, follow
from evaluation.report import GroupPQ
from infra.errors import TesseraError
from infra.store import Store, open_store
from pipelines import inbox as inbox_command
from pipelines.upload import main, tell, upload
from preprocessing.inbox import decide, uploads
from preprocessing.layouts import read_index
from tests.support.retraining import watch_changes, write_upload


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_upload(tmp_path / "new-data", 101, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def contents(store: Store, name: str) -> dict[str, bytes]:
    """By name under the upload's folder, but for `_SUCCESS` and the claim."""
    place = f"inbox/{name}/"
    keys = [e.key for e in store.list(place) if e.key not in (f"{place}_SUCCESS", f"{place}.files")]
    return {key.removeprefix(place): store.read(key) for key in keys}


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def written(store: Store, monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None] = lambda number: None) -> list:
    """The keys in the order of writing or creating; `then` is called before each."""
    found, numbers = list[str](), count()

    def before(key: str) -> None:
        then(next(numbers))
        found.append(key)

    watch_changes(monkeypatch, store, before)
    return found


def test_a_folder_is_copied_as_it_is_and_success_comes_last(store: Store, data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    keys = written(store, monkeypatch)
    before = files(data)
    assert main([str(data), store.url]) == 0
    assert contents(store, "new-data") == before == files(data)
    assert (keys[0], keys[-1]) == ("inbox/new-data/.files", "inbox/new-data/_SUCCESS")
    (found,) = uploads(store)
    assert (found.name, found.whole, found.objects) == ("new-data", True, len(before) + 2)
    assert len(read_index(f"{store.url}/inbox/new-data", "train2017").records) == 3


def test_a_killed_copy_is_not_whole_and_only_the_rest_is_copied(
    store: Store, data: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(number: int) -> None:
        if number >= 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        written(store, patch, killed)
        with pytest.raises(KeyboardInterrupt):
            upload(data, store, "a")
    there = contents(store, "a")
    assert 0 < len(there) < len(files(data))
    assert not uploads(store)[0].whole
    keys = written(store, monkeypatch)
    assert upload(data, store, "a") == len(files(data))
    assert sorted(keys) == sorted(f"inbox/a/{name}" for name in {*files(data)} - {*there} | {".files", "_SUCCESS"})
    assert contents(store, "a") == files(data)


def test_a_taken_name_is_refused_and_what_lies_there_stays(store: Store, data: Path, tmp_path: Path):
    upload(data, store, "a")
    before = [*store.list()]
    with pytest.raises(TesseraError, match=r"/inbox/a: taken by another upload; choose another --name"):
        upload(write_upload(tmp_path / "other", 201), store, "a")
    assert [*store.list()] == before


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "ü", "a\n", "x" * 64, "../champion"])
def test_a_name_that_is_none_is_refused(folder: Store, data: Path, name: str):
    with pytest.raises(TesseraError, match="is no name for an upload"):
        upload(data, folder, name)
    assert [*folder.list()] == []


def test_zips_are_to_be_unpacked_first(folder: Store, data: Path):
    (data / "annotations.zip").write_bytes(b"PK")
    with pytest.raises(TesseraError, match=r"annotations\.zip: unpack it first; zips are read from disks only"):
        upload(data, folder, "a")
    assert [*folder.list()] == []


def test_what_is_no_data_set_is_not_sent(folder: Store, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([str(tmp_path / "none"), folder.url]) == 1
    assert main([str(data), folder.url, "--split", "val2017"]) == 1
    assert main([str(data), folder.url, "--layout", "cityscapes"]) == 1
    (data / "annotations" / "panoptic_train2017.json").write_text("{")
    assert main([str(data), folder.url]) == 1
    told = capsys.readouterr().err
    assert told.count("error: ") == 4
    assert "Traceback" not in told
    assert [*folder.list()] == []


def test_the_storage_comes_from_the_environment(folder: Store, data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TESSERA_STORAGE", folder.url)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert main([str(data), "--name", "b"]) == 0
    assert [found.name for found in uploads(folder)] == ["b"]


def test_without_a_server_nobody_is_told(folder: Store, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setitem(sys.modules, "prefect.events", None)  # its import would fail
    caplog.set_level("INFO", "tessera.upload")
    tell(folder, "a")
    assert "the next scheduled retraining will find it" in caplog.text


def test_a_success_of_the_folders_own_says_nothing_before_the_end(
    folder: Store, data: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = files(data)
    (data / "_SUCCESS").write_bytes(b"of the job that wrote the folder")
    keys = written(folder, monkeypatch)
    assert upload(data, folder, "a") == len(whole)
    assert keys.index("inbox/a/_SUCCESS") == len(keys) - 1
    assert contents(folder, "a") == whole


@pytest.mark.parametrize("link", ["train2017", "train2017/000000000101.jpg", "notes"])
def test_links_are_refused_by_name(folder: Store, data: Path, tmp_path: Path, link: str, capsys):
    """They could lead to all that whoever uploads may read."""
    if (data / link).exists():
        (data / link).rename(tmp_path / "elsewhere")
    (data / link).symlink_to(tmp_path / "elsewhere")
    assert main([str(data), folder.url]) == 1
    told = capsys.readouterr().err
    assert f"{data}/{link}: a link, expected the file itself; `cp -rL` makes a copy without links\n" in told
    assert [*folder.list()] == []


def test_hidden_files_are_left_out_and_told(folder: Store, data: Path, caplog: pytest.LogCaptureFixture):
    whole = files(data)
    (data / ".git").mkdir()
    for name in (".env", ".git/config", "train2017/.DS_Store"):
        (data / name).write_bytes(b"AWS_SECRET_ACCESS_KEY=...")
    upload(data, folder, "a")
    assert contents(folder, "a") == whole
    assert "left out, since they are hidden: 3 files, the first is .env" in caplog.text


def test_what_was_changed_after_a_kill_is_another_upload(folder: Store, data: Path):
    """Of a copy that is half the one and half the other nothing would say that it is not whole."""
    upload(data, folder, "a")
    folder.delete("inbox/a/_SUCCESS")  # as if it had been killed just before
    before, image = [*folder.list()], data / "train2017" / "000000000101.jpg"
    image.write_bytes(b"\0" * image.stat().st_size)
    with pytest.raises(TesseraError, match="taken by another upload; choose another --name"):
        upload(data, folder, "a")
    assert [*folder.list()] == before
    assert upload(data, folder, "b") == len(files(data))
    assert contents(folder, "b") == files(data)


@pytest.mark.parametrize("at", [*range(9)])
def test_of_two_that_upload_under_one_name_the_first_one_has_it(
    folder: Store, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    """Whenever the other one comes; with the claim, 7 files and `_SUCCESS` there are 9 moments."""
    other, refused = write_upload(tmp_path / "other", 201, 3), dict[Path, str]()

    def tries(mine: Path) -> None:
        try:
            upload(mine, folder, "a")
        except TesseraError as error:
            refused[mine] = str(error)

    left = [other]

    def between(number: int) -> None:
        if number == at and left:
            tries(left.pop())

    keys = written(folder, monkeypatch, between)
    tries(data)
    assert not left
    assert len({*keys}) == 9
    assert [*refused] == [other if at else data]
    assert "/inbox/a: taken by another upload" in refused.popitem()[1]
    assert contents(folder, "a") == files(data if at else other)
    assert uploads(folder)[0].whole


@pytest.mark.parametrize("at", [0, 1, 4, 7, 8])
def test_an_upload_that_was_asked_for_twice_is_whole_once_both_have_ended(
    folder: Store, data: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    left = [data]

    def between(number: int) -> None:
        if number == at and left:
            upload(left.pop(), folder, "a")
            time.sleep(0.02)  # the clock of files has steps

    written(folder, monkeypatch, between)
    with suppress(TesseraError):
        upload(data, folder, "a")
    assert not left
    assert uploads(folder)[0].whole


GROUPS: GroupPQ = {"all": 1.0, "things": None, "stuff": 1.0}


def test_the_inbox_command_tells_what_the_champions_line_made_of_each_and_withdraws(
    folder: Store, data: Path, capsys: pytest.CaptureFixture
):
    assert inbox_command.main([folder.url]) == 0
    upload(data, folder, "a")
    assert inbox_command.main([folder.url]) == 0
    assert inbox_command.main([folder.url, "--withdraw", "a"]) == 1
    assert follow(folder, Champion(1, "train/a", "evaluate/a", "evaluate/root", GROUPS, "given", None, ""))
    facts = {"shards": "precompute/f/s", "samples": 3, "known": 0, "rejected": (), "reason": None}
    decide(folder, "root", uploads(folder)[0], state="accepted", **facts)
    asked = ([], ["--withdraw", "a"], ["--withdraw", "a"])
    assert [inbox_command.main([folder.url, *more]) for more in asked] == [0, 0, 1]
    told = capsys.readouterr()
    empty, *lines = told.out.splitlines()
    assert empty == f"{folder.url}: the inbox is empty"
    assert [line.partition(" (9 objects")[0] for line in lines] == [
        "a waits for the next round", "a accepted, 3 new samples", "a withdrawn, 3 new samples",
    ]  # fmt: skip
    assert told.err.count("error: ") == 2
