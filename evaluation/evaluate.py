"""Evaluating one shard, and adding shards up: no Ray here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, cast

import numpy as np

from evaluation import coco_format
from evaluation.bootstrap import Table, image_pq
from evaluation.coco_format import Annotation
from evaluation.measures import Score, ScoreRecord, measure_image
from evaluation.pq import PQStats, SparseStats
from infra import artifacts, records
from infra.errors import TesseraError
from infra.store import Store, open_store
from infra.text import shown
from preprocessing.labels import LabelTable
from preprocessing.pictures import SMALL, Panel, encode, overlay_panel
from preprocessing.sample import Sample, decode_image, from_fields
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import Shard, ShardSet
from training.methods.base import Method
from training.recipe import Recipe
from training.run import load_method

SCHEMA_VERSION = 2
"""Part of every evaluation's path: raise it when the same weights would score differently."""

_OF_EACH = 4
"""Images of each kind in a gallery."""


@dataclass(frozen=True)
class EvalJob:
    """What one task evaluates or draws."""

    recipe: Recipe
    store_url: str
    run: str
    """Folder of the trained run."""
    path: str
    """Folder of the evaluation."""
    labels: LabelTable
    shard: Shard
    device: str = "cpu"


@dataclass(frozen=True)
class ShardScore:
    """The result of one shard, as its record on the store holds it."""

    score: Score
    by_image: dict[int, PQStats]
    """In the order of the shard."""
    annotations: tuple[dict[str, Any], ...]
    """Entries of COCO's predictions JSON."""
    names: dict[int, str] = field(default_factory=dict)
    """Files of the images; none in records of before."""


@dataclass(frozen=True)
class Scores:
    """A whole evaluation."""

    score: Score
    by_image: dict[int, PQStats]
    annotations: tuple[dict[str, Any], ...]
    oracle: dict[str, Any] | None = None
    """What perfect outputs decode to, as OracleScore.summary says it."""
    names: dict[int, str] = field(default_factory=dict)
    """Files of the images."""

    @property
    def images(self) -> int:
        """How many were counted."""
        return len(self.by_image)


def evaluation_path(recipe: Recipe, run: str, val_set: str) -> str:
    """Folder of an evaluation: it depends on the weights, the val shards and the decoding."""
    return artifacts.step_path("evaluate", SCHEMA_VERSION, recipe.method.decode, [run, val_set])


def lost(store_url: str, path: str, val_set: ShardSet) -> list[str]:
    """Keys of a finished evaluation that the store has not; the records of shards without all of their PNGs go.

    So `evaluate_shard` makes those again.
    """
    store = open_store(store_url)
    there = {entry.key for entry in store.list(f"{path}/")}
    gone = [key for name in artifacts.PROMISED["evaluate"] if (key := f"{path}/{name}") not in there]
    for shard in val_set.shards:
        pngs = [key for i in shard.image_ids if (key := f"{path}/predictions/{_png(i)}") not in there]
        if pngs:
            store.delete(_record(path, shard))
            gone += pngs
    return gone


def _png(image_id: int) -> str:
    return f"{image_id:012d}.png"


def _record(path: str, shard: Shard) -> str:
    name = shard.key.rsplit("/", 1)[-1].removesuffix(".tar")
    return f"{path}/shards/{name}.json"


def evaluate_shard(job: EvalJob) -> ShardScore:
    """Predict and score one shard: PNGs, then the record; a shard that has its record is only read."""
    store = open_store(job.store_url)
    key = _record(job.path, job.shard)
    if store.exists(key):
        return read_score(store, key, len(job.labels), job.shard.image_ids)
    method = cached_method(job.recipe, job.labels, job.store_url, job.run).to(job.device)
    total, by_image, annotations = Score.zero(len(job.labels)), dict[int, PQStats](), list[dict[str, Any]]()
    names = dict[int, str]()
    for samples in load_samples(job.store_url, job.shard, method.images_at_once):
        outputs = method.predict(method.inputs([sample.decoded() for sample in samples]))
        predictions = method.decode(outputs, [sample.panoptic.size for sample in samples])
        for sample, prediction in zip(samples, predictions, strict=True):
            where = f"image {sample.image_id} ({shown(sample.file_name)})"
            score = measure_image(sample.panoptic, prediction, job.labels, where)
            total, by_image[sample.image_id] = total + score, score.pq
            names[sample.image_id] = sample.file_name
            png_name = _png(sample.image_id)
            store.write(f"{job.path}/predictions/{png_name}", coco_format.png(prediction))
            annotations.append(coco_format.annotation(prediction, job.labels, sample.image_id, png_name))
    result = ShardScore(total, by_image, tuple(annotations), names)
    store.write(key, records.to_json(_to_json(result), indent=None))
    return result


def gather(scores: Sequence[ShardScore], val_set: ShardSet) -> Scores:
    """Add up. Raises TesseraError unless every image of the set was counted exactly once."""
    counted = sorted(i for score in scores for i in score.by_image)
    expected = sorted(i for shard in val_set.shards for i in shard.image_ids)
    if counted != expected:
        missing, extra = set(expected) - set(counted), len(counted) - len(set(counted))
        raise TesseraError(
            f"evaluation counted {len(counted)} images of {len(expected)}: {len(missing)} missing "
            f"({sorted(missing)[:5]}), {extra} more than once"
        )
    annotations = sorted((a for score in scores for a in score.annotations), key=lambda a: a["image_id"])
    by_image = {i: stats for score in scores for i, stats in score.by_image.items()}
    total = sum((score.score for score in scores), Score.zero(len(val_set.labels)))
    if not (total.pq.tp + total.pq.fn).any():
        raise TesseraError(f"{val_set.path}: no image has a segment to be found, there is nothing to measure")
    names = {i: name for score in scores for i, name in score.names.items()}
    return Scores(total, dict(sorted(by_image.items())), tuple(annotations), names=dict(sorted(names.items())))


def galleries_of(scores: Scores) -> dict[str, list[int]]:
    """Image ids by `worst`, `median` and `best` PQ of the image; of equals the lower id comes first."""
    table = Table.of(scores.by_image)
    pq_I = image_pq(table)
    order = [table.image_ids[i] for i in np.argsort(pq_I, kind="stable") if not np.isnan(pq_I[i])]
    if len(order) <= 3 * _OF_EACH:
        return {"all, the worst first": order}
    middle = (len(order) - _OF_EACH) // 2
    return {
        "worst": order[:_OF_EACH],
        "median": order[middle : middle + _OF_EACH],
        "best": order[: -_OF_EACH - 1 : -1],
    }


def draw_shard(job: EvalJob, image_ids: frozenset[int]) -> dict[int, Panel]:
    """Pictures of those images of the shard by id: image, truth, prediction and what the network says."""
    method = cached_method(job.recipe, job.labels, job.store_url, job.run).to(job.device)
    samples = (sample for batch in load_samples(job.store_url, job.shard) for sample in batch)
    return {s.image_id: _pictures(method, s) for s in samples if s.image_id in image_ids}


def load_samples(store_url: str, shard: Shard, at_once: int = 16) -> Iterator[list[Sample]]:
    """The samples of a shard in batches."""
    fields = read_shard_samples(store_url, shard)
    while chunk := [from_fields(f) for f in islice(fields, at_once)]:
        yield chunk


@lru_cache(maxsize=1)
def cached_method(recipe: Recipe, labels: LabelTable, store_url: str, run: str) -> Method:
    """A worker process evaluates many shards with the same weights."""
    return load_method(recipe, labels, store_url, run)


def _pictures(method: Method, sample: Sample) -> Panel:
    image_HW3, size = decode_image(sample.image), sample.panoptic.size
    outputs = method.predict(method.inputs([image_HW3]))
    (prediction,) = method.decode(outputs, [size])
    maps = {"ground truth": sample.panoptic, "predicted panoptic": prediction}
    pictures = overlay_panel(image_HW3, maps, method.labels)
    height, width = method.frame.inner(size)  # without the padding
    for title, view in method.views(outputs)[0].items():
        pictures[title] = encode(view[:height, :width], size, SMALL)
    return Panel(sample.file_name, pictures)


def _to_json(score: ShardScore) -> dict[str, Any]:
    by_image = {str(i): stats.to_sparse_json() for i, stats in score.by_image.items()}
    return {
        "score": score.score.to_json(),
        "by_image": by_image,
        "annotations": score.annotations,
        "names": {str(i): name for i, name in score.names.items()},
    }


@dataclass(frozen=True)
class _Record:
    """A ShardScore's."""

    score: ScoreRecord
    by_image: dict[int, SparseStats]
    annotations: tuple[Annotation, ...]
    names: dict[int, str] = field(default_factory=dict)


def read_score(store: Store, key: str, categories: int, image_ids: Sequence[int]) -> ShardScore:
    """The record of a shard's score. TesseraError, naming its URL, if it is damaged, or of other images."""
    found = records.read(store, key, _Record)
    ids = [*image_ids]
    if [*found.by_image] != ids or [entry["image_id"] for entry in found.annotations] != ids:
        raise TesseraError(f"{store.url_for(key)}: it is not of the images of its shard; delete it to count them anew")
    try:
        score = Score.from_json(found.score)
        by_image = {i: PQStats.from_sparse_json(rows, categories) for i, rows in found.by_image.items()}
        if not sum(by_image.values(), PQStats.zero(categories)).equals(score.pq):
            raise TesseraError("its images do not add up to its sums")
    except TesseraError as error:
        raise TesseraError(f"{store.url_for(key)}: {error}; delete it to count its images anew") from error
    annotations = tuple(cast(dict[str, Any], entry) for entry in found.annotations)
    return ShardScore(score, by_image, annotations, found.names)


def read_images(store: Store, path: str, labels: LabelTable) -> dict[int, PQStats]:
    """The statistics by image of the evaluation at `path`. TesseraError, naming their URL, if they are damaged."""
    key = f"{path}/images.json"
    found = records.read(store, key, dict[int, SparseStats])
    try:
        return {i: PQStats.from_sparse_json(rows, len(labels)) for i, rows in found.items()}
    except TesseraError as error:
        raise TesseraError(f"{store.url_for(key)}: {error}") from error
