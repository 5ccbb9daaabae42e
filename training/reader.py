"""Shards -> batches, as a pure function of seed and step, whoever reads them.

Every epoch has its own order of shards. Its images, in that order, are cut into as many equal parts as there are
streams; each stream shuffles its part in a buffer and goes on into the next epoch by itself. So every image comes
once an epoch, uneven shards leave no worker without a batch, the images of a step are the same at any number of
workers, and any step can be reached again without reading what was skipped, but for a part of one epoch.
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
from preprocessing.opening import within_memory
from preprocessing.sample import from_fields
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import Shard, ShardSet
from training.augment import Crop, cropped
from training.batch import Batch, Example, collate
from training.shares import Plan


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """How the train shards are read."""

    shuffle: int = 512
    """Samples in the shuffle buffers of a step's streams together."""
    streams: int = 8
    """Most streams that a step's images are drawn from, and so the most training workers. Each keeps a shard open."""
    flip: bool = True
    """Mirror half of the samples left to right, at random."""
    crop: Crop | None = None
    """Scale and cut each image at random; None: images as they lie in the shards. With a crop distances are measured
    anew, so that the shards may hold images of any sizes and need no distances: ShardConfig(grid=None, radius=0)."""
    workers: int = 0
    """Reader processes per training worker; 0 reads in the training process. It says which images are in a step."""

    def __post_init__(self) -> None:
        if min(self.shuffle, self.streams) < 1 or self.workers < 0:
            raise TesseraError(
                f"reader: a shuffle buffer of {self.shuffle} samples, {self.streams} streams, {self.workers} processes"
            )

    def plan(self, batch: int, shards: int) -> Plan:
        """How batches of this size are drawn from so many shards."""
        return Plan.of(batch, self.streams, self.workers, shards)


class BatchStream(IterableDataset[Batch]):
    """One worker's share of every step, a batch a step, without end, from `start_step` on."""

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
        seed: int = 0,
        radius: int = 0,
    ) -> None:
        """batch: images of a step over all workers. seed: of the order of images, of flips and crops.

        radius: pixels up to which distances are measured after a crop, 0: none. Without a crop they are the shards'.
        Raises TesseraError where the workers cannot share the batch.
        """
        super().__init__()
        self.shards = tuple(shard for shard in shards.shards if shard.image_ids)
        if not self.shards:
            raise TesseraError(f"{open_store(store_url).url_for(shards.path)}: no images to train on")
        self.config, self.seed, self.start_step, self.radius = config, seed, start_step, radius
        self.plan = config.plan(batch, len(self.shards))
        self.streams = self.plan.share(rank, world, batch).streams
        self.processes = self.plan.phases if config.workers else 0
        self.store = open_store(store_url)

    def __iter__(self) -> Iterator[Batch]:
        """A DataLoader takes from its processes in turn: the i-th of as many as there are phases serves one phase."""
        info = get_worker_info()
        mine = range(self.plan.phases) if info is None else [info.id]
        firsts = [divmod(self.start_step + i, self.plan.phases) for i in mine]
        phases = [self._phase(phase, past) for past, phase in firsts]
        while True:
            yield from (next(phase) for phase in phases)

    def _phase(self, phase: int, past: int) -> Iterator[Batch]:
        """The steps of one phase, but for the first `past` of them."""
        images, every = self.plan.images, self.plan.streams * self.plan.phases
        numbers = [phase * self.plan.streams + stream for stream in self.streams]
        streams = [self._examples(number, every, past * images) for number in numbers]
        while True:
            yield collate([example for stream in streams for example in itertools.islice(stream, images)])

    def _examples(self, stream: int, streams: int, skip: int) -> Iterator[Example]:
        of_any_epoch = epoch_part(self.shards, self.seed, 0, stream, streams)
        past, skip = divmod(skip, sum(len(where) for _, where in of_any_epoch))
        for epoch in itertools.count(past):
            part = epoch_part(self.shards, self.seed, epoch, stream, streams)
            for fields in itertools.islice(self._shuffled(part, f"{self.seed} {epoch} {stream}"), skip, None):
                yield self._example(fields, epoch)
            skip = 0

    def _shuffled(self, part: list[tuple[Shard, range]], seed: str) -> Iterator[dict[str, bytes]]:
        raw = (
            fields
            for shard, where in part
            for fields in itertools.islice(read_shard_samples(self.store.url, shard), where.start, where.stop)
        )
        buffer = max(1, self.config.shuffle // self.plan.streams)
        return iter(wds.shuffle(buffer, initial=buffer, rng=random.Random(seed))(raw))

    def _example(self, fields: dict[str, bytes], epoch: int) -> Example:
        sample = from_fields(fields)
        rng = np.random.default_rng([self.seed, epoch, sample.image_id])
        with within_memory(f"image {sample.image_id}, {sample.file_name}"):
            example = Example.of(f"{sample.image_id:012d}", sample)
            if rng.random() < 0.5 and self.config.flip:
                example = example.flipped()
            if self.config.crop is None:
                return example
            return cropped(example, self.config.crop, rng, self.radius)  # last, so that padding stays where it is


def epoch_part(
    shards: tuple[Shard, ...], seed: int, epoch: int, stream: int, streams: int
) -> list[tuple[Shard, range]]:
    """One stream's part of an epoch, as shards and positions in them: disjoint between streams, together all images.

    It has as many images in every epoch.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(shards))
    ends = np.cumsum([0, *(len(shards[i].image_ids) for i in order)])
    first, last = (int(ends[-1]) * (stream + i) // streams for i in (0, 1))
    part = []
    for i, start in zip(order, ends[:-1].tolist(), strict=True):
        shard = shards[i]
        where = range(max(first - start, 0), min(last - start, len(shard.image_ids)))
        if where:
            part.append((shard, where))
    return part


def load_batches(stream: BatchStream) -> Iterator[Batch]:
    """Iterate over a stream, in processes where its config wants any."""
    workers = stream.processes
    context = "forkserver" if workers else None  # forking a process that runs Ray's threads can hang
    pin = torch.cuda.is_available()
    return iter(
        DataLoader(stream, batch_size=None, num_workers=workers, multiprocessing_context=context, pin_memory=pin)
    )
