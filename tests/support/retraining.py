"""A line of champions on a store, and the parts of retraining that need Ray or hours, done at once and in real form."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from evaluation import coco_format
from evaluation.champion import give
from evaluation.evaluate import ShardScore, evaluation_path, gather, load_samples
from evaluation.measures import Score, measure_image
from evaluation.report import Gallery, Report, read_report, write_report
from infra import artifacts
from infra.store import Store, open_store
from preprocessing.coco import read_index
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap
from preprocessing.shards import ShardConfig, ShardSet
from preprocessing.source import Index
from preprocessing.synthetic import SyntheticConfig, write_set, write_split
from tests.support.rows import course
from tests.support.shard_sets import make_set
from training.metrics import write_metrics
from training.recipe import Recipe
from training.recipes.generalist import debug
from training.run import WEIGHTS, TrainedRun, read_run

VAL = 9
"""Images of the val set: from 1 right to 5, and from 5 to 9, the gain is certain; from 8 to 9 it is not."""
TRAIN = 8
SIZE = (32, 32)


@lru_cache(maxsize=1)
def _weights(recipe: Recipe, labels: LabelTable) -> bytes:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        weights = recipe.build(labels).state_dict()
    return save({name: value.contiguous() for name, value in weights.items()})


def write_run(store: Store, recipe: Recipe, train_set: ShardSet, right: int, init: str | None = None) -> TrainedRun:
    """A finished run that gets so many val images right."""
    path = recipe.run_path(train_set.path, init)
    if (finished := read_run(store.url, path)) is not None:
        return finished
    store.write(f"{path}/{WEIGHTS}", _weights(debug(), train_set.labels))
    write_metrics(store, path, course(steps=4))
    content = {"recipe": recipe, "train_set": train_set.path, "init": init, "right": right}
    artifacts.write_manifest(store, path, content | {"steps": 1, "workers": 1, "seconds": 1.0})
    return TrainedRun(path, 1, 1.0)


def write_evaluation(
    store: Store, recipe: Recipe, run: TrainedRun, val_set: ShardSet, pictures: bool = False
) -> Report:
    """The finished evaluation of such a run: the images of the lowest ids are right, of the others all is void."""
    path = evaluation_path(recipe, run.path, val_set.path)
    if (finished := read_report(recipe, store.url, path)) is not None:
        return finished
    manifest = artifacts.read_manifest(store, run.path)
    assert manifest is not None
    ids = sorted(i for shard in val_set.shards for i in shard.image_ids)
    right, scores = {*ids[: manifest["right"]]}, list[ShardScore]()
    for shard in val_set.shards:
        total, by_image, annotations = Score.zero(len(val_set.labels)), {}, []
        for sample in (sample for batch in load_samples(store.url, shard) for sample in batch):
            truth, name = sample.panoptic, f"{sample.image_id:012d}.png"
            segments = tuple(replace(segment, is_crowd=False) for segment in truth.segments)
            empty = PanopticMap(truth.ids * 0, ())
            said = PanopticMap(truth.ids, segments) if sample.image_id in right else empty
            score = measure_image(truth, said, val_set.labels, name)
            total, by_image[sample.image_id] = total + score, score.pq
            if pictures:
                store.write(f"{path}/predictions/{name}", coco_format.png(said))
            annotations.append(coco_format.annotation(said, val_set.labels, sample.image_id, name))
        scores.append(ShardScore(total, by_image, tuple(annotations)))
    return write_report(recipe, run, val_set, store.url, path, gather(scores, val_set), Gallery({}, {}))


@dataclass(frozen=True)
class Base:
    """What a line begins with, before anything was evaluated."""

    index: Index
    train_set: ShardSet
    val_set: ShardSet


def make_base(folder: Path, store: Store, recipe: Recipe | None = None) -> Base:
    """Images 1 to TRAIN to train on, and VAL val images from 1,000,001 on."""
    recipe = recipe or debug()
    root = write_set(folder / "data", SyntheticConfig(train=TRAIN, val=VAL, size=SIZE, seed=1))
    index = read_index(root, "train2017")
    val_config = replace(recipe.val_shards, samples=4)
    return Base(index, make_set(store, index, recipe.shards), make_set(store, read_index(root, "val2017"), val_config))


def evaluated(store: Store, base: Base, right: int, seed: int = 0, pictures: bool = False) -> str:
    """Folder of the evaluation of a run on the base, another one for each seed."""
    recipe = debug().changed({"train.seed": seed})
    run = write_run(store, recipe, base.train_set, right)
    write_evaluation(store, recipe, run, base.val_set, pictures)
    return evaluation_path(recipe, run.path, base.val_set.path)


def begin_line(folder: Path, store: Store, right: int = 1, pictures: bool = False) -> Base:
    """A store with champion 1."""
    base = make_base(folder, store)
    give(store, store.url_for(evaluated(store, base, right, pictures=pictures)))
    return base


def write_upload(folder: Path, first_id: int, count: int = 2, seed: int = 7) -> Path:
    """A folder in COCO's layout with images first_id .. first_id + count - 1."""
    write_split(folder, "train2017", count, first_id - 1, SyntheticConfig(size=SIZE, seed=seed))
    return folder


def put(folder: Path, store: Store, name: str, whole: bool = True) -> None:
    """Copy a folder into the inbox, as an S3 client does."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.write(f"inbox/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    if whole:
        store.write(f"inbox/{name}/_SUCCESS", b"")


def precompute(name: str, index: Index, config: ShardConfig, store_url: str, bad_share: float = 0.01) -> ShardSet:
    """preprocessing.ray_precompute.precompute without Ray."""
    return make_set(open_store(store_url), index, config, bad_share)


def clone(source: Path, target: Path) -> None:
    """A copy of a store in a folder, with its times; files are shared, since a store never changes one in place."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link)


def watch_changes(monkeypatch: pytest.MonkeyPatch, store: Store, before: Callable[[str], object]) -> None:
    """Call `before` with the key each time before an object of the store is changed."""
    kind = type(store)
    for name in ("write", "create", "delete"):
        monkeypatch.setattr(kind, name, _watched(getattr(kind, name), before))


def _watched(real: Callable, before: Callable[[str], object]) -> Callable:
    def changes(self: Store, key: str, *data: bytes):
        before(key)
        return real(self, key, *data)

    return changes


def ids_of(sets: Sequence[ShardSet]) -> list[int]:
    """The images of all, as often as they are there."""
    return sorted(i for one in sets for shard in one.shards for i in shard.image_ids)
