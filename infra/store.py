"""The one module that opens the object store.

A store is one root URL: a folder (a path or a file:// URL) or s3://bucket/prefix (infra.s3_store). Both kinds
behave alike. Keys are relative and "/"-separated; none may be the folder of another. What goes wrong is a
StoreError, a TesseraError that names the operation, the URL and the cause.
"""

import errno
import hashlib
import os
import stat
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from infra.errors import NoSuchObject, StoreError, TesseraError
from infra.exclusive import give_name
from infra.memory import memory_left
from infra.opening import MOST, Unfit, check_size, open_regular
from infra.text import quoted
from infra.walking import walk

_LONGEST = 2000  # characters of a root
_LARGE = 1 << 28  # bytes; smaller objects fit, and nobody asks
_PARTIAL = ".partial-"  # starts the name of a file still being written: no key, never listed
_OTHER_FOLDER = "choose a folder that this user may read and write"
_REMEDIES = {
    errno.EACCES: _OTHER_FOLDER,
    errno.EPERM: _OTHER_FOLDER,
    errno.EEXIST: f"a file stands where a folder is needed: {_OTHER_FOLDER}",
    errno.ENOTDIR: f"a file stands where a folder is needed: {_OTHER_FOLDER}",
    errno.ENOSPC: "free space there, as by python -m pipelines.retention, or choose a folder on another disk",
    errno.EDQUOT: "free space there, as by python -m pipelines.retention, or have this user's quota raised",
    errno.EROFS: "mount it for writing, or choose a folder on another disk",
    errno.EFBIG: "its file system or this user's limit (ulimit -f) takes no file so large: choose another folder",
    errno.EMFILE: "raise this process's limit of open files (ulimit -n)",
    errno.ENFILE: "raise this machine's limit of open files (fs.file-max)",
    errno.ENAMETOOLONG: "choose a shorter path, or shorter names",
    errno.ESTALE: "the server of this mount has changed: mount it again",
    errno.EIO: "look at the system's log: the disk, or the server of this mount, fails",
}


@dataclass(frozen=True, order=True)
class Entry:
    """One object in a listing; `size` in bytes, `modified` in UTC."""

    key: str
    size: int
    modified: datetime
    arrived: datetime | None = field(default=None, compare=False)
    """Since when it has been what it is, of a folder, where tools set `modified` to what they like; else None."""


@dataclass(frozen=True)
class Listing:
    """A listing that goes on where something cannot be listed."""

    entries: tuple[Entry, ...]
    """Sorted by key."""
    faults: tuple[tuple[str, str], ...] = ()
    """(key, what is wrong) of what is not among them, sorted."""


def open_store(url: str) -> "Store":
    """The store at a root URL; connects to nothing (Store.check does). TesseraError if it is no such URL."""
    root = _normal(url)
    if not root.startswith("s3://"):
        return FolderStore(root)
    from infra.s3_store import S3Store  # builds on this module; and folders need none of boto3

    return S3Store(root)


@dataclass(frozen=True)
class Store(ABC):
    """Objects under one root `url`: no trailing slash, absolute for a folder. Pickles as that URL."""

    url: str

    def url_for(self, key: str) -> str:
        """The full URL of a key; TesseraError if that could lie outside the root."""
        return f"{self.url.rstrip('/')}/{_checked(key)}"

    def read(self, key: str) -> bytes:
        """The whole object. NoSuchObject if there is none."""
        with self.open(key) as stream:
            return stream.read()

    def read_named(self, key: str, most: int = MOST) -> bytes:
        """`read`, of what a job names: StoreError if it has more than `most` bytes."""
        try:
            check_size(self.stat(key).size, most)
        except Unfit as error:
            raise StoreError(f"{self.url_for(key)}: {error}") from error
        return self.read(key)

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A stream over one state of the object: when another takes its place, reading goes on or fails."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Put the object, whole or not at all, in place of any earlier one."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Put the object unless the key exists; of racing creators exactly one gets True."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is such an object."""

    @abstractmethod
    def stat(self, key: str) -> Entry:
        """The object's size, and when it was written by the store's own clock. NoSuchObject if there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The objects whose key starts with the text `prefix`, sorted by key."""

    def look(self, prefix: str = "", closed: str | None = None, nothing: bool = False) -> Listing:
        """As `list`, where one entry of a folder that cannot be listed does not keep the others from it.

        closed: below keys that start so a link is a fault, and not followed; a bucket has none. nothing: links that
        lead nowhere, pipes and devices are faults, too.
        """
        return Listing(tuple(self.list(prefix)))

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object if there is one."""

    @abstractmethod
    def partials(self) -> Iterator[Entry]:
        """What is being written at this moment, or was when its writer was killed; no objects, and no listing has them.

        Sorted; `key` is for `discard` alone. `size` is 0 where the store does not tell it.
        """

    @abstractmethod
    def discard(self, partial: Entry) -> None:
        """Remove one of `partials`, if it is still there; its writer, if it lives, fails."""

    def check(self) -> None:
        """Do to a small probe what a run will do to its objects; TesseraError in about 10 s at most."""
        key, data = f"probe-{uuid.uuid4().hex}", b"tessera"
        self.write(key, data)
        try:
            if self.read(key) != data:
                raise TesseraError(f"{self.url} gives back other bytes than were written: see what answers there")
            if self.create(key, b"") or self.read(key) != data:
                raise TesseraError(f"{self.url} replaces objects that it was asked to keep (If-None-Match)")
        finally:
            self.delete(key)


class FolderStore(Store):
    """A store in a local or mounted folder."""

    def read(self, key: str) -> bytes:
        with self.open(key) as stream, _telling("read", url := self.url_for(key)):
            check_room(url, os.fstat(stream.fileno()).st_size)
            return stream.read()

    def open(self, key: str) -> BinaryIO:
        with _telling("read", url := self.url_for(key)):
            return open_regular(url)

    def write(self, key: str, data: bytes) -> None:
        with _telling("write", url := self.url_for(key)), _partial(Path(url), data) as whole:
            whole.replace(url)

    def create(self, key: str, data: bytes) -> bool:
        with _telling("create", url := self.url_for(key)), _partial(Path(url), data) as whole:
            return give_name(whole, Path(url), _claim(Path(url)))

    def exists(self, key: str) -> bool:
        with _telling("look up", url := self.url_for(key)):
            return Path(url).is_file()

    def stat(self, key: str) -> Entry:
        with _telling("look up", url := self.url_for(key)):
            status = Path(url).stat()
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return _entry(key, status)

    def look(self, prefix: str = "", closed: str | None = None, nothing: bool = False) -> Listing:
        below = checked_prefix(prefix).rpartition("/")[0]
        start, entries, faults = f"{below}/" if below else "", list[Entry](), list[tuple[str, str]]()
        follows = lambda name: closed is None or not f"{start}{name}".startswith(closed)  # noqa: E731
        for one in walk(Path(self.url, below), follows, nothing):
            key = f"{start}{one.name}" if one.name else below
            if one.status is None and (key.startswith(prefix) or prefix.startswith(key)):
                faults.append((key, one.fault))
            elif one.status is not None and key.startswith(prefix) and not Path(key).name.startswith(_PARTIAL):
                try:
                    entries.append(_entry(key, one.status))
                except OSError as error:
                    faults.append((key, str(error.strerror)))
        return Listing(tuple(sorted(entries)), tuple(sorted(faults)))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        found = self.look(prefix)
        for key, why in found.faults:
            raise StoreError(f"cannot list {self.url}/{key}: {why}")
        return iter(found.entries)

    def partials(self) -> Iterator[Entry]:
        own = walk(Path(self.url), lambda _: False)  # what links lead to is not ours to discard
        named = (one for one in own if one.status is not None and Path(one.name).name.startswith(_PARTIAL))
        with _telling("list", self.url):
            return iter(sorted(_entry(one.name, one.status) for one in named if one.status is not None))

    def discard(self, partial: Entry) -> None:
        path = Path(self.url) / partial.key
        if not path.name.startswith(_PARTIAL) or ".." in path.parts or partial.key.startswith("/"):
            raise TesseraError(f"{path} is no file that is being written")
        with _telling("delete", str(path)), suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()

    def delete(self, key: str) -> None:
        with _telling("delete", url := self.url_for(key)), suppress(FileNotFoundError, NotADirectoryError):
            Path(url).unlink()


def check_room(url: str, size: int) -> None:
    """StoreError for an object that does not fit into the memory that is left."""
    if size > _LARGE and (left := memory_left()) is not None and size > left:
        raise StoreError(f"cannot read {url}: it has {size} bytes, and {left} of memory are left")


def _entry(key: str, status: os.stat_result) -> Entry:
    try:
        modified, arrived = (datetime.fromtimestamp(seconds, UTC) for seconds in (status.st_mtime, status.st_ctime))
    except (ValueError, OverflowError, OSError) as error:
        raise OSError(errno.EOVERFLOW, "its time lies outside of the years 1 to 9999") from error
    return Entry(key, status.st_size, modified, arrived)


@contextmanager
def _telling(verb: str, url: str) -> Iterator[None]:
    """Turn what the disk raises into a StoreError."""
    try:
        yield
    except OSError as error:
        remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
        kind = NoSuchObject if isinstance(error, FileNotFoundError) else StoreError
        raise kind(f"cannot {verb} {url}: {error.strerror or error}{remedy}") from error


def _normal(url: str) -> str:
    """s3://bucket/prefix without a trailing slash, or an absolute path."""
    scheme, separator, rest = url.partition("://")
    if not url.isprintable() or len(url) > _LONGEST:
        raise TesseraError(f"{quoted(url)} is no store: expected at most {_LONGEST} printable characters")
    if scheme == "s3" and rest.strip("/"):
        return f"s3://{_checked(rest.rstrip('/'))}"
    if url.startswith("file:///"):
        return str(Path(url2pathname(urlsplit(url).path)).resolve())
    if url and not separator:
        try:
            return str(Path(url).expanduser().resolve())
        except RuntimeError as error:  # ~nobody
            raise TesseraError(f"{quoted(url)} is no store: {error}") from error
    raise TesseraError(f"{quoted(url)} is no store: use a folder, file:///folder or s3://bucket/prefix")


def _checked(key: str) -> str:
    parts = key.split("/")
    if {"", ".", ".."}.intersection(parts) or not key.isprintable() or f"/{_PARTIAL}" in f"/{key}":
        raise TesseraError(f"{key!r} is no key: it must be relative, printable, without empty, . or .. parts")
    return key


def checked_prefix(prefix: str) -> str:
    """The same prefix; TesseraError if it could start keys that lie outside the root."""
    if prefix:
        _checked(prefix.removesuffix("/"))
    return prefix


@contextmanager
def _partial(path: Path, data: bytes) -> Iterator[Path]:
    """A file beside `path` that holds `data`, safe on disk; gone afterwards unless renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{_PARTIAL}{uuid.uuid4().hex}")
    try:
        with whole.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def _claim(path: Path) -> Path:
    """What those who create one object without hard links take turns by: short, whatever the object's name."""
    return path.with_name(f"{_PARTIAL}claim-{hashlib.sha256(path.name.encode()).hexdigest()[:32]}")
