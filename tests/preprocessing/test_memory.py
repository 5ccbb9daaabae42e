"""Memory while reading one sample: so many bytes a pixel at most, whatever it holds; what is above is its own fault."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

from evaluation.images import read_image
from preprocessing.ade20k import ChallengeRecord, categories
from preprocessing.cityscapes import CATEGORIES, CityscapesRecord
from preprocessing.coco import CocoRecord
from preprocessing.files import File
from preprocessing.instances import InstancesRecord
from preprocessing.labels import Category, LabelTable
from preprocessing.opening import MOST_BYTES_A_PIXEL
from preprocessing.sample import make_sample
from preprocessing.source import BadSample, Record
from tests.support.hostile import most_grown, write_coco
from tests.support.odd_images import png

SIDE = 1800
PIXELS = SIDE * SIDE
"""Enough that what is there once, whatever the size, is small beside it."""
SLACK = 24 << 20
LABELS = LabelTable((Category(2, "a", True, (1, 2, 3)), Category(1, "b", False, (1, 2, 4))))


def square(bits: int, colours: int, channels: int, noise: bool, side: int) -> bytes:
    length = side * channels * bits // 8
    rng = np.random.default_rng(0)
    rows = (rng.integers(0, 256, length, np.uint8).tobytes() if noise else bytes([1]) * length for _ in range(side))
    return png(side, side, bits, colours, b"".join(b"\0" + row for row in rows))


def records(folder: Path, side: int) -> dict[str, tuple[Record, LabelTable]]:
    kinds = {"plain": (8, 2, 3), "deep": (16, 2, 3), "clear": (16, 6, 4), "gray": (8, 0, 1), "wide": (16, 0, 1)}
    files = {}
    for name, (bits, colours, channels) in kinds.items():
        for noise in (False, True):
            path = folder / f"{name}{'-noise' if noise else ''}.png"
            path.write_bytes(square(bits, colours, channels, noise, side))
            files[path.stem] = File(str(path))
    size, many = (side, side), 300
    rows = [
        {"id": i, "category_id": 2, "segmentation": {"size": [*size], "counts": [i, 100, side * side - 100 - i]}}
        for i in range(many)
    ]
    known = ({"id": 65793, "category_id": 1},)
    return {
        "one unlisted id": (CocoRecord(1, files["plain"], size, files["plain"], ()), LABELS),
        "millions of unlisted ids": (CocoRecord(1, files["plain"], size, files["plain-noise"], ()), LABELS),
        "16-bit colours": (CocoRecord(1, files["deep-noise"], size, files["plain"], known), LABELS),
        "16-bit colours and transparency": (CocoRecord(1, files["clear-noise"], size, files["plain"], known), LABELS),
        "nothing odd": (CocoRecord(1, files["plain-noise"], size, files["plain"], known), LABELS),
        "wrong ids of Cityscapes": (CityscapesRecord(1, files["plain"], None, files["wide-noise"]), CATEGORIES),
        "wrong classes of ADE20K": (
            ChallengeRecord(1, files["plain"], None, files["gray-noise"], files["plain-noise"]),
            categories(),
        ),
        f"{many} masks": (InstancesRecord(1, files["plain"], size, files["gray"], json.dumps(rows)), LABELS),
    }


def act(record: Record, labels: LabelTable) -> None:
    try:
        make_sample(record, labels, None, 8)
    except BadSample:
        return


def act_for_users(record: Record) -> None:
    read_image(record.image.read())


def test_no_sample_takes_more_than_its_pixels_allow(tmp_path: Path):
    for side, most in ((16, None), (SIDE, PIXELS * MOST_BYTES_A_PIXEL)):  # small ones first, which compile
        folder = tmp_path / str(side)
        folder.mkdir()
        for name, (record, labels) in records(folder, side).items():
            files = record.image.size() + sum(mask.size() for mask in record.masks)
            for do in (partial(act, record, labels), partial(act_for_users, record)):
                grown = most_grown(do)
                told = f"{name}: {grown / PIXELS:.1f} bytes a pixel"
                assert most is None or grown < most + files + SLACK, told


def test_what_does_not_fit_is_its_own_fault(tmp_path: Path):
    coco = write_coco(tmp_path)
    huge = square(8, 2, 3, False, 6000)
    coco.image(0).write_bytes(huge)
    coco.mask(0).write_bytes(huge)
    with coco.editing() as content:
        content["images"][0] |= {"height": 6000, "width": 6000}
    found = subprocess.run(
        [sys.executable, "-m", "tests.support.little_room", str(coco.root)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    told = json.loads(found.stdout)
    assert told.pop("the next one") == []
    assert len(told["precompute"]) == 1
    assert "000000000001" in told["precompute"][0]
    assert "000000000001" in told["evaluate files"]
    assert told["training"].startswith("image 1, 1.png: ")
    for reader, text in told.items():
        assert "not enough memory for it (up to 89478485 pixels" in str(text), reader
