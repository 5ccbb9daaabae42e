"""Whatever lies in the place of a file is read, or refused at once."""

import os
import socket

import pytest

from infra import opening
from infra.opening import Unfit, open_regular, read_regular


def test_a_file_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"whole")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "a") == read_regular(tmp_path / "b") == b"whole"


def test_pipes_sockets_devices_and_folders_are_refused_without_waiting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for name in ("pipe", "socket", "/dev/zero", "."):
            with pytest.raises(OSError, match=r"no regular file|[Dd]irectory"):
                open_regular(name)


def test_a_file_without_end_is_refused_by_its_size(tmp_path, monkeypatch):
    with (tmp_path / "endless").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(Unfit, match="1099511627776"):
        read_regular(tmp_path / "endless")
    monkeypatch.setattr(opening, "MOST", 3)
    (tmp_path / "four").write_bytes(b"1234")
    with pytest.raises(Unfit, match="at most 3"):
        read_regular(tmp_path / "four")
    with open_regular(tmp_path / "four") as stream:  # streams may be of any size
        assert stream.read() == b"1234"


def test_a_link_is_refused_where_none_may_be(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(Unfit, match="link"):
        open_regular(tmp_path / "b", links=False)


def test_what_others_may_write_is_refused_where_it_must_be_ours(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"")
    path.chmod(0o600)
    read_regular(path, owned=True)
    path.chmod(0o662)
    with pytest.raises(Unfit, match="662"):
        read_regular(path, owned=True)
    path.chmod(0o600)
    if os.getuid() == 0:
        os.chown(path, 4242, -1)
        with pytest.raises(Unfit, match="4242"):
            read_regular(path, owned=True)
