"""PNGs whose pixels are numbers: the container (chunks, checksums, inflation), and what may be read as it is.

What the filters hide is for `kernels`. Optimisers rewrite a PNG without loss, so it counts which colours come out, not
how they are written; but what a library would have to scale, cut or blend is no number any more, and is refused.
"""

import struct
from collections.abc import Iterator
from typing import Any

import deflate
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocessing.opening import check_pixels, open_image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
RGB_LINES = (8, 2, 0, 0, 0)
"""Bit depth, colour type, compression, filtering and interlacing of what `rgb_scanlines` reads."""
_COLOURS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray with transparency", 6: "RGB with transparency"}


def png_bits(data: bytes) -> int:
    """Bits a channel, of a palette's colours 8. Raises ValueError for what is no PNG."""
    _, bits, colours = _header(data)
    return 8 if colours == "palette" else bits


def is_gray(data: bytes) -> bool:
    """Whether a PNG has one channel of colour. Raises as `png_bits`."""
    return _header(data)[2].startswith("gray")


def read_rgb(data: bytes) -> NDArray[np.uint8]:
    """PNG bytes -> uint8 (H, W, 3), exact: RGB, palette, gray or opaque, of 8 bits at most.

    Raises ValueError saying what else it is, and what `open_image` does.
    """
    layout, bits, _ = _header(data)
    with open_image(data, ("PNG",)) as image:
        if bits > 8:
            raise ValueError(f"it is {layout}, expected 8-bit RGB")
        return np.asarray(_opaque(image, layout, "8-bit RGB").convert("RGB"))


def read_rgba(data: bytes) -> NDArray[np.uint8]:
    """PNG bytes -> uint8 (H, W, 4), exact: RGB with transparency of 8 bits, or a palette of such colours.

    Raises ValueError saying what else it is, and what `open_image` does.
    """
    layout, bits, colours = _header(data)
    with open_image(data, ("PNG",)) as image:
        if bits > 8 or colours not in ("palette", "RGB with transparency") or not image.has_transparency_data:
            raise ValueError(f"it is {layout}, expected 8-bit RGB with transparency")
        return np.asarray(image.convert("RGBA"))


def read_gray(data: bytes, most: int = 8) -> NDArray[Any]:
    """PNG bytes -> uint8 or uint16 (H, W), exact: gray of 8 bits, or 16 if `most` is, or a palette of grays; opaque.

    Fewer bits may mean 0..3 or 0, 85, 170, 255: both are written. Raises ValueError saying what else it is, and what
    `open_image` does.
    """
    layout, bits, colours = _header(data)
    expected = "8-bit gray" if most == 8 else "8-bit or 16-bit gray"
    with open_image(data, ("PNG",)) as image:
        if colours.startswith("RGB") or bits > most or (colours != "palette" and bits < 8):
            raise ValueError(f"it is {layout}, expected {expected}")
        if bits == 16 and colours == "gray" and "transparency" not in image.info:
            return np.asarray(image)
        if bits == 16:
            raise ValueError(f"it is {layout} with transparency, expected {expected}")
        solid = _opaque(image, layout, expected)
        if colours != "palette":
            return np.asarray(solid.convert("L"))
        red_HW, *others = (np.asarray(band) for band in solid.convert("RGB").split())
        if not all(np.array_equal(red_HW, other_HW) for other_HW in others):
            raise ValueError(f"it is {layout} of colours, expected {expected}")
        return red_HW


def _opaque(image: Image.Image, layout: str, expected: str) -> Image.Image:
    """The same, if no pixel is transparent: what is, was blended from, or hides, another number."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise ValueError(f"it is {layout} with transparent pixels, expected {expected}")
    return image


def _header(data: bytes) -> tuple[str, int, str]:
    """What the PNG holds in words, its bits a channel or index, its colours."""
    if data[: len(SIGNATURE)] != SIGNATURE:
        raise ValueError("the data is not a PNG")
    if data[12:16] != b"IHDR" or len(data) < 33 or data[25] not in _COLOURS:
        raise ValueError("the PNG does not begin with its header")
    colours = _COLOURS[data[25]]
    return f"{data[24]}-bit {colours}", data[24], colours


def rgb_scanlines(data: bytes) -> NDArray[np.uint8] | None:
    """PNG bytes -> uint8 (H, 1 + 3 W): of each row the kind of its filter, 0 to 4, and its filtered RGB pixels.

    None for a PNG that is not 8-bit RGB, is interlaced or has a transparent colour. Raises ValueError saying what is
    damaged, and for an image of more pixels than `check_pixels` allows. The GIL is released while inflating.
    """
    chunks = list(_chunks(data))
    if chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13:
        raise ValueError("the PNG does not begin with its header")
    width, height, *layout = struct.unpack(">IIBBBBB", chunks[0][1])
    _check_size(width, height)
    if tuple(layout) != RGB_LINES or any(kind == b"tRNS" for kind, _ in chunks):
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
