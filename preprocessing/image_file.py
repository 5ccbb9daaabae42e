"""The one reader of images, for data sets, shards and users' pictures: what becomes of a file is the same for all.

Its own header decides, before a library has converted anything:

| in the file | pixels | in a data set |
|---|---|---|
| more than 8 bits a channel | scaled as `deep_image` says | refused: which value is white is a guess |
| transparency | over white | warned about |
| palette, gray, 1 to 4 bits, YCbCr | the colours that it stands for | |
| CMYK | converted without its profile | warned about |
| turned by EXIF or XMP | turned for users; as stored for data sets, as their masks are | warned about |
| several frames or pages | the first | warned about |

Colour profiles and gamma are ignored.
"""

from contextlib import suppress
from dataclasses import dataclass

from PIL import Image

from preprocessing import deep_image
from preprocessing.opening import BROKEN, open_image

ORIENTATION = 0x0112
"""EXIF tag."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {**_TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class Note:
    """One thing that was done to an image."""

    text: str
    refused: str = ""
    """Why no data set may hold such an image; empty: it may."""


@dataclass(frozen=True)
class ImageFile:
    """An image as it was read."""

    rgb: Image.Image
    """8-bit RGB, decoded."""
    notes: tuple[Note, ...] = ()


def read_image(data: bytes, upright: bool = False) -> ImageFile:
    """The bytes of an image file -> its pixels, and what was done to them; upright: turned as EXIF says.

    Raises what is in BROKEN: no image, damaged, cut short, of more than Image.MAX_IMAGE_PIXELS pixels.
    """
    notes: list[Note] = []
    with open_image(data) as image:
        if image.format not in ("TIFF", "PPM"):  # Pillow turns a TIFF then, and forgets it
            image.load()
        orientation = _orientation(image, notes)
        bits, shallow = deep_image.bits(image, data), image
        if bits > 8 or (image.format == "PPM" and image.mode in ("L", "RGB")):
            shallow, told = deep_image.to_8_bits(image, data, bits)
            why = f"the image has more than 8 bits a channel ({bits}), and which value is white is not known"
            notes += [Note(told, why)] if bits > 8 else []
        shallow.load()
        _refuse_unfinished(image, data)
        rgb = _turned(_to_rgb(shallow, notes), image.format == "TIFF", orientation, upright, notes)
        frames = _frames(image)
        if frames > 1:
            notes.append(Note(f"the first of {frames} frames or pages"))
    return ImageFile(rgb, tuple(notes))


def _orientation(image: Image.Image, notes: list[Note]) -> int:
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except BROKEN:
        notes.append(Note("its EXIF data cannot be read: taken as it lies"))
        return 1
    return found if found in _TURNS else 1


def _refuse_unfinished(image: Image.Image, data: bytes) -> None:
    """Pillow fills what an interrupted download left as zeros with gray; some cameras write after the end."""
    is_jpeg = image.format in ("JPEG", "MPO")
    if is_jpeg and data.endswith(bytes(16)) and b"\xff\xd9" not in data.rstrip(b"\0")[-4096:]:
        raise OSError("it ends in zeros, without the end marker of a JPEG")


def _to_rgb(image: Image.Image, notes: list[Note]) -> Image.Image:
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            notes.append(Note("transparency shown over white"))
            rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return rgba.convert("RGB")
    if image.mode == "CMYK":
        notes.append(Note("CMYK colours converted without a profile"))
    return image.convert("RGB")


def _turned(rgb: Image.Image, is_tiff: bool, orientation: int, upright: bool, notes: list[Note]) -> Image.Image:
    if orientation == 1:
        return rgb
    if upright:
        notes.append(Note(f"turned upright as EXIF says (orientation {orientation})"))
        return rgb if is_tiff else rgb.transpose(_TURNS[orientation])
    notes.append(Note("EXIF says that the image is to be rotated; that is ignored, as COCO's annotations do"))
    return rgb.transpose(_BACK[orientation]) if is_tiff else rgb


def _frames(image: Image.Image) -> int:
    """1 where a later frame is damaged: the first one was read."""
    with suppress(*BROKEN):
        return int(getattr(image, "n_frames", 1))
    return 1
