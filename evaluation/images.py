"""Pictures as users have them -> upright 8-bit RGB, or one sentence that says why not."""

import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from infra.errors import TesseraError
from preprocessing import image_file
from preprocessing.opening import BROKEN, FORMATS, within_memory
from preprocessing.pictures import Picture

_READ = "jpg jpeg jpe jfif mpo png webp tif tiff gif bmp ppm pgm pbm pnm jp2 j2k avif"
_NAMED = "heic heif jxl"  # pictures, too, which this cannot read: better refused by name than passed over
SUFFIXES = frozenset(f".{suffix}" for suffix in f"{_READ} {_NAMED}".split())
"""Names of pictures end in one of these, in lower case."""


@dataclass(frozen=True)
class UserImage:
    """A picture as the network will see it, before it comes onto the network's grid."""

    rgb_HW3: Picture
    notes: tuple[str, ...] = ()
    """What was done to it that its owner may want to know."""


def read_image(data: bytes, upright: bool = True) -> UserImage:
    """The bytes of an image file -> uint8 RGB (H, W, 3).

    As preprocessing.image_file reads it. Turned as EXIF says, unless `upright` is False (COCO's sizes and annotations
    are of the pixels as stored). Raises TesseraError saying what is wrong: no image, damaged, cut short, of more
    pixels than Image.MAX_IMAGE_PIXELS, which Pillow takes for a decompression bomb.
    """
    if not data:
        raise TesseraError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata; the pixels are checked
        try:
            with within_memory():
                found = image_file.read_image(data, upright)
                return UserImage(np.asarray(found.rgb), tuple(note.text for note in found.notes))
        except UnidentifiedImageError as error:
            raise TesseraError(f"no image of a kind that is read here: {', '.join(FORMATS)}") from error
        except Image.DecompressionBombError as error:
            raise TesseraError(f"more pixels than the {Image.MAX_IMAGE_PIXELS} that are read") from error
        except BROKEN as error:
            raise TesseraError(f"a damaged image ({error})") from error
