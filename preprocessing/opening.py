"""Opening image files that may be damaged, or made to do harm: what is read at all, and what that may raise."""

import io
import struct

from PIL import Image

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


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The image in a file's bytes; its pixels are read when they are asked for. Raises what is in BROKEN.

    More pixels than Image.MAX_IMAGE_PIXELS are a DecompressionBombError: Pillow itself warns only, up to twice as many.
    """
    image = Image.open(io.BytesIO(data), formats=formats)
    check_pixels(*image.size)
    return image


def check_pixels(width: int, height: int) -> None:
    """Raises DecompressionBombError for so many that they are taken for an attack."""
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise Image.DecompressionBombError(f"it claims {width}x{height} pixels, at most {most} are read")
