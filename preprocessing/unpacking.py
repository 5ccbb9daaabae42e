"""Where zips are unpacked that lie deflated in another one: once a machine, and believed only by their checksum."""

import os
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from infra.opening import open_regular, own_folder

_CHUNK = 1 << 20
_believed: set[tuple[int, ...]] = set()
"""Files whose checksum this process has seen."""


def unpacked(name: str, size: int, crc: int, pieces: Callable[[], Iterable[bytes]]) -> str:
    """A file of these bytes, of which size and CRC-32 are known; `pieces` gives them where they do not lie there yet.

    It is in a folder of this user's in TESSERA_CACHE, or in the folder for temporary files. What was there before, put
    there by whomever, is read once by each process. OSError if the pieces are others, or the folder is not ours alone.
    """
    shared = os.environ.get("TESSERA_CACHE") or tempfile.gettempdir()
    folder = own_folder(Path(shared) / f"tessera-{os.getuid()}")
    target = folder / f"{crc:08x}-{size}-{name}"
    if _is_whole(target, size, crc):
        return str(target)
    found = 0
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as made:
        try:
            for piece in pieces():
                found = zlib.crc32(piece, found)
                made.write(piece)
            if found != crc:
                raise OSError("its checksum in the zip disagrees")
            made.flush()
            Path(made.name).rename(target)
            _believed.add(_identity(made.fileno()))
        except BaseException:
            Path(made.name).unlink(missing_ok=True)
            raise
    return str(target)


def _is_whole(target: Path, size: int, crc: int) -> bool:
    try:
        with open_regular(target, owned=True, links=False) as stream:
            identity, found = _identity(stream.fileno()), 0
            if identity in _believed:
                return True
            while piece := stream.read(_CHUNK):
                found = zlib.crc32(piece, found)
    except OSError:  # there is none, or none that is fit: another comes into its place
        return False
    if (identity[2], found) != (size, crc):
        return False
    _believed.add(identity)
    return True


def _identity(handle: int) -> tuple[int, ...]:
    found = os.fstat(handle)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
