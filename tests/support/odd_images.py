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


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(height: int, width: int, bits: int, colours: int, rows: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""
    return png(side, side, 8, 2, b"")


def deep_png(values: np.ndarray, *more: bytes) -> bytes:
    """16 bits a channel: (H, W) gray, or (H, W, C), C = 2 gray and alpha, 3 RGB, 4 RGBA; more: chunks before the
    pixels."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    channels = values.shape[2] if values.ndim == 3 else 1
    return png(*values.shape[:2], 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows, *more)


def tiff(values: np.ndarray, photometric: int, *more: tuple[int, int], order: str = "<") -> bytes:
    """An uncompressed TIFF of uint8 or uint16 (H, W) or (H, W, C); more: tags of one short each."""
    bits, channels = values.dtype.itemsize * 8, values.shape[2] if values.ndim == 3 else 1
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = {256: values.shape[1], 257: values.shape[0], 259: 1, 262: photometric, 273: 8, 277: channels}
    tags |= {278: values.shape[0], 284: 1, **dict(more)}
    start = 8 + len(data) + len(data) % 2
    bits_at = start + 2 + 12 * (len(tags) + 2) + 4
    entries = [(tag, 4 if tag == 273 else 3, 1, value) for tag, value in tags.items()]
    entries += [(258, 3, channels, bits if channels == 1 else bits_at), (279, 4, 1, len(data))]
    packed = b"".join(
        struct.pack(
            f"{order}HHIHH" if kind == 3 and n == 1 else f"{order}HHII",
            tag,
            kind,
            n,
            value,
            *([0] * (kind == 3 and n == 1)),
        )
        for tag, kind, n, value in sorted(entries)
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    ifd = struct.pack(f"{order}H", len(entries)) + packed + struct.pack(f"{order}I", 0)
    return head + data + bytes(len(data) % 2) + ifd + struct.pack(f"{order}{channels}H", *[bits] * channels)


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
