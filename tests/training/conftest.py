"""Shards of synthetic 32x32 scenes, made once and read by many tests."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infra.store import Store, open_store
from preprocessing.coco import CocoIndex, CocoRecord, read_index, read_sample
from preprocessing.shards import ShardConfig, ShardSet, commit, compute_shard, plan, set_path
from preprocessing.synthetic import SyntheticConfig, write_set

# The processes that DataLoader forks need not import torch again.
multiprocessing.set_forkserver_preload(["training.reader"])

Maker = Callable[[Sequence[CocoRecord], int], ShardSet]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> CocoIndex:
    root = write_set(tmp_path_factory.mktemp("scenes"), SyntheticConfig(train=60, val=1, size=(32, 32), seed=3))
    return read_index(root, "train2017")


def shard_set(store: Store, index: CocoIndex, samples: int) -> ShardSet:
    """A finished set of shards of `samples` images each, the last one what is left."""
    config = ShardConfig(grid=(32, 32), radius=10, samples=samples)
    jobs = plan(index, config)
    shards = [compute_shard(store.url, job) for job in jobs]
    return commit(store, set_path(index, config, jobs), index, config, shards, 0)


@pytest.fixture(scope="session")
def shard_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("shards")))


@pytest.fixture
def make_set(shard_store: Store, index: CocoIndex) -> Maker:
    """Records and samples a shard -> the set, in `shard_store`."""
    return lambda records, samples: shard_set(shard_store, replace(index, records=tuple(records)), samples)


@pytest.fixture
def images_of_16(make_set: Maker, index: CocoIndex) -> ShardSet:
    """Four shards of four images."""
    return make_set(index.records[:16], 4)


@pytest.fixture
def odd_folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "run#1 {a,b}::50%20?" / "ü"))


@pytest.fixture
def labelled_throughout(make_set: Maker, index: CocoIndex) -> ShardSet:
    """Two shards of two images, each with things and without void or crowd."""
    chosen = []
    for record in index.records:
        truth = read_sample(record, index.labels)[1]
        if truth.ids.all() and any(s.is_thing for s in truth.segments) and not any(s.is_crowd for s in truth.segments):
            chosen.append(record)
    assert len(chosen) >= 4
    return make_set(chosen[:4], 2)
