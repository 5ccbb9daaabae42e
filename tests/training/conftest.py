"""Shards of synthetic 32x32 scenes, made once and read by many tests."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.store import Store, open_store
from preprocessing.coco import read_index
from preprocessing.shards import ShardConfig, ShardSet
from preprocessing.source import Index, Record, read_sample
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.coco_folder import CocoFolder
from tests.support.shard_sets import make_set as make_any_set

# The processes that DataLoader forks need not import torch again.
multiprocessing.set_forkserver_preload(["training.reader"])

Maker = Callable[[Sequence[Record], int], ShardSet]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    root = write_set(tmp_path_factory.mktemp("scenes"), SyntheticConfig(train=60, val=1, size=(32, 32), seed=3))
    return read_index(root, "train2017")


def shard_set(store: Store, index: Index, samples: int) -> ShardSet:
    """A finished set of shards of `samples` images each, the last one what is left."""
    return make_any_set(store, index, ShardConfig(grid=(32, 32), radius=10, samples=samples))


@pytest.fixture(scope="session")
def shard_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("shards")))


@pytest.fixture
def make_set(shard_store: Store, index: Index) -> Maker:
    """Records and samples a shard -> the set, in `shard_store`."""
    return lambda records, samples: shard_set(shard_store, replace(index, records=tuple(records)), samples)


@pytest.fixture
def images_of_16(make_set: Maker, index: Index) -> ShardSet:
    """Four shards of four images."""
    return make_set(index.records[:16], 4)


@pytest.fixture
def odd_folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "run#1 {a,b}::50%20?" / "ü"))


@pytest.fixture(scope="session")
def of_all_kinds(tmp_path_factory: pytest.TempPathFactory, shard_store: Store) -> ShardSet:
    """Two shards of two images: void, crowds, and an image without things, its things made void."""
    root = write_set(tmp_path_factory.mktemp("all kinds"), SyntheticConfig(train=4, val=1, size=(32, 32), seed=3))
    folder, labels = CocoFolder(root), read_index(root, "train2017").labels
    stuff = {c.dataset_id for c in labels.categories if not c.is_thing}
    kept = {row["id"]: row["category_id"] for row in folder.rows(3) if row["category_id"] in stuff}
    ids = folder.ids(3)
    folder.redraw(3, np.where(np.isin(ids, list(kept)), ids, 0), kept)
    index = folder.index()
    truths = [read_sample(record, labels)[1] for record in index.records]
    assert any(segment.is_crowd for truth in truths for segment in truth.segments)
    assert [any(s.is_thing and not s.is_crowd for s in truth.segments) for truth in truths] == [True, True, True, False]
    assert all((truth.ids == 0).any() for truth in truths)
    return shard_set(shard_store, index, 2)
