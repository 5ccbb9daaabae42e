"""Portable pixmaps and graymaps (PPM, PGM) with all their bits: Pillow keeps 8, one pixel of Python after another."""

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preprocessing.geometry import Size

_CHANNELS = {b"P2": 1, b"P3": 3, b"P5": 1, b"P6": 3}
_PLAIN = (b"P2", b"P3")
_TOKEN = re.compile(rb"(?:\s+|#[^\r\n]*)*+([^\s#]\S*)")
"""The next number, behind white space and comments, in one pass."""


class Header(NamedTuple):
    """What there is to know before the pixels."""

    most: int
    """The value that is white; of bitmaps 1, of float maps what 32 bits hold."""
    start: int
    """Offset of the pixels; 0 where they are no numbers."""


def read_header(data: bytes) -> Header:
    """Raises ValueError for what is none."""
    if data[:2] not in _CHANNELS:
        return Header((1 << 32) - 1 if data[:2] == b"Pf" else 1, 0)
    at, tokens = 2, list[bytes]()
    while len(tokens) < 3 and (found := _TOKEN.match(data, at)):
        tokens.append(found[1])
        at = found.end()
    if len(tokens) < 3 or not 0 < int(tokens[2]) < 1 << 16:
        raise ValueError("the largest value is not 1 to 65535")
    return Header(int(tokens[2]), at + 1)


def read_values(data: bytes, size: Size) -> NDArray[np.uint16] | None:
    """uint16 (H, W), or (H, W, 3) of colours; None for what Pillow reads as it is. ValueError for a damaged file."""
    most, start = read_header(data)
    plain = data[:2] in _PLAIN
    if not start or (most == 255 and not plain):
        return None
    channels = _CHANNELS[data[:2]]
    count = size[0] * size[1] * channels
    if plain:
        values = np.fromstring(data[start:], np.uint16, count, sep=" ")
    else:
        dtype = np.dtype(">u2" if most > 255 else "u1")
        if len(data) - start < count * dtype.itemsize:
            raise ValueError("the file is cut short")
        values = np.frombuffer(data, dtype, count, start).astype(np.uint16)
    if values.size < count or values.max() > most:
        raise ValueError(f"expected {count} values up to {most}")
    return values.reshape((*size, 3) if channels == 3 else size)
