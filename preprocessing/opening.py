"""Opening image files that may be damaged, or made to do harm: what is read at all, and what that may raise."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from infra.errors import TesseraError

# No others: Pillow runs Ghostscript for EPS, and its rarer readers are written for friendly files.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")

# What Pillow raises for damaged files, told by experience: its readers do not agree on one kind.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    Image.DecompressionBombError,
)

MOST_SCANS = 200
"""Of a JPEG: a progressive one has some ten; each takes as long as a whole image, however few bytes it has."""
_SCAN = b"\xff\xda"
MOST_BYTES_A_PIXEL = 32
"""Of memory that reading one sample, whatever its image and masks hold, may take besides its files. A test holds it."""


class NoMemory(TesseraError):
    """One sample does not fit into memory: its own fault, not that of all."""


@contextmanager
def within_memory(named: str = "") -> Iterator[None]:
    """Raises NoMemory in the place of MemoryError, saying what a sample may take. named: what is read."""
    try:
        yield
    except MemoryError as error:
        most, size = Image.MAX_IMAGE_PIXELS or 0, f"{MOST_BYTES_A_PIXEL} bytes a pixel"
        room = f"up to {most} pixels are read, which takes up to {size}, {most * MOST_BYTES_A_PIXEL >> 20} MiB"
        raise NoMemory(f"{named}{': ' if named else ''}there is not enough memory for it ({room})") from error


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The image in a file's bytes; its pixels are read when they are asked for. Raises what is in BROKEN.

    More pixels than Image.MAX_IMAGE_PIXELS are a DecompressionBombError: Pillow itself warns only, up to twice as many.
    """
    image = Image.open(io.BytesIO(data), formats=formats)
    check_pixels(*image.size)
    if image.format in ("JPEG", "MPO") and (scans := data.count(_SCAN)) > MOST_SCANS:
        raise ValueError(f"it has {scans} scans, at most {MOST_SCANS} are read")
    return image


def check_pixels(width: int, height: int) -> None:
    """Raises DecompressionBombError for so many that they are taken for an attack."""
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise Image.DecompressionBombError(f"it claims {width}x{height} pixels, at most {most} are read")
