"""Who takes which images of a step, exactly: the same images at any number of workers."""

from dataclasses import dataclass
from itertools import accumulate

from infra.errors import TesseraError


@dataclass(frozen=True)
class Share:
    """One worker's part of every step."""

    streams: tuple[int, ...]
    """Those that it draws from."""
    passes: tuple[int, ...]
    """Images of each of its forward and backward passes."""

    @property
    def images(self) -> int:
        """Its images of a step."""
        return sum(self.passes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The images of each pass among its own."""
        ends = list(accumulate(self.passes))
        return tuple(slice(end - images, end) for images, end in zip(self.passes, ends, strict=True))


@dataclass(frozen=True)
class Plan:
    """How the images of a run's steps are drawn: every stream gives the same number of images to each step.

    It knows nothing of workers, so a run's batches do not depend on their number: it may change in the middle.
    """

    batch: int
    """Images of a step, over all workers."""
    streams: int
    """What a step draws from: the most workers."""
    phases: int
    """Steps take turns among so many sets of streams, so that as many processes can prepare whole steps."""

    @classmethod
    def of(cls, batch: int, streams: int, processes: int, shards: int) -> "Plan":
        """The finest plan of at most `streams` streams, that divide the batch, and at least one shard for each."""
        phases = max(1, min(processes, shards))
        most = max(1, min(streams, shards // phases))
        return cls(batch, next(n for n in range(most, 0, -1) if batch % n == 0), phases)

    @property
    def images(self) -> int:
        """Images that a stream gives to a step."""
        return self.batch // self.streams

    def share(self, rank: int, world: int, micro_batch: int) -> Share:
        """The part of one of `world` workers, in as many passes as all others have: none of more than `micro_batch`.

        Raises TesseraError where that cannot be: more workers than streams, or a worker with fewer images than passes.
        """
        if world > self.streams:
            raise TesseraError(
                f"{world} training workers cannot share a batch of {self.batch} images exactly: it is drawn from "
                f"{self.streams} streams, a divisor of the batch that reader.streams, reader.workers and the number of "
                f"shards allow; use {self.streams} workers at most, or raise train.batch or reader.streams, lower "
                "reader.workers, or make smaller shards (shards.samples)"
            )
        mine = tuple(range(rank, self.streams, world))
        most, least = -(-self.streams // world) * self.images, self.streams // world * self.images
        passes = -(-most // micro_batch)
        if passes > least:
            raise TesseraError(
                f"{world} training workers cannot share a batch of {self.batch} images in passes of {micro_batch} at "
                f"most (train.micro_batch): the largest share, {most}, needs {passes} passes, the smallest has {least}"
            )
        images = len(mine) * self.images
        return Share(mine, tuple(images // passes + (i < images % passes) for i in range(passes)))

    def told(self, world: int, micro_batch: int) -> str:
        """The arithmetic in one line. Raises TesseraError as `share` does."""
        shares = [self.share(rank, world, micro_batch) for rank in range(world)]
        largest = max(shares, key=lambda share: share.images)
        passes = f"{len(largest.passes)} x {largest.passes[0]} images"
        if len(set(largest.passes)) > 1:
            passes = " + ".join(map(str, largest.passes)) + " images"
        if len({share.images for share in shares}) == 1:
            return f"{self.batch} images = {world} workers x ({passes})"
        sums = " + ".join(str(share.images) for share in shares)
        return f"{self.batch} images = {sums} of {world} workers, the largest in {passes}"


@dataclass(frozen=True)
class Crew:
    """The workers of a run. No part of its identity: its steps are the same with any."""

    workers: int = 1
    least: int | None = None
    """Go on with as few as these while nodes are missing, and grow again; None: wait for all."""
    gpus: bool = False
    """One GPU each; else one CPU."""
    sharded: bool = False
    """Each holds a part of the weights and of the optimizer's state (FSDP2), not all of them (DDP)."""

    def told(self, plan: Plan, micro_batch: int) -> str:
        """How they share a step, in one line. Raises TesseraError if any number of them cannot do so exactly."""
        least = self.least or self.workers
        lines = [plan.told(workers, micro_batch) for workers in range(least, self.workers + 1)]
        return lines[-1] if least == self.workers else f"{lines[-1]}; at the least: {lines[0]}"
