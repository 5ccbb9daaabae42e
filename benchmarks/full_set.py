"""What precompute would take for whole data sets: `python -m benchmarks.full_set` prints the table of docs/data.md.

Measured here on one core: CPU time and bytes a sample, and the driver's memory a record; the rest is multiplication.
COCO: 40 images of coco_mini on a grid of 420x420. Cityscapes: mosaics of the same images, 2048x1024, as PNGs with
16-bit instance ids, kept at their own size. ADE20K is taken as COCO with 1.4 times its pixels in the source.
"""

import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from preprocessing.layouts import read_index
from preprocessing.sample import make_sample, to_fields
from preprocessing.source import Index, read_sample

COCO_MINI = Path(__file__).parents[2] / "shared" / "data" / "coco_mini"
SAMPLES, MOSAICS = 40, 6
SHARD = 128
DOLLARS_A_CORE_HOUR, DOLLARS_A_GB_MONTH, DOLLARS_A_PUT = 0.04, 0.023, 5e-6
"""Assumptions, near what clouds ask."""


@dataclass(frozen=True)
class Cost:
    """Of one sample."""

    seconds: float
    """CPU, with reading the source and packing the result, without the store."""
    stored: float
    """Bytes in the shard."""
    read: float
    """Bytes of the source."""


def cost(index: Index, grid: tuple[int, int] | None, samples: int) -> Cost:
    records = index.records[:samples]
    to_fields(make_sample(records[0], index.labels, grid, 50))  # compiles
    started, stored = time.process_time(), 0
    for record in records:
        stored += sum(map(len, to_fields(make_sample(record, index.labels, grid, 50)).values())) + 4 * 1024
    seconds = time.process_time() - started
    read = sum(file.size() for record in records for file in (record.image, *record.masks))
    return Cost(seconds / samples, stored / samples, read / samples)


def write_mosaics(root: Path, index: Index) -> None:
    """Two rows of three images each, in Cityscapes' layout; the ids are those of cars, of many instances."""
    for folder in ("leftImg8bit/train/mosaic", "gtFine/train/mosaic"):
        (root / folder).mkdir(parents=True)
    for number in range(MOSAICS):
        rgb = np.zeros((1024, 2048, 3), np.uint8)
        ids = np.zeros((1024, 2048), np.uint16)
        for place in range(6):
            record = index.records[6 * number + place]
            _, truth = read_sample(record, index.labels)
            y, x = 512 * (place // 3), 682 * (place % 3)
            with Image.open(record.image.path) as picture:
                rgb[y : y + 512, x : x + 682] = picture.convert("RGB").resize((682, 512), Image.Resampling.BICUBIC)
            part = np.asarray(Image.fromarray(truth.ids.astype(np.uint16)).resize((682, 512), Image.Resampling.NEAREST))
            ids[y : y + 512, x : x + 682] = np.where(part, 26000 + 60 * place + part % 60, 7)
        stem = f"mosaic_{number:06d}_000000"
        Image.fromarray(rgb).save(root / f"leftImg8bit/train/mosaic/{stem}_leftImg8bit.png")
        Image.fromarray(ids).save(root / f"gtFine/train/mosaic/{stem}_gtFine_instanceIds.png")


def memory_a_record() -> float:
    """Bytes that the driver holds for each record of a COCO index."""
    tracemalloc.start()
    index = read_index(COCO_MINI, "train2017")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return held / len(index.records)


def row(name: str, images: int, one: Cost, pixels: float = 1.0) -> str:
    hours, gigabytes, shards = images * one.seconds * pixels / 3600, images * one.stored / 1e9, -(-images // SHARD)
    money = hours * DOLLARS_A_CORE_HOUR + 2 * shards * DOLLARS_A_PUT
    monthly = gigabytes * DOLLARS_A_GB_MONTH
    source = images * one.read * pixels / 1e9
    cells: Sequence[str] = (
        name, f"{images:,}", f"{1e3 * one.seconds * pixels:.1f}", f"{source:,.0f}", f"{gigabytes:,.0f}", f"{shards:,}",
        f"{hours:,.2f}", f"{money:,.2f}", f"{monthly:,.2f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    if not COCO_MINI.exists():
        print(f"{COCO_MINI} is not there: nothing to extrapolate from")
        return
    index = read_index(COCO_MINI, "train2017")
    coco = cost(index, (420, 420), SAMPLES)
    with tempfile.TemporaryDirectory() as scratch:
        write_mosaics(Path(scratch), index)
        city = cost(read_index(scratch, "train", "cityscapes"), None, MOSAICS)
    print("| set | images | CPU ms an image | source GB | shards GB | shards | core-hours | $ once | $ a month |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    print(row("COCO train2017, 420x420", 118_287, coco))
    print(row("Cityscapes train, 2048x1024", 2_975, city))
    print(row("ADE20K training, 420x420", 20_210, coco, 1.4))
    print(row("100 million images like COCO's", 100_000_000, coco))
    print(f"the driver holds {memory_a_record() / 1e3:.1f} kB for each image")


if __name__ == "__main__":
    main()
