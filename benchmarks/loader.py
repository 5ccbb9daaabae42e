"""Reading shards, against plain files and webdataset: `python -m benchmarks.loader`.

Bars: reading and decoding all but the JPEG, from a folder and from S3 (SeaweedFS on loopback), against decoding the
JPEG. CPU time of this process on one core, all sides in turn in every round, order flipped; median of the rounds.
Scenes of 480x640 on a grid of 420x420, and COCO's where a small copy lies in ../shared/data/coco_mini. Everything is
in the page cache. Other lines bar nothing: what the parts cost, and samples/s of whole streams by the clock.
"""

import hashlib
import json
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow
import torch
import webdataset as wds

from benchmarks.bars import bar, finish
from infra.seaweed import seaweed
from infra.store import Store, open_store
from preprocessing.layouts import read_index
from preprocessing.panoptic_map import Segment
from preprocessing.sample import ARRAYS, decode_image, from_fields
from preprocessing.shard_reading import files_in, read_shard_samples
from preprocessing.shards import ShardConfig, ShardSet, commit, compute_shard, plan
from preprocessing.synthetic import SyntheticConfig, write_set
from training.reader import BatchStream, ReaderConfig, load_batches

CONFIG = ShardConfig(grid=(420, 420), samples=20)
COCO_MINI = Path(__file__).parents[2] / "shared" / "data" / "coco_mini"
SCENES, ROUNDS, BATCH, BATCHES = 40, 9, 16, 20
Side = Callable[[], Iterable[object]]


@dataclass(frozen=True)
class Data:
    """One data set as shards in a folder and on S3, and as loose files."""

    name: str
    shards: ShardSet
    folder: Store
    s3: Store
    files: tuple[dict[str, Path], ...]
    """Of each sample, by extension."""

    def ours(self, store: Store) -> Iterator[object]:
        for shard in self.shards.shards:
            yield from map(from_fields, read_shard_samples(store.url, shard))

    def loose(self) -> Iterator[object]:
        for sample in random.sample(self.files, len(self.files)):
            yield from_fields({extension: path.read_bytes() for extension, path in sample.items()})

    def webdataset(self) -> Iterator[object]:
        urls = [self.folder.url_for(shard.key) for shard in self.shards.shards]
        yield from map(from_fields, wds.WebDataset(urls, shardshuffle=False))

    def fields(self) -> list[dict[str, bytes]]:
        return [fields for shard in self.shards.shards for fields in read_shard_samples(self.folder.url, shard)]


def make_data(name: str, root: Path, work: Path, s3: Store) -> Data:
    folder, index = open_store(str(work / "store")), read_index(root, "train2017")
    planned = plan(folder, index, CONFIG)
    shards = [compute_shard(folder.url, job) for job in planned.jobs]
    for shard in shards:
        s3.write(shard.key, folder.read(shard.key))
    made = Data(name, commit(folder, planned, index, CONFIG, shards, 1.0), folder, s3, ())
    return replace(made, files=tuple(_loose_files(work / name, number, f) for number, f in enumerate(made.fields())))


def _loose_files(folder: Path, number: int, fields: dict[str, bytes]) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    paths = {extension: folder / f"{number:06d}.{extension}" for extension in fields}
    for extension, path in paths.items():
        path.write_bytes(fields[extension])
    return paths


def cpu_us(sides: dict[str, Side], samples: int) -> dict[str, float]:
    """Microseconds a sample of each side; its results are dropped one by one, as a stream's are."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            start = time.process_time()
            deque(sides[name](), maxlen=0)
            found[name].append(time.process_time() - start)
    return {name: 1e6 * median(seconds[1:]) / samples for name, seconds in found.items()}


def readers(data: Data) -> dict[str, float]:
    """All but the JPEG by every reader, and the JPEG."""
    images = [fields["jpg"] for fields in data.fields()]
    sides: dict[str, Side] = {
        "ours, folder": lambda: data.ours(data.folder),
        "ours, S3": lambda: data.ours(data.s3),
        "plain files, shuffled": data.loose,
        "webdataset, folder": data.webdataset,
        "decoding the JPEG": lambda: map(decode_image, images),
    }
    return cpu_us(sides, data.shards.samples)


def parts(data: Data) -> dict[str, float]:
    """What our reader spends its time on."""
    keys, samples = [shard.key for shard in data.shards.shards], data.fields()
    tars = list(map(data.folder.read, keys))
    codec = pyarrow.Codec("lz4")
    packed = [[(fields[f"{n}.lz4"], array.nbytes) for n, array in arrays_of(fields)] for fields in samples]
    rows = [json.loads(fields["json"])["segments"] for fields in samples]
    sides: dict[str, Side] = {
        "read, folder": lambda: map(data.folder.read, keys),
        "read, S3": lambda: map(data.s3.read, keys),
        "sha256": lambda: map(hashlib.sha256, tars),
        "tar": lambda: (file for tar in tars for file in files_in(tar, "")),
        "lz4": lambda: ([codec.decompress(array, size) for array, size in arrays] for arrays in packed),
        "json": lambda: (json.loads(fields["json"]) for fields in samples),
        "segments": lambda: (Segment(**row) for table in rows for row in table),
    }
    return cpu_us(sides, data.shards.samples)


def arrays_of(fields: dict[str, bytes]) -> list[tuple[str, np.ndarray]]:
    sample = from_fields(fields)
    return [(name, getattr(sample, name)) for name in ARRAYS if getattr(sample, name) is not None]


def report(title: str, found: dict[str, float]) -> None:
    print(title)
    for name, us in found.items():
        print(f"  {name:24}{us:8.0f} us/sample {1e6 / us:8.0f} samples/s a core")


def stream(data: Data, store: Store, workers: int) -> float:
    """Samples/s by the clock of batches as training gets them: the median of three stretches, after the first few."""
    config, rates = ReaderConfig(shuffle=64, workers=workers), list[float]()
    batches = load_batches(BatchStream(data.shards, store.url, config, BATCH))
    deque(islice(batches, 8), maxlen=0)
    for _ in range(3):
        start = time.perf_counter()
        deque(islice(batches, BATCHES), maxlen=0)
        rates.append(BATCH * BATCHES / (time.perf_counter() - start))
    return median(rates)


def measure(data: Data) -> None:
    found, samples = readers(data), data.fields()
    size = {name: sum(len(fields[name]) for fields in samples) / len(samples) / 1024 for name in samples[0]}
    print(f"{data.name}: {len(samples)} samples of", ", ".join(f"{name} {kib:.1f} KiB" for name, kib in size.items()))
    report("reading and decoding all but the JPEG", found)
    report("its parts", parts(data))
    for place, store in (("folder", data.folder), ("S3", data.s3)):
        for workers in (0, 2):
            print(f"stream, {place}, {workers} loader processes: {stream(data, store, workers):.0f} samples/s")
    for place in ("folder", "S3"):
        share = found[f"ours, {place}"] / found["decoding the JPEG"]
        bar(f"loader_{data.name}_{place.lower()}_share_of_jpeg", share, "at-most", 0.2)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, seaweed(Path(scratch, "s3"), "loader") as server:
        os.environ.update(server.environ())
        work, s3 = Path(scratch), open_store("s3://loader/bench")
        roots = {"scenes": write_set(work, SyntheticConfig(train=SCENES, val=1, size=(480, 640)))}
        roots |= {"coco": COCO_MINI} if COCO_MINI.exists() else {}
        for name, root in roots.items():
            measure(make_data(name, root, work, s3))
    finish()


if __name__ == "__main__":
    main()
