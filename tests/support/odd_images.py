"""Pictures as users have them, written where a test wants them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def scene(height: int = 30, width: int = 40) -> Image.Image:
    """Red left of green, darker downwards, so that every turn of it can be told."""
    rgb_HW3 = np.zeros((height, width, 3), np.uint8)
    rgb_HW3[:, : width // 2, 0] = np.linspace(255, 100, height)[:, None]
    rgb_HW3[:, width // 2 :, 1] = np.linspace(255, 100, height)[:, None]
    return Image.fromarray(rgb_HW3)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_jpeg(orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(scene(), "JPEG", quality=95, exif=exif)


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def readable() -> dict[str, bytes]:
    """By file name."""
    alpha = scene().convert("RGBA")
    alpha.putalpha(128)
    deep = Image.fromarray((np.arange(1200, dtype=np.uint16) * 54).reshape(30, 40))
    frames = [scene(), scene().rotate(180)]
    return {
        "plain.jpg": encoded(scene(), "JPEG"),
        "turned.JPG": rotated_jpeg(),
        "gray.png": encoded(scene().convert("L"), "PNG"),
        "palette.png": encoded(scene().quantize(8), "PNG"),
        "alpha.png": encoded(alpha, "PNG"),
        "cmyk.jpeg": encoded(scene().convert("CMYK"), "JPEG"),
        "deep.png": encoded(deep, "PNG"),
        "bits.png": encoded(scene().convert("1"), "PNG"),
        "float.tif": encoded(scene().convert("F"), "TIFF"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "pages.tiff": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "small.webp": encoded(scene(), "WEBP", lossless=True),
        "one.png": encoded(scene(1, 2).crop((0, 0, 1, 1)), "PNG"),
        "sub folder/wide.png": encoded(scene(2, 9000), "PNG"),
        "sub folder/naïve ünïcode.bmp": encoded(scene(), "BMP"),
    }


def unreadable() -> dict[str, tuple[bytes, str]]:
    """By file name: bytes, and what is to be said of them."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    jpeg, png = encoded(noise, "JPEG"), encoded(noise, "PNG")
    return {
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"<html>404 not found</html>", "no image of a kind that is read here: JPEG, PNG"),
        "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "no image of a kind"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "zeros.jpg": (jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2), "ends in zeros"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "flipped.png": (png[:60] + b"\xff\xff\xff\xff" + png[64:], "damaged image"),
        "bomb.png": (bomb(), "more pixels than the 89478485 that are read"),
        "bomb_half.png": (bomb(11_000), "more pixels than"),
        "nan.tif": (encoded(Image.fromarray(np.full((3, 3), np.nan, np.float32)), "TIFF"), "not finite"),
        "figure.eps": (encoded(scene(), "EPS"), "no image of a kind"),
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder
