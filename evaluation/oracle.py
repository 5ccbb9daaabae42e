"""What a perfect network would reach: its outputs on val images, decoded with the run's options.

Options of decoding that drop small segments, and the grid itself, cost PQ that no training can win back; a report says
how much.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from evaluation.evaluate import EvalJob, cached_method, load_samples
from evaluation.pq import PQStats, compare, summarise
from preprocessing.labels import LabelTable
from preprocessing.shards import Shard, ShardSet
from training.augment import framed
from training.batch import Example, collate

IMAGES = 64
"""Of the val set's first ones so many are measured: it is a bound, no score."""
_RADIUS = 1
"""No loss is computed, so the distances that a method may ask for are of no use."""


@dataclass(frozen=True)
class OracleScore:
    """Statistics of decoded perfect outputs on some images."""

    images: int
    pq: PQStats

    @classmethod
    def zero(cls, labels: LabelTable) -> "OracleScore":
        """Of no image."""
        return cls(0, PQStats.zero(len(labels)))

    def __add__(self, other: "OracleScore") -> "OracleScore":
        return OracleScore(self.images + other.images, self.pq + other.pq)

    def summary(self, labels: LabelTable) -> dict[str, Any]:
        """`images`, and `pq` of all, things and stuff in percent, None where there is none."""
        pq = summarise(self.pq, labels)["pq"]
        return {"images": self.images, "pq": {group: pq[group] for group in ("all", "things", "stuff")}}


def oracle_parts(val_set: ShardSet) -> Iterator[tuple[Shard, int]]:
    """The shards with the first images of the set, and how many of each."""
    left = IMAGES
    for shard in val_set.shards:
        if taken := min(left, len(shard.image_ids)):
            yield shard, taken
        left -= taken


def oracle_shard(job: EvalJob, images: int) -> OracleScore:
    """The first images of a shard."""
    method = cached_method(job.recipe, job.labels, job.store_url, job.run)
    total = PQStats.zero(len(job.labels))
    samples = (sample for batch in load_samples(job.store_url, job.shard) for sample in batch)
    for sample in islice(samples, images):
        batch = collate([framed(Example.of("", sample), method.frame, _RADIUS)])
        (predicted,) = method.decode(method.ideal(batch), [sample.panoptic.size])
        total += compare(sample.panoptic, predicted, len(job.labels), f"image {sample.image_id}")
    return OracleScore(images, total)
