"""What lies in the cache of unpacked zips is believed by its checksum alone, and in a folder of ours alone."""

import os
import stat
import zlib
from pathlib import Path

import pytest

from preprocessing import unpacking
from preprocessing.unpacking import unpacked

DATA = b"PK of a zip" * 1000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path))
    return tmp_path / f"tessera-{os.getuid()}"


class Pieces:
    """Gives the data, and counts how often."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> list[bytes]:
        self.asked += 1
        return [DATA[:5], DATA[5:]]


def get(pieces: Pieces) -> bytes:
    return Path(unpacked("a.zip", len(DATA), zlib.crc32(DATA), pieces)).read_bytes()


def test_once_a_machine_readable_by_its_user_alone(folder: Path, monkeypatch: pytest.MonkeyPatch):
    pieces = Pieces()
    assert get(pieces) == get(pieces) == DATA
    monkeypatch.setattr(unpacking, "_believed", set())  # another process
    assert get(pieces) == DATA
    assert pieces.asked == 1
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())] == [0o700, 0o600]


@pytest.mark.parametrize("how", ["cut", "changed", "a link", "anybody's", "changed later"])
def test_what_somebody_put_there_is_replaced(how: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pieces = Pieces()
    get(pieces)
    if how != "changed later":
        monkeypatch.setattr(unpacking, "_believed", set())
    (lies,) = folder.iterdir()
    match how:
        case "cut":
            lies.write_bytes(DATA[:-1])
        case "a link":
            lies.rename(tmp_path / "elsewhere")
            lies.symlink_to(tmp_path / "elsewhere")
        case "anybody's":
            lies.chmod(0o666)
        case _:
            lies.write_bytes(DATA[::-1])
    assert get(pieces) == DATA
    assert pieces.asked == 2
    assert not lies.is_symlink()
    assert stat.S_IMODE(lies.stat().st_mode) == 0o600


@pytest.mark.parametrize("how", ["a link", "open", "a file", "another user's"])
def test_a_folder_that_is_not_ours_alone_is_refused(how: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    match how:
        case "a link":
            (folder.parent / "theirs").mkdir()
            folder.symlink_to("theirs")
        case "open":
            folder.mkdir()
            folder.chmod(0o777)
        case "a file":
            folder.touch()
        case _:
            folder.mkdir(mode=0o700)
            if os.getuid() != 0:
                pytest.skip("only root can make another user's folder")
            os.chown(folder, 12345, -1)
    with pytest.raises(OSError, match=str(folder)):
        get(Pieces())


def test_other_bytes_than_were_promised_leave_nothing(folder: Path):
    with pytest.raises(OSError, match="checksum"):
        unpacked("a.zip", len(DATA), 1, Pieces())
    assert [*folder.iterdir()] == []
