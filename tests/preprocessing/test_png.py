"""`read_labels` against Pillow: whatever the PNG, the same map or an error."""

import itertools
import json
import struct
import zlib
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from infra.errors import TesseraError
from preprocessing.kernels import UNKNOWN, measure
from preprocessing.png import SIGNATURE, rgb_scanlines
from preprocessing.rgb_ids import MAX_ID, encode, read_labels, read_png, write_png

RNG = np.random.default_rng(0)
MASKS = Path(__file__).resolve().parents[3] / "shared/data/coco_mini/annotations/panoptic_val2017"
DAMAGE = (OSError, SyntaxError, ValueError)


def regions(size: tuple[int, int], segments: int) -> np.ndarray:
    """Ids of wavy regions, the first of them void; int32 (H, W)."""
    ys, xs = np.mgrid[: size[0], : size[1]]
    seeds = RNG.random((segments, 2)) * size
    wavy = ys + 3 * np.sin(xs / 5)
    nearest = np.argmin([(wavy - y) ** 2 + (xs - x) ** 2 for y, x in seeds], axis=0)
    ids = 1 + RNG.choice(MAX_ID, segments, replace=False)
    ids[:2] = 0, MAX_ID
    return ids[nearest].astype(np.int32)


MAPS = {
    "regions": regions((61, 83), 12),
    "400 segments": regions((70, 100), 400),
    "noise": RNG.integers(0, MAX_ID, (23, 37), np.int32),
    "few ids": RNG.choice(np.array([0, 255, 256, 65535, 65536, MAX_ID], np.int32), (40, 65)),
    "one row": regions((1, 200), 9),
    "one column": regions((200, 1), 9),
    "one pixel": np.array([[77]], np.int32),
    "all void": np.zeros((33, 64), np.int32),
    "one segment": np.full((33, 96), MAX_ID, np.int32),
}


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(size: tuple[int, int], packed: bytes, pieces: int = 1, layout: bytes = b"\x08\x02\0\0\0") -> bytes:
    header = chunk(b"IHDR", struct.pack(">II", size[1], size[0]) + layout)
    cuts = [len(packed) * i // pieces for i in range(pieces + 1)]
    data = b"".join(chunk(b"IDAT", packed[a:b]) for a, b in itertools.pairwise(cuts))
    return SIGNATURE + header + chunk(b"tEXt", b"a comment") + data + chunk(b"IEND", b"")


def filtered(rgb: np.ndarray, kinds: Iterable[int]) -> bytes:
    """The scanlines of a PNG, row by row with the given filters, as its specification has them."""
    wide = np.zeros((rgb.shape[0] + 1, rgb.shape[1] + 1, 3), int)
    wide[1:, 1:] = rgb
    lines = []
    for y, kind in zip(range(rgb.shape[0]), kinds, strict=False):
        left, above, corner = wide[y + 1, :-1], wide[y, 1:], wide[y, :-1]
        estimate = left + above - corner
        far = np.abs([estimate - left, estimate - above, estimate - corner])
        paeth = np.choose(far.argmin(0), [left, above, corner])
        guess = [np.zeros_like(left), left, above, (left + above) // 2, paeth][kind]
        lines.append(bytes([kind]) + ((wide[y + 1, 1:] - guess) % 256).astype(np.uint8).tobytes())
    return b"".join(lines)


def with_filters(ids: np.ndarray, kinds: Iterable[int], pieces: int = 1) -> bytes:
    return png(ids.shape, zlib.compress(filtered(encode(ids), kinds)), pieces)


def interlaced(ids: np.ndarray) -> bytes:
    """Adam7: seven small images one after the other."""
    rgb, passes = encode(ids), [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2)]
    parts = [rgb[y::dy, x::dx] for y, dy, x, dx in [*passes, (1, 2, 0, 1)]]
    lines = b"".join(filtered(part, [4] * len(part)) for part in parts if part.size)
    return png(ids.shape, zlib.compress(lines), layout=b"\x08\x02\0\0\x01")


def check(data: bytes, listed: np.ndarray) -> None:
    """The labels are those that Pillow's ids say, and so are all measures."""
    labels, measures = read_labels(data, listed)
    ids = read_png(data)
    expected = np.where(ids == 0, 0, UNKNOWN)
    for label, value in enumerate(listed, start=1):
        expected[ids == value] = label
    assert labels.dtype == np.uint16
    assert np.array_equal(labels, expected)
    known = np.where(labels == UNKNOWN, listed.size + 1, labels).astype(np.uint16)
    for ours, theirs in zip(measures, measure(known, listed.size + 1), strict=True):
        assert np.array_equal(ours, theirs[:-1], equal_nan=True)
    assert (measures[0].sum() < ids.size) == (labels == UNKNOWN).any()


def some_ids(ids: np.ndarray) -> np.ndarray:
    """Three quarters of the map's ids, in random order, and one that it lacks."""
    present = RNG.permutation(np.setdiff1d(ids, [0]))
    return np.append(present[: (3 * present.size + 3) // 4], 123_456).astype(np.int32)


@pytest.mark.parametrize("kind", [*range(5), "mixed"])
@pytest.mark.parametrize("name", MAPS)
def test_every_filter_is_undone(name: str, kind: int | str):
    ids = MAPS[name]
    kinds = RNG.integers(0, 5, len(ids)).tolist() if kind == "mixed" else [kind] * len(ids)
    data = with_filters(ids, kinds, pieces=3)
    assert np.array_equal(read_png(data), ids)
    check(data, some_ids(ids))


@pytest.mark.parametrize("write", [write_png, interlaced], ids=["Pillow", "interlaced"])
@pytest.mark.parametrize("name", MAPS)
def test_maps_as_others_write_them(name: str, write: Callable[[np.ndarray], bytes]):
    data = write(MAPS[name])
    assert np.array_equal(read_png(data), MAPS[name])
    assert (rgb_scanlines(data) is None) == (write is interlaced)
    check(data, some_ids(MAPS[name]))


@settings(max_examples=100, deadline=None)
@given(
    arrays(np.int32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.sampled_from([0, 1, 300, MAX_ID])),
    st.lists(st.integers(0, 4), min_size=40, max_size=40),
)
def test_any_map_with_any_filters(ids: np.ndarray, kinds: list[int]):
    check(with_filters(ids, kinds), np.array([MAX_ID, 1], np.int32))


def test_centroids_are_the_means_of_the_pixels():
    ids = MAPS["regions"]
    listed = np.setdiff1d(ids, [0]).astype(np.int32)
    centroid = read_labels(write_png(ids), listed)[1][2]
    for label, value in enumerate(listed, start=1):
        ys, xs = np.nonzero(ids == value)
        exact = Fraction(int(xs.sum()), xs.size), Fraction(int(ys.sum()), ys.size)
        assert max(abs(Fraction(c) - e) for c, e in zip(centroid[label].tolist(), exact, strict=True)) < 1e-9


@pytest.mark.skipif(not MASKS.is_dir(), reason=f"{MASKS} is not there")
def test_real_maps():
    rows = json.loads(MASKS.with_suffix(".json").read_text())["annotations"]
    for row in rows[:12]:
        listed = np.array([s["id"] for s in row["segments_info"]], np.int32)
        check((MASKS / row["file_name"]).read_bytes(), listed)


def test_too_many_segments_are_refused():
    with pytest.raises(TesseraError, match="at most 65534"):
        read_labels(write_png(MAPS["one pixel"]), np.arange(1, UNKNOWN + 1, dtype=np.int32))


def test_a_table_without_segments_leaves_void_and_unknown():
    labels, (area, *_) = read_labels(write_png(np.array([[0, 5]], np.int32)), np.empty(0, np.int32))
    assert labels.tolist() == [[0, UNKNOWN]]
    assert area.tolist() == [1]


WHOLE = write_png(MAPS["regions"])
RAW = filtered(encode(MAPS["regions"]), [4] * 61)
SIZE = (61, 83)
DAMAGED = {
    "empty": (b"", "not a PNG"),
    "another format": (b"GIF89a" + WHOLE, "not a PNG"),
    "signature only": (SIGNATURE, "cut short"),
    "no header": (SIGNATURE + chunk(b"IEND", b""), "header"),
    "short header": (SIGNATURE + chunk(b"IHDR", b"\0" * 12) + chunk(b"IEND", b""), "header"),
    "no width": (png((61, 0), zlib.compress(RAW)), "0x61"),
    "no height": (png((0, 83), zlib.compress(RAW)), "83x0"),
    "no pixels": (png(SIZE, b""), "damaged"),
    "no end": (WHOLE[:-12], "cut short"),
    "half": (WHOLE[: len(WHOLE) // 2], "cut short"),
    "length": (WHOLE[:33] + b"\xff" + WHOLE[34:], "cut short"),
    "checksum": (WHOLE[:29] + bytes([WHOLE[29] ^ 1]) + WHOLE[30:], "IHDR.*wrong checksum"),
    "adler": (png(SIZE, zlib.compress(RAW)[:-1] + b"\0"), "damaged"),
    "too few rows": (png(SIZE, zlib.compress(RAW[:-1])), "needed"),
    "too many rows": (png(SIZE, zlib.compress(RAW + b"\0")), "too long"),
    "bomb": (png(SIZE, zlib.compress(bytes(10**7))), "too long"),
    "filter": (png(SIZE, zlib.compress(b"\5" + RAW[1:])), "unknown filter"),
    "garbage": (png(SIZE, RNG.bytes(500)), "damaged"),
    "appendix": (WHOLE + b"\0", "1 bytes follow"),
    "huge": (png((2**31 - 1, 2**31 - 1), zlib.compress(RAW)), "2147483647x2147483647"),
    "too large": (png((20_000, 20_000), zlib.compress(RAW)), "20000x20000"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name: str):
    data, text = DAMAGED[name]
    with pytest.raises(ValueError, match=text):
        read_labels(data, np.array([1], np.int32))


def pillows(data: bytes) -> np.ndarray | None:
    """Ids by Pillow, None where it refuses."""
    try:
        return read_png(data)
    except (*DAMAGE, Image.DecompressionBombError):
        return None


def mended(data: bytes) -> bytes:
    """With all checksums of chunks made right, so that damage reaches what lies behind them."""
    start, parts = len(SIGNATURE), [data[: len(SIGNATURE)]]
    while start + 12 <= len(data):
        length = int.from_bytes(data[start : start + 4])
        parts.append(chunk(data[start + 4 : start + 8], data[start + 8 : start + 8 + length]))
        start += 12 + length
    return b"".join(parts)


def broken_files(number: int, ids: np.ndarray) -> bytes:
    """One map with any filter, a few bits flipped or the rest cut off; every other one with checksums made right."""
    data = bytearray(with_filters(ids, [number // 4 % 5] * len(ids), pieces=1 + number % 3))
    for at in RNG.integers(8 if number % 2 else 0, len(data), RNG.integers(0, 4)):
        data[at] ^= 1 << RNG.integers(0, 8)
    broken = bytes(data[: RNG.integers(0, len(data))] if number % 7 == 0 else data)
    return mended(broken) if number % 2 else broken


def test_damaged_files_give_an_error_or_pillows_map(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # a flipped bit may make any size
    read = 0
    for number in range(4000):
        ids = MAPS[("regions", "few ids", "one row", "one pixel")[number % 4]]
        data, listed = broken_files(number, ids), some_ids(ids)
        try:
            read_labels(data, listed)
        except DAMAGE:
            continue
        check(data, listed)
        read += 1
    assert read > 500
