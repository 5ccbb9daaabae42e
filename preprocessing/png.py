"""The container of a PNG: chunks, their checksums, inflation; what the filters hide is for `kernels`."""

import struct
from collections.abc import Iterator

import deflate
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocessing.opening import check_pixels

SIGNATURE = b"\x89PNG\r\n\x1a\n"
RGB_LINES = (8, 2, 0, 0, 0)
"""Bit depth, colour type, compression, filtering and interlacing of what `rgb_scanlines` reads."""


def rgb_scanlines(data: bytes) -> NDArray[np.uint8] | None:
    """PNG bytes -> uint8 (H, 1 + 3 W): of each row the kind of its filter, 0 to 4, and its filtered RGB pixels.

    None for a PNG that is not 8-bit RGB or is interlaced. Raises ValueError saying what is damaged, and for an
    image of more pixels than `check_pixels` allows. The GIL is released while inflating.
    """
    chunks = list(_chunks(data))
    if chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13:
        raise ValueError("the PNG does not begin with its header")
    width, height, *layout = struct.unpack(">IIBBBBB", chunks[0][1])
    _check_size(width, height)
    if tuple(layout) != RGB_LINES:
        return None
    packed = b"".join(body for kind, body in chunks if kind == b"IDAT")
    lines_HB = np.frombuffer(_inflate(packed, height * (1 + 3 * width)), np.uint8).reshape(height, 1 + 3 * width)
    if lines_HB[:, 0].max() > 4:
        raise ValueError("the PNG has a row with an unknown filter")
    return lines_HB


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and content of all chunks; ValueError unless the data is whole chunks and IEND is the last one."""
    if data[: len(SIGNATURE)] != SIGNATURE:
        raise ValueError("the data is not a PNG")
    start, kind = len(SIGNATURE), b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
        end = start + 12 + length  # length, kind, content, checksum
        if end > len(data):
            raise ValueError("the PNG is cut short")
        if not kind.isalpha():
            raise ValueError(f"the PNG has a chunk of the kind {kind!r}")
        if deflate.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise ValueError(f"the PNG's chunk {kind!r} has a wrong checksum")
        yield kind, memoryview(data)[start + 8 : end - 4]
        start = end
    if start < len(data):
        raise ValueError(f"{len(data) - start} bytes follow the end of the PNG")


def _check_size(width: int, height: int) -> None:
    if not width or not height:
        raise ValueError(f"the PNG is {width}x{height} pixels")
    try:
        check_pixels(width, height)
    except Image.DecompressionBombError as error:
        raise ValueError(f"the PNG is too large: {error}") from error


def _inflate(packed: bytes, size: int) -> bytearray:
    """Exactly `size` bytes, never more memory than that; the Adler-32 checksum is verified."""
    try:
        raw = deflate.zlib_decompress(packed, size)
    except deflate.DeflateError as error:
        raise ValueError("the PNG's compressed data is damaged or too long") from error
    if len(raw) != size:
        raise ValueError(f"the PNG holds {len(raw)} bytes of pixels, {size} are needed")
    return raw
