"""Shards -> batches, as a pure function of seed, step and place in the world.

Every epoch has its own order of shards, the same on every rank; reader r of R takes every R-th of them and
shuffles its samples in a buffer. A reader goes on into the next epoch by itself, so uneven shards cannot
leave a rank without a batch, and any step can be reached again without reading what was skipped, but for a
part of one epoch.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from infra.errors import TesseraError
from infra.store import open_store
from preprocessing.sample import from_fields
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import Shard, ShardSet
from training.augment import Crop, cropped
from training.batch import Batch, Example, collate


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """How the train shards are read."""

    seed: int = 0
    shuffle: int = 512
    """Samples in a reader's shuffle buffer."""
    flip: bool = True
    """Mirror half of the samples left to right, at random."""
    crop: Crop | None = None
    """Scale and cut each image at random; None: images as they lie in the shards. With a crop distances are measured
    anew, so that the shards may hold images of any sizes and need no distances: ShardConfig(grid=None, radius=0)."""
    workers: int = 0
    """Reader processes per training worker; 0 reads in the training process."""

    def __post_init__(self) -> None:
        if self.shuffle < 1 or self.workers < 0:
            raise TesseraError(f"reader: a shuffle buffer of {self.shuffle} samples, {self.workers} processes")

    def refuse_few_shards(self, shards: int, world: int) -> None:
        """Raise TesseraError where some reader of `world` training workers would have no shard."""
        readers = max(1, self.workers)
        if shards < world * readers:
            raise TesseraError(
                f"reader: {shards} shards for {world * readers} readers ({world} training workers x {readers}); use "
                "fewer workers or smaller shards (shards.samples)"
            )


class BatchStream(IterableDataset[Batch]):
    """The endless batches of one rank, from `start_step` on."""

    def __init__(
        self,
        shards: ShardSet,
        store_url: str,
        config: ReaderConfig,
        batch: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        *,
        radius: int = 0,
    ) -> None:
        """radius: pixels up to which distances are measured after a crop, 0: none. Without a crop they are the shards'.

        Raises TesseraError for fewer shards than readers.
        """
        super().__init__()
        self.shards, self.config, self.batch = shards.shards, config, batch
        self.rank, self.start_step, self.radius = rank, start_step, radius
        self.store = open_store(store_url)
        self.per_rank = max(1, config.workers)
        self.readers = world * self.per_rank
        config.refuse_few_shards(len(self.shards), world)

    def __iter__(self) -> Iterator[Batch]:
        """Worker w of a DataLoader serves every per_rank-th step, so after a resume they change places."""
        info = get_worker_info()
        worker = ((info.id if info else 0) + self.start_step) % self.per_rank
        skipped = len(range(worker, self.start_step, self.per_rank))
        examples = self._examples(self.rank * self.per_rank + worker, skipped * self.batch)
        while True:
            yield collate(list(itertools.islice(examples, self.batch)))

    def _examples(self, reader: int, skip: int) -> Iterator[Example]:
        for epoch in itertools.count():
            shards = epoch_shards(self.shards, self.config.seed, epoch, reader, self.readers)
            samples = sum(len(shard.image_ids) for shard in shards)
            if skip >= samples:
                skip -= samples
                continue
            for fields in itertools.islice(self._shuffled(shards, epoch, reader), skip, None):
                yield self._example(fields, epoch)
            skip = 0

    def _shuffled(self, shards: list[Shard], epoch: int, reader: int) -> Iterator[dict[str, bytes]]:
        raw = (fields for shard in shards for fields in read_shard_samples(self.store.url, shard))
        rng = random.Random(f"{self.config.seed} {epoch} {reader}")
        return iter(wds.shuffle(self.config.shuffle, initial=self.config.shuffle, rng=rng)(raw))

    def _example(self, fields: dict[str, bytes], epoch: int) -> Example:
        sample = from_fields(fields)
        rng = np.random.default_rng([self.config.seed, epoch, sample.image_id])
        example = Example.of(f"{sample.image_id:012d}", sample)
        if rng.random() < 0.5 and self.config.flip:
            example = example.flipped()
        if self.config.crop is None:
            return example
        return cropped(example, self.config.crop, rng, self.radius)  # last, so that padding stays where it is


def epoch_shards(shards: tuple[Shard, ...], seed: int, epoch: int, reader: int, readers: int) -> list[Shard]:
    """The shards of one reader in one epoch: disjoint between readers, together all of them."""
    order = np.random.default_rng([seed, epoch]).permutation(len(shards))
    return [shards[i] for i in order[reader::readers]]


def load_batches(stream: BatchStream) -> Iterator[Batch]:
    """Iterate over a stream, in `config.workers` processes where it wants any."""
    workers = stream.config.workers
    context = "forkserver" if workers else None  # forking a process that runs Ray's threads can hang
    pin = torch.cuda.is_available()
    return iter(
        DataLoader(stream, batch_size=None, num_workers=workers, multiprocessing_context=context, pin_memory=pin)
    )
