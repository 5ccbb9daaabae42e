"""Precompute as Ray tasks: images/s of one worker and of two, by wall clock, alternately; memory of a worker.

`python -m benchmarks.ray_precompute`, on coco_mini where it is there, else on synthetic scenes of 480x640. Only
an idle machine with two cores says anything.
"""

import statistics
import tempfile
import time
from pathlib import Path

import ray

from benchmarks.bars import bar, finish
from infra import ray_cluster
from infra.store import open_store
from preprocessing.coco import read_index
from preprocessing.ray_precompute import Computed, compute
from preprocessing.shards import ShardConfig, plan
from preprocessing.source import Index
from preprocessing.synthetic import SyntheticConfig, write_set

COCO_MINI = Path(__file__).resolve().parents[2] / "shared/data/coco_mini"
CONFIG = ShardConfig(grid=(420, 420), radius=50, samples=5)
ROUNDS = 3


def run(index: Index, folder: Path, workers: int) -> tuple[float, int]:
    """Seconds for the whole index on a store that holds nothing, and the most memory of a worker."""
    store = open_store(tempfile.mkdtemp(dir=folder))
    jobs, done = plan(store, index, CONFIG).jobs, list[Computed]()
    started = time.perf_counter()
    ray_cluster.map_tasks(compute, ((store.url, job) for job in jobs), done.append, resources={f"of {workers}": 1})
    return time.perf_counter() - started, max(computed.peak_bytes for computed in done)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        root = COCO_MINI
        if not root.exists():
            root = write_set(folder, SyntheticConfig(train=100, val=1, size=(480, 640)))
        index = read_index(root, "train2017")
        ray.init(num_cpus=2, resources={"of 1": 1, "of 2": 2}, include_dashboard=False, log_to_driver=False)
        for workers in (2, 1):  # both workers load and compile
            run(index, folder, workers)
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(ROUNDS):
            for workers, taken in seconds.items():
                spent, peak = run(index, folder, workers)
                taken.append(spent)
        ray.shutdown()
    images = len(index.records)
    one, two = (statistics.median(seconds[workers]) for workers in (1, 2))
    print(f"{images} images of {root.name} to shards of {CONFIG.grid}, both distance maps")
    print(f"one worker {images / one:.1f} images/s, two {images / two:.1f}; a worker's peak {peak / 1e6:.0f} MB")
    bar("two_ray_workers", one / two, "at-least", 1.8)


if __name__ == "__main__":
    main()
    finish()
