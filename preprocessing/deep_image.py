"""Images of more than 8 bits a channel, of which Pillow keeps the upper 8 where they have colours.

What 16 bits hold is seldom 16 bits: cameras and microscopes write 10, 12 or 14, which are nearly black by any fixed
scale. So the scale is the smallest of these depths that holds the largest value, unless the file states another.
"""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocessing import pnm
from preprocessing.opening import open_image
from preprocessing.png import png_bits

_DEPTHS = (8, 10, 12, 14, 16)
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339
"""TIFF tags."""
_BLOCK = 1 << 20
"""Values that are scaled at once."""


def bits(image: Image.Image, data: bytes) -> int:
    """Bits of the file's deepest channel, from its header; of the image, only what was read when it was opened.

    Raises ValueError for what Pillow would read as something else.
    """
    found = 8
    if image.format == "PNG":
        found = png_bits(data)
    elif image.format == "TIFF":
        found = _tiff_bits(image)
    elif image.format == "PPM":
        found = pnm.read_header(data).most.bit_length()
    elif image.format == "JPEG2000":
        found = _jpeg2000_bits(data)
    elif image.format == "AVIF":
        found = _avif_bits(data)
    return 16 if found <= 8 and image.mode.startswith(("I", "F")) else found


def to_8_bits(image: Image.Image, data: bytes, bits: int) -> tuple[Image.Image, str]:
    """An image of so many bits a channel -> the same in 8, as L, LA, RGB, RGBA or CMYK; and how it was scaled.

    Raises ValueError for values that are not finite, and where only the upper bits can be had and are not enough.
    """
    if image.format in ("JPEG2000", "AVIF") and not image.mode.startswith(("I", "F")):
        return image, _check_upper(image, bits)
    if image.format == "PPM" and (known := pnm.read_values(data, (image.height, image.width))) is not None:
        most = pnm.read_header(data).most
        high = float(most if most < 65535 else _white(known.max()))
        return Image.fromarray(_scaled(known, 0, high)), _told(bits, 0, high)
    if bits <= 8:
        return image, ""
    image.load()
    values, mode = _values(image, data)
    shown_HW = _shown(image, values, mode)
    low, high = _range(values[..., :3] if mode in ("RGB", "RGBA") else values, shown_HW)
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        low, high = 0.0, float((1 << bits) - 1 if image.format == "TIFF" and bits < 16 else _white(high))
    scaled = _scaled(values, low, high)
    if mode in ("LA", "RGBA"):
        scaled[..., -1] = _scaled(values[..., -1], 0, 65535)
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0:  # type: ignore[attr-defined]
        scaled = 255 - scaled  # white is 0, which Pillow knows up to 8 bits only
    found = Image.fromarray(scaled, mode)
    if mode in ("L", "RGB") and shown_HW is not None:
        found.putalpha(Image.fromarray(shown_HW.astype(np.uint8) * 255))
    return found, _told(bits, low, high)


def _told(bits: int, low: float, high: float) -> str:
    return f"{bits} bits a channel: {low:g}..{high:g} scaled to 0..255"


def _shown(image: Image.Image, values: NDArray[Any], mode: str) -> NDArray[np.bool_] | None:
    """Pixels, (H, W), that are not wholly transparent: what the others hide says nothing about the scale."""
    if mode in ("LA", "RGBA"):
        return np.asarray(values[..., -1] > 0)
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None:
        return None
    differs = values != np.array(key, np.uint16)
    return np.asarray(differs.any(-1) if mode == "RGB" else differs)


def _range(values: NDArray[Any], shown_HW: NDArray[np.bool_] | None) -> tuple[float, float]:
    if values.shape[-1] == 2 and values.ndim == 3:
        values = values[..., 0]
    if shown_HW is not None and shown_HW.any():
        where = shown_HW[..., None] if values.ndim == 3 else shown_HW
        return float(values.min(where=where, initial=65535)), float(values.max(where=where, initial=0))
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError("its values are not finite")
    return low, high


def _check_upper(image: Image.Image, bits: int) -> str:
    if bits >= 16 and np.asarray(image.convert("RGB")).max() < 64:
        raise ValueError(f"of {bits} bits a channel only the upper 8 can be read, which hold next to nothing")
    return f"{bits} bits a channel: the upper 8 are read"


def _white(top: float) -> int:
    """The largest value of the smallest depth that holds `top`."""
    return next((1 << depth) - 1 for depth in _DEPTHS if top < 1 << depth)


def _scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """From low..high to 0..255, some rows at once: a whole image in float64 would be eight times as large."""
    found = np.empty(values.shape, np.uint8)
    step = max(1, _BLOCK // max(1, values[:1].size))
    factor = 255 / max(high - low, np.finfo(float).tiny)
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        found[rows] = np.rint((values[rows] - np.float64(low)) * factor).clip(0, 255)
    return found


def _values(image: Image.Image, data: bytes) -> tuple[NDArray[Any], str]:
    """All bits of the pixels, (H, W) or (H, W, channels), and the mode of the same in 8 bits."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        unsigned = image.format == "TIFF" and 1 in image.tag_v2.get(_SAMPLE_FORMAT, (1,))  # type: ignore[attr-defined]
        return values.view(np.uint32) if unsigned and values.dtype == np.int32 else values, "L"
    with open_image(data) as again:
        if [tile.args for tile in again.tile] == ["LA;16B"]:  # type: ignore[attr-defined]
            again.tile = [again.tile[0]._replace(args="RGBA")]  # type: ignore[attr-defined]
            return np.asarray(again).view(">u2").astype(np.uint16), "LA"
        again.tile = [tile._replace(args=_swapped(tile.args)) for tile in again.tile]  # type: ignore[attr-defined]
        again.load()
        values = np.asarray(image).astype(np.uint16)
        values <<= 8
        values |= np.asarray(again)
    return values, image.mode


def _swapped(args: Any) -> Any:
    """How a decoder is told to keep the lower byte of each two, where Pillow tells it to keep the upper one."""
    rawmode, *others = [args] if isinstance(args, str) else args
    kind, _, order = rawmode.partition(";16")
    if order not in ("B", "L", "N") or kind == "RGBa":
        raise ValueError(f"16 bits a channel in a way that cannot be read ({rawmode})")
    if order == "N":
        order = sys.byteorder[0].upper()
    lower = f"{kind};16{'B' if order == 'L' else 'L'}"
    return lower if isinstance(args, str) else (lower, *others)


def _tiff_bits(image: Image.Image) -> int:
    tags = image.tag_v2  # type: ignore[attr-defined]
    found = max(tags.get(_BITS_PER_SAMPLE, (1,)))
    if found > 8 and tags.get(_PLANES) == 2:
        raise ValueError(f"a TIFF of {found} bits a channel whose channels lie apart cannot be read")
    if found <= 8 and set(tags.get(_SAMPLE_FORMAT, (1,))) != {1}:
        raise ValueError("a TIFF of signed bytes cannot be read")
    return found


def _jpeg2000_bits(data: bytes) -> int:
    """Of the deepest component in the codestream's marker SIZ."""
    at = data.index(b"\xff\x4f\xff\x51") + 40
    count = int.from_bytes(data[at : at + 2])
    return max(1 + (size & 127) for size in data[at + 2 : at + 2 + 3 * count : 3])


def _avif_bits(data: bytes) -> int:
    """Of the deepest AV1 image in the file, by its configuration box."""
    found, at = 8, data.find(b"av1C")
    while at >= 0:
        flags = data[at + 6] if at + 6 < len(data) else 0
        found = max(found, (12 if flags & 32 else 10) if flags & 64 else 8)
        at = data.find(b"av1C", at + 4)
    return found
