"""The command of retention: lists, and deletes when told to."""

from pathlib import Path

import pytest

from infra.store import open_store
from pipelines.retention import main

STALE = f"train/{'0' * 16}/checkpoints/00000001.pt"


def test_it_lists_and_deletes_only_when_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    store = open_store(str(tmp_path))
    store.write(STALE, b"0" * 1200)
    store.write("elsewhere/a", b"0")
    monkeypatch.setenv("TESSERA_STORAGE", str(tmp_path))
    assert main([]) == 0
    assert capsys.readouterr().out.endswith("\n\nnothing may be deleted\n")
    assert main(["--older", "0"]) == 0
    told = capsys.readouterr().out
    assert (
        "checkpoints             1    1.2 kB     0 d     0 d    1.2 kB  1 unfinished, and no name refers to it" in told
    )
    assert f"\n   1.2 kB        1     0 d  train/{'0' * 16}/: unfinished, and no name refers to it\n" in told
    assert told.endswith("nothing was deleted: --delete does it\n")
    assert store.exists(STALE)
    assert main([str(tmp_path), "--older", "0", "--delete"]) == 0
    assert capsys.readouterr().out == told.replace(
        "\n\nnothing was deleted: --delete does it\n", "\ndeleted 1 of 1 objects, 1.2 kB of 1.2 kB\n"
    )
    assert [entry.key for entry in store.list()] == ["elsewhere/a"]


def test_what_it_cannot_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    open_store(str(tmp_path)).write("champion/000001.json", b"{")
    assert main([str(tmp_path), "--delete"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/champion/000001.json: damaged, expected JSON")


@pytest.mark.parametrize("days", ["-1", "nan", "inf", "soon"])
def test_an_age_that_is_none_is_refused(tmp_path: Path, days: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([str(tmp_path), f"--older={days}"])
    assert f"'{days}': expected a number of days, 0 or more" in capsys.readouterr().err
