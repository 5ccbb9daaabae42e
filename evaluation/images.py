"""Pictures as users have them -> upright 8-bit RGB, or one sentence that says why not.

Colour profiles are ignored, as training ignores them.
"""

import warnings
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from infra.errors import TesseraError
from preprocessing.opening import BROKEN, FORMATS, open_image
from preprocessing.pictures import Picture
from preprocessing.source import ORIENTATION

_READ = "jpg jpeg jpe jfif mpo png webp tif tiff gif bmp ppm pgm pbm pnm jp2 j2k avif"
_NAMED = "heic heif jxl"  # pictures, too, which this cannot read: better refused by name than passed over
SUFFIXES = frozenset(f".{suffix}" for suffix in f"{_READ} {_NAMED}".split())
"""Names of pictures end in one of these, in lower case."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class UserImage:
    """A picture as the network will see it, before it comes onto the network's grid."""

    rgb_HW3: Picture
    notes: tuple[str, ...] = ()
    """What was done to it that its owner may want to know."""


def read_image(data: bytes, upright: bool = True) -> UserImage:
    """The bytes of an image file -> uint8 RGB (H, W, 3).

    Turned as EXIF says, unless `upright` is False (COCO's sizes and annotations are of the pixels as stored). Of
    several frames or pages the first; transparency over white; 16-bit gray from 0..65535 to 0..255; 32-bit values
    from their lowest and highest to 0..255. Raises TesseraError saying what is wrong: no image, damaged, cut
    short, of more pixels than Image.MAX_IMAGE_PIXELS, which Pillow takes for a decompression bomb.
    """
    if not data:
        raise TesseraError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata; the pixels are checked
        try:
            return _read(data, upright)
        except UnidentifiedImageError as error:
            raise TesseraError(f"no image of a kind that is read here: {', '.join(FORMATS)}") from error
        except Image.DecompressionBombError as error:
            raise TesseraError(f"more pixels than the {Image.MAX_IMAGE_PIXELS} that are read") from error
        except BROKEN as error:
            raise TesseraError(f"a damaged image ({error})") from error


def _read(data: bytes, upright: bool) -> UserImage:
    with open_image(data) as image:
        image.load()
        _refuse_unfinished(image, data)
        notes: list[str] = []
        rgb = _rgb(image, notes)
        if upright:
            rgb = _turned(rgb, image, notes)
        frames = _frames(image)
        if frames > 1:
            notes.append(f"the first of {frames} frames or pages")
        return UserImage(np.asarray(rgb), tuple(notes))


def _refuse_unfinished(image: Image.Image, data: bytes) -> None:
    """Pillow fills what an interrupted download left as zeros with gray."""
    if image.format == "JPEG" and data.endswith(bytes(16)) and b"\xff\xd9" not in data.rstrip(b"\0")[-4096:]:
        raise OSError("it ends in zeros, without the end marker of a JPEG")


def _rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _from_deep(image, notes).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() != (255, 255):
        notes.append("transparency shown over white")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _from_deep(image: Image.Image, notes: list[str]) -> Image.Image:
    """16- or 32-bit gray -> 8 bits: scaled, where Pillow would clip at 255."""
    values_HW = np.asarray(image).astype(np.float64)
    low, high = values_HW.min(), values_HW.max()
    if not np.isfinite(high - low):
        raise ValueError("its values are not finite")
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and high <= 65535):
        low, high = 0.0, 65535.0
    notes.append(f"{image.mode} values {low:g}..{high:g} scaled to 0..255")
    scaled_HW = (values_HW - low) * (255 / max(high - low, np.finfo(float).tiny))
    return Image.fromarray(np.rint(scaled_HW).astype(np.uint8))


def _turned(rgb: Image.Image, image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except BROKEN:
        notes.append("its EXIF data cannot be read: taken as it lies")
        return rgb
    if orientation not in _TURNS:
        return rgb
    notes.append(f"turned upright as EXIF says (orientation {orientation})")
    return rgb.transpose(_TURNS[orientation])


def _frames(image: Image.Image) -> int:
    """1 where a later frame is damaged: the first one was read."""
    with suppress(*BROKEN):
        return int(getattr(image, "n_frames", 1))
    return 1
