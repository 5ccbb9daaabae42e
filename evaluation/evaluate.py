"""Evaluating one shard, and adding shards up: no Ray here."""

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from evaluation import coco_format
from evaluation.pq import PQStats, compare
from infra import artifacts
from infra.errors import TesseraError
from infra.store import open_store
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap
from preprocessing.pictures import Picture, encode_png, panoptic_overlay
from preprocessing.sample import Sample, decode_image, from_fields
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import Shard, ShardSet
from training.methods.base import Method
from training.recipe import Recipe
from training.run import load_method

SCHEMA_VERSION = 1
"""Part of every evaluation's path: raise it when the same weights would score differently."""

_BATCH = 16


@dataclass(frozen=True)
class EvalJob:
    """What one task evaluates."""

    recipe: Recipe
    store_url: str
    run: str
    """Folder of the trained run."""
    path: str
    """Folder of the evaluation."""
    labels: LabelTable
    shard: Shard
    gallery: frozenset[int]
    """Image ids to draw pictures of."""
    device: str = "cpu"


@dataclass(frozen=True)
class ShardScore:
    """The result of one shard, as its record on the store holds it."""

    image_ids: tuple[int, ...]
    stats: PQStats
    annotations: tuple[dict[str, Any], ...]
    """Entries of COCO's predictions JSON."""
    pictures: dict[int, dict[str, str]]
    """Base64 PNGs by title, of the gallery's images."""


@dataclass(frozen=True)
class Scores:
    """A whole evaluation."""

    stats: PQStats
    images: int
    annotations: tuple[dict[str, Any], ...]
    pictures: dict[int, dict[str, str]]


def evaluation_path(recipe: Recipe, run: str, val_set: str) -> str:
    """Folder of an evaluation: it depends on the weights, the val shards and the decoding."""
    return artifacts.step_path("evaluate", SCHEMA_VERSION, recipe.method.decode, [run, val_set])


def evaluate_shard(job: EvalJob) -> ShardScore:
    """Predict and score one shard: PNGs, then the record; a shard that has its record is only read."""
    store = open_store(job.store_url)
    name = job.shard.key.rsplit("/", 1)[-1].removesuffix(".tar")
    key = f"{job.path}/shards/{name}.json"
    if store.exists(key):
        return _from_json(json.loads(store.read(key)))
    method = _cached_method(job.recipe, job.labels, job.store_url, job.run).to(job.device)
    stats, annotations, pictures = PQStats.zero(len(job.labels)), [], {}
    for samples in load_samples(job.store_url, job.shard):
        outputs = method.predict(method.inputs([sample.image for sample in samples]))
        predictions = method.decode(outputs, [sample.panoptic.size for sample in samples])
        for sample, prediction in zip(samples, predictions, strict=True):
            stats += compare(sample.panoptic, prediction, len(job.labels), f"image {sample.image_id}")
            png_name = f"{sample.image_id:012d}.png"
            store.write(f"{job.path}/predictions/{png_name}", coco_format.png(prediction))
            annotations.append(coco_format.annotation(prediction, job.labels, sample.image_id, png_name))
            if sample.image_id in job.gallery:
                pictures[sample.image_id] = _pictures(method, sample, prediction)
    ids = tuple(entry["image_id"] for entry in annotations)
    score = ShardScore(ids, stats, tuple(annotations), pictures)
    store.write(key, json.dumps(_to_json(score)).encode())
    return score


def gather(scores: Sequence[ShardScore], val_set: ShardSet) -> Scores:
    """Add up. Raises TesseraError unless every image of the set was counted exactly once."""
    counted = sorted(i for score in scores for i in score.image_ids)
    expected = sorted(i for shard in val_set.shards for i in shard.image_ids)
    if counted != expected:
        missing, extra = set(expected) - set(counted), len(counted) - len(set(counted))
        raise TesseraError(
            f"evaluation counted {len(counted)} images of {len(expected)}: {len(missing)} missing "
            f"({sorted(missing)[:5]}), {extra} more than once"
        )
    annotations = sorted((a for score in scores for a in score.annotations), key=lambda a: a["image_id"])
    pictures = {i: views for score in scores for i, views in sorted(score.pictures.items())}
    total = sum((score.stats for score in scores), PQStats.zero(len(val_set.labels)))
    return Scores(total, len(counted), tuple(annotations), dict(sorted(pictures.items())))


def gallery_of(val_set: ShardSet, count: int = 12) -> frozenset[int]:
    """Image ids spread evenly over the set."""
    ids = sorted(i for shard in val_set.shards for i in shard.image_ids)
    return frozenset(ids[:: max(1, len(ids) // count)][:count])


def load_samples(store_url: str, shard: Shard) -> Iterator[list[Sample]]:
    """The samples of a shard in batches."""
    fields = read_shard_samples(store_url, shard)
    while chunk := [from_fields(f) for f in islice(fields, _BATCH)]:
        yield chunk


@lru_cache(maxsize=1)
def _cached_method(recipe: Recipe, labels: LabelTable, store_url: str, run: str) -> Method:
    """A worker process evaluates many shards with the same weights."""
    return load_method(recipe, labels, store_url, run)


def _pictures(method: Method, sample: Sample, prediction: PanopticMap) -> dict[str, str]:
    image_HW3 = decode_image(sample.image)
    pictures: dict[str, Picture] = {"image": image_HW3}
    pictures |= method.views(method.predict(method.inputs([sample.image])))[0]
    pictures["predicted panoptic"] = panoptic_overlay(image_HW3, prediction, method.labels)
    pictures["ground truth"] = panoptic_overlay(image_HW3, sample.panoptic, method.labels)
    size = sample.panoptic.size
    return {title: base64.b64encode(encode_png(picture, size)).decode() for title, picture in pictures.items()}


def _to_json(score: ShardScore) -> dict[str, Any]:
    return {**vars(score), "stats": score.stats.to_json()}


def _from_json(content: dict[str, Any]) -> ShardScore:
    return ShardScore(
        tuple(content["image_ids"]),
        PQStats.from_json(content["stats"]),
        tuple(content["annotations"]),
        {int(i): views for i, views in content["pictures"].items()},
    )
