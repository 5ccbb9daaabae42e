"""Uploads as rsync, tar and strangers leave them: half of one is not whole, and one that is bad stops no other."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from infra.copying import copy_files
from infra.store import Store, open_store
from preprocessing import inbox, ray_inbox
from preprocessing.inbox import Decision, Upload, uploads
from preprocessing.ray_inbox import take_in
from tests.support.retraining import ids_of, make_base, precompute, put, write_upload


def only(store: Store) -> Upload:
    (found,) = uploads(store)
    return found


@pytest.mark.parametrize("kind", ["rsync", "tar"])
def test_half_a_copy_whose_success_came_first_is_not_whole_whatever_the_times_of_its_files_say(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """rsync -a and tar keep the times of the source; the order is that of names, or of the archive."""
    store = open_store(str(tmp_path))
    monkeypatch.setattr(inbox, "SETTLED", timedelta(seconds=0.5))
    for name in ("_SUCCESS", "train2017/1.jpg"):
        store.write(f"inbox/a/{name}", b"")
        os.utime(Path(store.url, "inbox/a", name), (1e9 if kind == "rsync" or "_" in name else 1e9 - 9,) * 2)
        assert only(store).settles
        assert only(store).waits == "something in it has changed within the last 0 s"
    time.sleep(0.6)
    assert only(store).whole


def test_what_our_own_success_counts_is_whole_at_once_and_no_less(store: Store, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(inbox, "SETTLED", timedelta(days=1))
    copy_files({"1": write(tmp_path / "1"), "b/2": write(tmp_path / "2")}, store, "inbox/a")
    assert only(store).whole
    store.delete("inbox/a/1")
    assert only(store).settles
    copy_files({"1": tmp_path / "1", "b/2": tmp_path / "2"}, store, "inbox/a")  # the same command heals it
    assert only(store).whole
    store.write("inbox/a/_SUCCESS", b'{"objects": 2, "seconds": 1}')  # as Hadoop's may say anything
    assert only(store).settles


def write(path: Path) -> Path:
    path.write_bytes(b"123")
    return path


def test_an_upload_with_an_entry_that_cannot_be_listed_is_at_fault_and_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ray_inbox, "precompute", precompute)
    monkeypatch.setattr(inbox, "SETTLED", timedelta())
    store = open_store(str(tmp_path / "store"))
    base = make_base(tmp_path / "base", store)
    bad = {"self": "self", "all": "/", "out": tmp_path / "base"}
    for name, first in (("good", 101), *((name, 201) for name in bad)):
        put(write_upload(tmp_path / name, first), store, name)
    for name, target in bad.items():
        Path(store.url, "inbox", name, "train2017", "link").symlink_to(target)
    val_ids = frozenset(ids_of([base.val_set]))

    def take(name: str) -> Decision:
        (one,) = (upload for upload in found if upload.name == name)
        return take_in(store, "line", one, "coco", "train2017", base.train_set, val_ids, 0.5)

    found = uploads(store)
    assert [u.name for u in found if u.whole and u.objects < 20] == sorted(["good", *bad])
    assert take("good").state == "accepted"
    for name in bad:
        decision = take(name)
        assert decision.state == "quarantined"
        assert f"inbox/{name}/train2017/link: a link, expected the file itself" in str(decision.reason)


def test_an_upload_that_is_being_mended_is_left_alone_until_success_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inbox, "SETTLED", timedelta())
    store = open_store(str(tmp_path / "store"))
    put(write_upload(tmp_path / "two", 101, 2), store, "a")
    assert only(store).whole
    success = Path(store.url, "inbox/a/_SUCCESS")
    os.utime(success, (success.stat().st_atime, success.stat().st_mtime - 60))
    store.write("inbox/a/train2017/000000000101.jpg", b"mended, the first of many")
    assert not only(store).whole
    store.write("inbox/a/_SUCCESS", b"")
    assert only(store).whole
