"""The one way to open a file that a job, a data set or another user of this machine names.

What stands there may be a pipe or a device, at which a reader would wait for ever, a file without end, or a link that
somebody laid there for us. All is decided on the file that was opened, not on its name, so nothing can be exchanged in
between.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

MOST = 1 << 31
"""Bytes of the largest file that is read into memory, where nothing else is said."""
_NO_WAIT = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


class Unfit(OSError):
    """There is something of this name, and it is not to be read; its text says why."""


def open_regular(path: str | Path, most: int | None = None, *, owned: bool = False, links: bool = True) -> BinaryIO:
    """A stream over a regular file; never waits.

    most: bytes that it may have; None: any number. owned: it must be this user's (or root's), and nobody else may write
    it. links: whether the name itself may be a link. Raises OSError: there is none, or it cannot be opened; Unfit:
    something else is there.
    """
    try:
        handle = os.open(path, _NO_WAIT | (0 if links else os.O_NOFOLLOW))
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device without driver
            raise Unfit("it is no regular file") from error
        if error.errno == errno.ELOOP and not links:
            raise Unfit("it is a link, expected the file itself") from error
        raise
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise Unfit("it is no regular file")
        if most is not None:
            check_size(found.st_size, most)
        if owned:
            check_owner(found)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: str | Path, most: int | None = None, *, owned: bool = False, links: bool = True) -> bytes:
    """All bytes of a regular file, as `open_regular` opens it; at most MOST bytes, where `most` says no other number.

    Raises OSError as that does, also for a file that grows meanwhile.
    """
    with open_regular(path, MOST if most is None else most, owned=owned, links=links) as stream:
        data = stream.read(os.fstat(stream.fileno()).st_size)
        if stream.read(1):
            raise Unfit("it grew while it was read")
    return data


def check_size(size: int, most: int | None = None) -> None:
    """Raises Unfit for more bytes than that, or than MOST."""
    most = MOST if most is None else most
    if size > most:
        raise Unfit(f"{size} bytes are too many for one file, at most {most} are read")


def check_owner(found: os.stat_result) -> None:
    """Raises Unfit for what another user owns or may write: they could put anything there."""
    if found.st_uid not in (os.getuid(), 0):
        raise Unfit(f"it belongs to user {found.st_uid}, expected {os.getuid()}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unfit(f"others may write it (mode {stat.S_IMODE(found.st_mode):o})")


def own_folder(path: Path) -> Path:
    """The folder, made for this user alone where it is not there. Raises OSError, Unfit where another user could put
    anything there: for what is run, or believed, because it lies in it."""
    with suppress(FileExistsError):
        path.mkdir(parents=True, mode=0o700)
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise Unfit(f"{path}: it is a link, expected the folder itself")
    if not stat.S_ISDIR(found.st_mode):
        raise Unfit(f"{path}: it is no folder")
    try:
        check_owner(found)
    except Unfit as error:
        raise Unfit(f"{path}: {error}") from error
    return path
