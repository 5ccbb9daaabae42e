"""The files of a data set: on disk, in zips, which are read where they lie and never unpacked, or on an object store.

Only the driver reads a zip's directory and lists a store (preprocessing.tree); a `File` then says by itself where its
bytes are, so a worker reads one sample of 118,000 without knowing of the others.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from infra.errors import NoSuchObject, TesseraError
from infra.opening import check_size, open_regular, read_regular
from infra.store import open_store
from infra.text import shown
from preprocessing.unpacking import unpacked

_MOST_INFLATED = 50
"""How much larger a file may be than it is in a zip: indented annotations are 15 times as large, a bomb up to 1032."""
_SMALL = 1 << 24
"""Bytes up to which it may be anything."""

S3 = "s3://"
_UTF8 = 0x800
"""Flag of a member whose name is UTF-8."""
_UNICODE_PATH = 0x7075
_DIRECTORY = b"PK\1\2"
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
    fault: str = ""
    """Why it cannot be read, if that is known beforehand."""

    def __str__(self) -> str:
        return shown(f"{self.path}/{self.inside}" if self.inside else self.path)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return Path(self.inside or self.path).name

    def read(self, most: int | None = None) -> bytes:
        """All bytes, at most so many, or opening.MOST. OSError if that cannot be done, or a zip's checksum disagrees.

        StoreError if the object store is away or refuses: that is the fault of no file.
        """
        self._refuse_fault()
        if self._is_object:
            return self._read_object(most)
        if self.member is None:
            return self._read_disk(most)
        check_size(self.member.size, most)
        whole = io.BytesIO()  # which gives its bytes away without a copy, as joined pieces would not
        for piece in _inflated(self.member, self._disk()):
            whole.write(piece)
        return whole.getvalue()

    def size(self) -> int:
        """Bytes, of an object as it was listed. OSError if there is no such file."""
        self._refuse_fault()
        if self._is_object:
            if self.listed is None:
                raise FileNotFoundError("the store has no such object")
            return self.listed
        return Path(self.path).stat().st_size if self.member is None else self.member.size

    def crc(self) -> int:
        """CRC-32 of the bytes; a zip knows it without reading them. Raises as `read`."""
        self._refuse_fault()
        return zlib.crc32(self.read()) if self.member is None else self.member.crc

    def _refuse_fault(self) -> None:
        if self.fault:
            raise OSError(self.fault)

    @property
    def _is_object(self) -> bool:
        return self.path.startswith(S3)

    def _read_object(self, most: int | None) -> bytes:
        check_size(self.size(), most)
        bucket, _, key = self.path.removeprefix(S3).partition("/")
        store = open_store(S3 + bucket)
        try:
            store.url_for(key)
        except TesseraError as error:  # buckets may hold names, unprintable ones say, that our stores refuse
            raise OSError(str(error)) from error
        try:
            return store.read(key)
        except NoSuchObject as error:
            raise FileNotFoundError("the object is gone since the data set was listed") from error

    def _read_disk(self, most: int | None) -> bytes:
        try:
            return read_regular(self.path, most)
        except NotADirectoryError as error:
            raise FileNotFoundError(f"there is none in {Path(self.path).parent}") from error

    def _disk(self) -> str:
        container = self.member and self.member.container
        return _unpacked(container) if container else self.path


def is_litter(name: str) -> bool:
    """.DS_Store and Thumbs.db, and the ._photo.jpg that macOS leaves beside photo.jpg: nobody asks for these."""
    path = PurePosixPath(name)
    return path.name in (".DS_Store", "Thumbs.db") or path.name.startswith("._") or "__MACOSX" in path.parts


def leads_outside(name: str) -> bool:
    """Whether a file's name, as annotations have it, is of no file below the folder that it is to lie in."""
    return name.startswith("/") or ".." in name.split("/")


def list_zip(archive: File) -> Iterator[File]:
    """The files in a zip, which may itself lie in a zip; a member that cannot be read says why. Of two of one name the
    later one counts, as unzip has it.

    Names are UTF-8, with or without the zip's flag for it, or else cp437. TesseraError for what is no zip or a damaged
    one.
    """
    try:
        window, container = _opened(archive)
        with window, zipfile.ZipFile(window) as opened:
            for info in opened.infolist():
                name = _name(info)
                if name.endswith("/") or name.startswith("__MACOSX/"):
                    continue
                deflated = info.compress_type == zipfile.ZIP_DEFLATED
                start, sizes = window.start + info.header_offset, (info.compress_size, info.file_size)
                member = Member(start, *sizes, info.CRC, deflated, container)
                inside = f"{archive.inside}/{PurePosixPath(name.lstrip('/'))}".lstrip("/")
                yield File(archive.path, member, inside, fault=_fault(info))
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
        raise TesseraError(f"{archive}: not a readable zip ({error})") from error


def _name(info: zipfile.ZipInfo) -> str:
    name = info.orig_filename
    if not name.isascii() and not info.flag_bits & _UTF8:  # then zipfile takes it for cp437, which few packers write
        written = name.encode("cp437")
        for data in (*_unicode_paths(info.extra, written), written):
            with suppress(UnicodeDecodeError):
                name = data.decode()
                break
    return name if "/" in name else name.replace("\\", "/")  # which .NET wrote for years


def _unicode_paths(extra: bytes, written: bytes) -> Iterator[bytes]:
    """The name in UTF-8 that Info-ZIP puts beside one that is not, if it was made for that one."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        body, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and body[:1] == b"\1" and body[1:5] == zlib.crc32(written).to_bytes(4, "little"):
            yield body[5:]


def _fault(info: zipfile.ZipInfo) -> str:
    if info.flag_bits & 1:
        return "it is encrypted in the zip"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "it is packed in the zip in a way other than deflate"
    if info.volume:
        return "it lies in another part of a zip in parts; join those to one"
    if info.file_size > max(_SMALL, _MOST_INFLATED * info.compress_size) and info.compress_type:
        grows = f"it would inflate from {info.compress_size} bytes to {info.file_size}"
        return f"{grows}, as only a zip bomb does; unpack it if it is none"
    return ""


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
    """The bytes of a member in pieces of at most _CHUNK. OSError if they are not what the zip's directory says."""
    inflate, left, given, crc = zlib.decompressobj(-zlib.MAX_WBITS), member.stored, 0, 0
    try:
        with open_regular(disk) as stream:
            _seek_data(member, stream)
            while not inflate.eof if member.deflated else left:
                packed = inflate.unconsumed_tail
                if not packed:
                    packed = stream.read(min(left, _CHUNK))
                    left -= len(packed)
                piece = inflate.decompress(packed, _CHUNK) if member.deflated else packed
                if not packed and not piece:
                    raise OSError("the zip ends too early")
                given, crc = given + len(piece), zlib.crc32(piece, crc)
                if given > member.size:
                    raise OSError("it is longer than the zip says")
                yield piece
    except zlib.error as error:
        raise OSError(f"damaged in the zip ({error})") from error
    if given < member.size or crc != member.crc:
        raise OSError("its checksum in the zip disagrees")


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

    OSError if it cannot be unpacked whole.
    """
    member = archive.member
    assert member is not None
    archive._refuse_fault()
    name = Path(archive.inside).name
    return unpacked(name, member.size, member.crc, lambda: _inflated(member, archive._disk()))


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
        data = bytearray(self._stream.read(count))
        if data.startswith(_DIRECTORY):
            _make_decodable(data)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _make_decodable(directory: bytearray) -> None:
    """In a zip's directory, let no name that is no UTF-8 say that it is: zipfile would refuse the whole zip."""
    at = 0
    while directory.startswith(_DIRECTORY, at) and at + 46 <= len(directory):
        name, *others = struct.unpack_from("<3H", directory, at + 28)
        try:
            directory[at + 46 : at + 46 + name].decode()
        except UnicodeDecodeError:
            directory[at + 9] &= ~(_UTF8 >> 8)
        at += 46 + name + sum(others)
