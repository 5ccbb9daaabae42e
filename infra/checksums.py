"""Checksums of what lasts on the store: every object of ours carries its own, and whoever reads it checks it.

So a flipped bit is noticed before a number comes of it, wherever the object was copied to, and nothing has to be read
beside it. JSON ends in a line of blanks and tabs, which every reader of JSON passes over and every writer leaves out:
what a program has changed has none, and is taken as it is. Weights (training.tensors) and tables (training.metrics)
have theirs among their metadata, checkpoints (training.checkpoints) in each part of their zip. Objects of earlier
versions have none and are read all the same. CRC-32 by libdeflate takes a twelfth of the time of sha256; it tells
damage, not intent: whoever may write an object may write its checksum.
"""

import re

import deflate

from infra.errors import DamagedObject

_BITS = bytes.maketrans(b"01", b" \t")
_SEAL = re.compile(rb"\n[ \t]{32}\n\Z")
_SEAL_BYTES = 34


def crc32(data: bytes | memoryview, before: int = 0) -> int:
    """CRC-32; before: that of what precedes the data."""
    found: int = deflate.crc32(data, before)
    return found


def require(same: bool, source: str, more: str = "") -> None:
    """Raises DamagedObject, with what more is to be said, unless the checksum was the same."""
    if not same:
        raise DamagedObject(
            f"{source}: damaged: by its checksum not what was written there; put a copy in its place, "
            f"or delete it and run again what wrote it{more}"
        )


def seal(text: bytes) -> bytes:
    """JSON with a last line that says its checksum: 32 bits, a blank for 0 and a tab for 1."""
    return text + _seal(text)


def check(text: bytes, source: str) -> None:
    """Raises DamagedObject, naming the source, for JSON that is not what its last line says, if it has that line."""
    if _SEAL.fullmatch(text, len(text) - _SEAL_BYTES):
        by_hand = "; if you have changed it, take away its last line, of blanks and tabs"
        require(text[-_SEAL_BYTES:] == _seal(memoryview(text)[:-_SEAL_BYTES]), source, by_hand)


def _seal(text: bytes | memoryview) -> bytes:
    return b"\n" + f"{crc32(text):032b}".encode().translate(_BITS) + b"\n"
