"""What a reader's streams gave, as the keys of the images."""

from collections.abc import Iterator
from itertools import islice

from infra.store import Store
from preprocessing.shards import ShardSet
from training.batch import Batch
from training.reader import BatchStream, ReaderConfig

PLAIN = ReaderConfig(shuffle=3, flip=False)


def ids(shards: ShardSet) -> list[int]:
    return sorted(i for shard in shards.shards for i in shard.image_ids)


def keys(batches: Iterator[Batch], count: int) -> list[int]:
    return [int(key) for batch in islice(batches, count) for key in batch.keys]


def epochs(shards: ShardSet, store: Store, count: int, config: ReaderConfig = PLAIN, seed: int = 0) -> list[list[int]]:
    """The images of whole epochs of a single stream, in order."""
    found = keys(iter(BatchStream(shards, store.url, config, 1, seed=seed)), count * shards.samples)
    return [found[i : i + shards.samples] for i in range(0, len(found), shards.samples)]
