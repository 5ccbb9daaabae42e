"""The files of a data set: on disk, in zips, which are read where they lie and never unpacked, or on an object store.

Only the driver reads a zip's directory and lists a store; a `File` then says by itself where its bytes are, so a
worker reads one sample of 118,000 without knowing of the others.
"""

import io
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from infra.errors import NoSuchObject, TesseraError
from infra.opening import check_size, open_regular, read_regular
from infra.store import open_store
from infra.text import shown

_MOST_INFLATED = 100
"""How much larger a zip in a zip may be than what it is packed in; a bomb is up to 1032 times as large."""
_SMALL = 1 << 24
"""Bytes up to which it may be anything."""

_S3 = "s3://"
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    """Where a zip keeps the bytes of one file."""

    start: int
    """Offset of the local header in the file on disk."""
    stored: int
    """Bytes as they lie there."""
    size: int
    """Bytes of the file itself."""
    crc: int
    deflated: bool
    container: "File | None" = None
    """The zip itself, where it lies deflated in another one: it has no bytes of its own on disk."""


@dataclass(frozen=True)
class File:
    """One file; `str(file)` is what messages call it."""

    path: str
    """The file on disk that holds it, or the URL of the object on the store."""
    member: Member | None = None
    """None: it is that file or object."""
    inside: str = ""
    """Its name in the zip (of the zip) at `path`."""
    listed: int | None = None
    """Bytes of an object as the store's listing has them; None where that lacks it: then nobody asks for it."""

    def __str__(self) -> str:
        return shown(f"{self.path}/{self.inside}" if self.inside else self.path)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return Path(self.inside or self.path).name

    def read(self) -> bytes:
        """All bytes. OSError if that cannot be done, or a zip's checksum disagrees.

        StoreError if the object store is away or refuses: that is the fault of no file.
        """
        if self._is_object:
            return self._read_object()
        if self.member is None:
            return self._read_disk()
        check_size(self.member.size)
        data = b"".join(_inflated(self.member, self._disk()))
        if zlib.crc32(data) != self.member.crc:
            raise OSError("its checksum in the zip disagrees")
        return data

    def size(self) -> int:
        """Bytes, of an object as it was listed. OSError if there is no such file."""
        if self._is_object:
            if self.listed is None:
                raise FileNotFoundError("the store has no such object")
            return self.listed
        return Path(self.path).stat().st_size if self.member is None else self.member.size

    def crc(self) -> int:
        """CRC-32 of the bytes; a zip knows it without reading them. Raises as `read`."""
        return zlib.crc32(self.read()) if self.member is None else self.member.crc

    @property
    def _is_object(self) -> bool:
        return self.path.startswith(_S3)

    def _read_object(self) -> bytes:
        check_size(self.size())
        bucket, _, key = self.path.removeprefix(_S3).partition("/")
        store = open_store(_S3 + bucket)
        try:
            store.url_for(key)
        except TesseraError as error:  # buckets may hold names, unprintable ones say, that our stores refuse
            raise OSError(str(error)) from error
        try:
            return store.read(key)
        except NoSuchObject as error:
            raise FileNotFoundError("the object is gone since the data set was listed") from error

    def _read_disk(self) -> bytes:
        try:
            return read_regular(self.path)
        except NotADirectoryError as error:
            raise FileNotFoundError(f"there is none in {Path(self.path).parent}") from error

    def _disk(self) -> str:
        container = self.member and self.member.container
        return _unpacked(container) if container else self.path


class Tree:
    """A data set: a folder, where what zips hold counts as if they were unpacked, or what is below a URL of a store.

    A store is listed once, at the start; all that is asked here afterwards costs no request.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = open_store(str(root)).url
        self._zipped: dict[str, File] | None = None
        self._broken: list[str] = []
        self._objects: dict[str, File] | None = None
        problem = ""
        if self.root.startswith(_S3):
            listing = open_store(self.root).list()
            self._objects = {entry.key: File(f"{self.root}/{entry.key}", listed=entry.size) for entry in listing}
            problem = "" if self._objects else "not found"
        else:
            with _telling(folder := Path(self.root)):
                if not folder.is_dir():
                    problem = "it is no folder" if folder.exists() else "not found"
        if problem:
            raise TesseraError(f"{self.root}: {problem} (expected the folder of a data set)")

    def file(self, name: str) -> File | None:
        """The file of this name relative to the root; what lies on disk comes before what lies in zips."""
        if self._objects is not None:
            return self._objects.get(name)
        path = Path(self.root, name)
        with _telling(path):
            return File(str(path)) if path.is_file() else self._members().get(name)

    def missing(self, name: str, *others: str, expected: str) -> TesseraError:
        """The error for names of which none is there; tells of zips that were not, or could not be, looked into."""
        nor = f", nor {' nor '.join(others)}" if others else ""
        zips = [key for key in self._objects or () if key.endswith(".zip")]
        packed = [f"{', '.join(zips[:3])} must be unpacked, zips are read from disks only"] if zips else []
        told = "".join(f"; {text}" for text in (*self._broken, *packed))
        return TesseraError(f"{self.root}/{name}: not found{nor} (expected {expected} under {self.root}){told}")

    def folder(self, name: str) -> "Folder | None":
        """A folder: on disk or the store, inside a zip at the root, or as `<name>.zip` in its place."""
        path = f"{self.root}/{name}"
        if self._objects is not None:
            inside = _below(name, self._objects)
            return Folder(path, inside) if inside else None
        with _telling(there := Path(path)):
            if there.is_dir():
                found = there.rglob("*")
                files = {p.relative_to(there).as_posix(): File(str(p)) for p in found if p.is_file()}
                return Folder(str(there), files)
        return self._zipped_folder(name)

    def _zipped_folder(self, name: str) -> "Folder | None":
        inside = _below(name, self._members())
        if inside:
            return Folder(str(Path(self.root, name)), inside)
        archive = self.file(f"{name}.zip")
        if archive is None:
            return None
        members = {member.inside.removeprefix(f"{archive.inside}/"): member for member in list_zip(archive)}
        return Folder(str(archive), _below(Path(name).name, members) or members)

    def _members(self) -> dict[str, File]:
        """What the zips at the root hold, by name."""
        if self._zipped is None:
            self._zipped = {}
            zips = sorted(Path(self.root).glob("*.zip"), reverse=True)  # of two of one name the first archive's wins
            for path in zips:
                try:
                    self._zipped |= {member.inside: member for member in list_zip(File(str(path)))}
                except TesseraError as error:  # perhaps one that nobody needs, half downloaded
                    self._broken.append(str(error))
        return self._zipped


@dataclass(frozen=True)
class Folder:
    """Files by their name relative to the folder, below it at any depth."""

    path: str
    files: dict[str, File]

    def file(self, name: str) -> File:
        """The file of this name; where there is none, one that cannot be read and says so."""
        found = self.files.get(name) or self.files.get(PurePosixPath(name).as_posix())  # a//b is a/b, as on a disk
        return found or File(f"{self.path}/{name}")


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TesseraError(f"{path}: cannot be read ({error.strerror or error})") from error


def leads_outside(name: str) -> bool:
    """Whether a file's name, as annotations have it, is of no file below the folder that it is to lie in."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _below(name: str, files: dict[str, File]) -> dict[str, File]:
    return {path.removeprefix(f"{name}/"): file for path, file in files.items() if path.startswith(f"{name}/")}


def list_zip(archive: File) -> Iterator[File]:
    """The files in a zip, which may itself lie in a zip. TesseraError if it is damaged, or packed otherwise."""
    try:
        window, container = _opened(archive)
        with window, zipfile.ZipFile(window) as opened:
            for info in opened.infolist():
                if info.is_dir() or info.filename.startswith("__MACOSX/"):
                    continue
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                    raise TesseraError(f"{archive}: {info.filename} is encrypted or packed in a way other than deflate")
                deflated = info.compress_type == zipfile.ZIP_DEFLATED
                start, sizes = window.start + info.header_offset, (info.compress_size, info.file_size)
                member = Member(start, *sizes, info.CRC, deflated, container)
                yield File(archive.path, member, f"{archive.inside}/{info.filename}".lstrip("/"))
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise TesseraError(f"{archive}: not a readable zip ({error})") from error


def _opened(archive: File) -> tuple["_Window", File | None]:
    """A zip as a seekable stream, and the container that its members will need."""
    member = archive.member
    if member is None:
        return _Window(archive.path, 0, archive.size()), None
    if member.deflated:
        return _Window(_unpacked(archive), 0, member.size), archive
    disk = archive._disk()
    with open_regular(disk) as stream:
        return _Window(disk, _seek_data(member, stream), member.size), member.container


def _inflated(member: Member, disk: str) -> Iterator[bytes]:
    """The bytes of a member in pieces. OSError if they are damaged or more than the zip's directory says."""
    inflate, left, given = zlib.decompressobj(-zlib.MAX_WBITS), member.stored, 0
    try:
        with open_regular(disk) as stream:
            _seek_data(member, stream)
            while left:
                packed = stream.read(min(left, _CHUNK))
                if not packed:
                    raise OSError("the zip ends too early")
                left -= len(packed)
                piece = inflate.decompress(packed, member.size - given + 1) if member.deflated else packed
                given += len(piece)
                if given > member.size or inflate.unconsumed_tail:
                    raise OSError("it is longer than the zip says")
                yield piece
    except zlib.error as error:
        raise OSError(f"damaged in the zip ({error})") from error


def _seek_data(member: Member, stream: BinaryIO) -> int:
    """Move to a member's first byte: the local header's length is only known from itself."""
    stream.seek(member.start)
    header = stream.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise OSError("the zip has changed since its directory was read")
    *_, name, extra = _LOCAL_HEADER.unpack(header)
    return stream.seek(member.start + _LOCAL_HEADER.size + name + extra)


def _unpacked(archive: File) -> str:
    """A zip that lies deflated in another one, as COCO's PNGs may: that has no random access, so it is unpacked once.

    It goes to TESSERA_CACHE, or the folder for temporary files. OSError if it cannot be unpacked whole.
    """
    member = archive.member
    assert member is not None
    folder = Path(os.environ.get("TESSERA_CACHE") or Path(tempfile.gettempdir()) / f"tessera-{os.getuid()}")
    if member.size > max(_SMALL, _MOST_INFLATED * member.stored):
        raise OSError(f"it would inflate from {member.stored} bytes to {member.size}, as only a zip bomb does")
    target = folder / f"{member.crc:08x}-{member.size}-{Path(archive.inside).name}"
    if target.exists():
        return str(target)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    crc = 0
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as made:
        try:
            for piece in _inflated(member, archive._disk()):
                crc = zlib.crc32(piece, crc)
                made.write(piece)
            if crc != member.crc:
                raise OSError("its checksum in the zip disagrees")
            Path(made.name).rename(target)
        except BaseException:
            Path(made.name).unlink()
            raise
    return str(target)


class _Window(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, path: str, start: int, size: int) -> None:
        self.start, self._size, self._at = start, size, 0
        self._stream = open_regular(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if self._at < 0:
            raise OSError("a zip's directory points outside of it")
        return self._at

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        self._stream.seek(self.start + self._at)
        count = min(len(buffer), max(0, self._size - self._at))
        data = self._stream.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()
