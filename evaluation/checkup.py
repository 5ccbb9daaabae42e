"""PQ on a few fixed val images while a method is trained, shared out to its workers."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evaluation.pq import PQStats, compare, summarise
from infra.errors import TesseraError
from infra.store import open_store
from infra.text import shown
from preprocessing.panoptic_map import PanopticMap
from preprocessing.pictures import Picture, panoptic_overlay
from preprocessing.sample import Sample, from_fields
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import Shard, ShardSet, read_set
from training.methods.base import Method
from training.parallel import Place, gathered

PANELS = 4
"""Images that are drawn."""


@dataclass(frozen=True)
class ValCheck:
    """Measures PQ on `images` images of a val set, spread evenly over it: the same ones each time.

    Every worker takes an equal part, so that they have done at the same time and, where each holds a part of the
    weights, call the network equally often. Their samples are read once and then kept, encoded.
    """

    store_url: str
    val_set: str
    """Folder of the val shards."""
    images: int

    def __call__(self, method: Method, place: Place) -> tuple[dict[str, float], dict[str, Picture]]:
        """(`pq`, `sq`, `rq`, `pq_things`, `pq_stuff` in percent, of all workers; pictures by title, on worker 0).

        A group that does not occur has no figure. The pictures are image, truth and prediction side by side.
        """
        mine, counted = self._part(place)
        stats, panels = PQStats.zero(len(method.labels)), dict[str, Picture]()
        for start in range(0, len(mine), method.images_at_once):
            samples = mine[start : start + method.images_at_once]
            pictures = [sample.decoded() for sample in samples]
            outputs = method.predict(method.inputs(pictures))
            found = method.decode(outputs, [sample.panoptic.size for sample in samples])
            for i, (sample, picture, prediction) in enumerate(zip(samples, pictures, found, strict=True), start):
                named = f"image {sample.image_id} ({shown(sample.file_name)})"
                if i < counted:
                    stats += compare(sample.panoptic, prediction, len(method.labels), named)
                if i < PANELS and place.rank == 0:
                    panels[named] = _panel(picture, sample, prediction, method)
        total = sum(gathered(stats, place), PQStats.zero(len(method.labels)))
        summary = summarise(total, method.labels)
        figures = {name: summary[name]["all"] for name in ("pq", "sq", "rq")}
        figures |= {f"pq_{group}": summary["pq"][group] for group in ("things", "stuff")}
        return {name: value for name, value in figures.items() if value is not None}, panels

    def _part(self, place: Place) -> tuple[list[Sample], int]:
        """One worker's samples, as many as any other has, and how many of them count."""
        ids = self._chosen
        count = -(-len(ids) // place.world)
        mine = ids[place.rank * count : (place.rank + 1) * count]
        padded = [*mine, *[ids[-1]] * (count - len(mine))]
        samples = self._samples(frozenset(padded))
        return [samples[image_id] for image_id in padded], len(mine)

    @cached_property
    def _set(self) -> ShardSet:
        found = read_set(open_store(self.store_url), self.val_set)
        if found is None or not found.samples:
            raise TesseraError(f"{self.store_url}/{self.val_set}: expected a val set with images")
        return found

    @property
    def _chosen(self) -> list[int]:
        every = [image_id for shard in self._set.shards for image_id in shard.image_ids]
        picks = np.linspace(0, len(every) - 1, min(self.images, len(every)))
        return [every[round(i)] for i in picks]

    def _samples(self, wanted: frozenset[int]) -> dict[int, Sample]:
        if not self._kept.keys() >= wanted:
            self._kept.clear()  # of a worker that had another part
            for shard in self._set.shards:
                self._kept.update(self._read(shard, wanted))
        return self._kept

    @cached_property
    def _kept(self) -> dict[int, Sample]:
        return {}

    def _read(self, shard: Shard, wanted: frozenset[int]) -> dict[int, Sample]:
        if not wanted.intersection(shard.image_ids):
            return {}
        samples = map(from_fields, read_shard_samples(self.store_url, shard))
        return {sample.image_id: sample for sample in samples if sample.image_id in wanted}


def _panel(picture: Picture, sample: Sample, prediction: PanopticMap, method: Method) -> Picture:
    drawn = [panoptic_overlay(picture, panoptic, method.labels) for panoptic in (sample.panoptic, prediction)]
    return np.concatenate([picture, *drawn], 1)
