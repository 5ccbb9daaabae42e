"""PNGs of numbers: what an optimiser rewrote is read to the pixel, what is no number any more is refused."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from preprocessing.layouts import read_index
from preprocessing.png import SIGNATURE, read_gray
from preprocessing.rgb_ids import MAX_ID, encode, read_labels, read_png, write_png
from tests.support.odd_images import chunk, deep_png, encoded

RNG = np.random.default_rng(0)
REWRITTEN = Path(__file__).resolve().parents[3] / "shared/data/cases/26-palette-png"


def few_ids(*values: int) -> np.ndarray:
    return RNG.choice(np.array(values, np.int32), (40, 65))


def rewritten(ids: np.ndarray) -> dict[str, bytes]:
    """By name: the PNGs that hold the same colours in another way, as optimisers leave them."""
    rgb = Image.fromarray(encode(ids))
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    gray = rgb.convert("L")
    pictures = {
        "palette": (palette, {}),
        "palette of 4 bits": (palette, {"bits": 4}),
        "opaque palette": (palette, {"transparency": bytes([255] * 16)}),
        "opaque": (rgb.convert("RGBA"), {}),
        "colour key that no pixel has": (rgb, {"transparency": (9, 9, 8)}),
        **(
            {"gray": (gray, {}), "opaque gray": (gray.convert("LA"), {})}
            if (encode(ids) == encode(ids)[..., :1]).all()
            else {}
        ),
    }
    return {name: encoded(picture, "PNG", **options) for name, (picture, options) in pictures.items()}


@pytest.mark.parametrize("values", [(0, 7, 65536, MAX_ID), (0, 0x010101, 0x777777, MAX_ID)])
def test_what_an_optimiser_rewrote_is_read_to_the_pixel(values: tuple[int, ...]):
    ids = few_ids(*values)
    for name, data in rewritten(ids).items():
        assert np.array_equal(read_png(data), ids), name
        listed = np.array(values[1:], np.int32)
        for ours, theirs in zip(
            _flat(read_labels(data, listed)), _flat(read_labels(write_png(ids), listed)), strict=True
        ):
            assert np.array_equal(ours, theirs, equal_nan=True), name


def no_numbers() -> dict[str, tuple[bytes, str]]:
    """By name: PNGs whose colours a library would have to cut, scale or blend, and what they are called."""
    rgb = Image.fromarray(encode(few_ids(0, 1, 2)))
    clear = rgb.convert("RGBA")
    clear.putalpha(254)
    return {
        "16 bits": (deep_png(np.asarray(rgb)), "16-bit RGB"),
        "16 bits, opaque": (deep_png(np.asarray(rgb.convert("RGBA"))), "16-bit RGB with transparency"),
        "16-bit gray": (encoded(Image.new("I;16", (4, 4)), "PNG"), "16-bit gray"),
        "nearly opaque": (encoded(clear, "PNG"), "8-bit RGB with transparency with transparent pixels"),
        "clear palette": (encoded(rgb.quantize(4), "PNG", transparency=0), "2-bit palette with transparent pixels"),
        "colour key": (encoded(rgb, "PNG", transparency=(1, 0, 0)), "8-bit RGB with transparent pixels"),
        "gray ids": (encoded(Image.fromarray(few_ids(1, 2).astype(np.uint8)), "PNG"), "its grays are no ids"),
        "clear gray": (encoded(Image.new("LA", (4, 4)), "PNG"), "8-bit gray with transparency"),
    }


@pytest.mark.parametrize("name", no_numbers())
def test_what_is_no_number_any_more_is_refused_by_its_name(name: str):
    data, told = no_numbers()[name]
    with pytest.raises(ValueError, match=f"{told}.*expected 8-bit RGB"):
        read_labels(data, np.array([1, 2], np.int32))


GRAYS = np.array([[0, 17, 255], [34, 1, 17]], np.uint8)


def test_gray_is_read_as_the_numbers_that_were_written():
    gray = Image.fromarray(GRAYS)
    for picture in (gray, gray.convert("P"), gray.quantize(8), gray.convert("LA")):
        assert np.array_equal(read_gray(encoded(picture, "PNG")), GRAYS), picture.mode
    wide = GRAYS.astype(np.uint16) * 257
    assert np.array_equal(read_gray(encoded(Image.fromarray(wide), "PNG"), 16), wide)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grays_of_few_bits_mean_two_things(bits: int):
    header = struct.pack(">IIBBBBB", 8 // bits, 1, bits, 0, 0, 0, 0)
    data = SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\x1b")) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match=f"{bits}-bit gray, expected 8-bit gray"):
        read_gray(data)


def test_other_grays_are_refused_by_their_name():
    coloured = Image.fromarray(encode(few_ids(1, 2)))
    clear = Image.new("LA", (4, 4), (3, 0))
    for picture, told in (
        (coloured, "8-bit RGB"),
        (coloured.quantize(4), "palette of colours"),
        (clear, "transparent pixels"),
        (Image.new("I;16", (4, 4)), "16-bit gray, expected 8-bit gray"),
    ):
        with pytest.raises(ValueError, match=told):
            read_gray(encoded(picture, "PNG"))


@pytest.mark.skipif(not REWRITTEN.exists(), reason=f"needs {REWRITTEN}")
def test_a_coco_png_that_an_optimiser_rewrote_agrees_with_its_json():
    index = read_index(REWRITTEN, "val2017")
    assert [found.problem for found in index.records[0].examine(index.labels).defects] == []


def _flat(found: tuple[Any, tuple[Any, ...]]) -> Iterator[Any]:
    yield found[0]
    yield from found[1]
