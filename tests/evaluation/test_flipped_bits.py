"""One bit turned in any object that a run and its evaluation leave: noticed by what reads it, or harmless."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation import coco_format
from evaluation.champion import current, give
from evaluation.compare import read_evaluation
from evaluation.evaluate import EvalJob, evaluate_shard, evaluation_path, gather
from evaluation.report import Gallery, read_report, write_report
from infra import records
from infra.errors import TesseraError
from infra.store import Store, open_store
from preprocessing.coco import read_index
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import read_set, read_shard
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.checkpoint_states import RUN, key, state_of, write_all
from tests.support.finished_run import finished_run
from tests.support.shard_sets import make_set
from training.checkpoints import read_state
from training.metrics import read_metrics
from training.recipes.generalist import debug
from training.run import open_run, read_run
from training.tensors import unpack

FLIPS = 60
"""Of each object, spread over all of it, its ends among them."""


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Callable[[], Any]]]:
    """A store with a finished run, its evaluation, a champion and a checkpoint; of each key what reads it."""
    folder, recipe = tmp_path_factory.mktemp("flips"), debug()
    store = open_store(str(folder / "store"))
    path = finished_run(folder, store.url).removeprefix(f"{store.url}/")
    index = read_index(write_set(folder / "val", SyntheticConfig(train=2, val=1, size=(40, 48), seed=5)), "train2017")
    val_set, run = make_set(store, index, recipe.val_shards), read_run(store.url, path)
    assert run is not None
    scored = evaluation_path(recipe, path, val_set.path)
    job = EvalJob(recipe, store.url, path, scored, val_set.labels, val_set.shards[0])
    scores = gather([evaluate_shard(job)], val_set)
    write_report(recipe, run, val_set, store.url, scored, scores, Gallery({}, {}))
    give(store, store.url_for(scored))
    write_all(store, [state_of(3)], 1)
    annotation = scores.annotations[0]
    png = f"{scored}/predictions/{annotation['file_name']}"
    (shard,) = val_set.shards
    return store, {
        f"{path}/model.safetensors": lambda: _plain(unpack(store.read(f"{path}/model.safetensors"), "weights")),
        f"{path}/metrics.parquet": lambda: read_metrics(store, path),
        f"{path}/manifest.json": lambda: (open_run(store.url, path)[0], read_run(store.url, path)),
        f"{scored}/manifest.json": lambda: (_evaluated(store, scored), read_report(recipe, store.url, scored)),
        f"{scored}/images.json": lambda: _evaluated(store, scored),
        f"{scored}/report.json": lambda: (_evaluated(store, scored), read_report(recipe, store.url, scored)),
        f"{scored}/predictions.json": lambda: records.read(store, f"{scored}/predictions.json", dict[str, Any]),
        f"{scored}/shards/{shard.key.rpartition('/')[2].removesuffix('.tar')}.json": lambda: evaluate_shard(job),
        png: lambda: coco_format.read_map(store.read(png), annotation, val_set.labels).ids.tolist(),
        shard.key: lambda: list(read_shard_samples(store.url, shard)),
        shard.key.replace(".tar", ".json"): lambda: read_shard(store, shard.key),
        f"{val_set.path}/manifest.json": lambda: read_set(store, val_set.path),
        "champion/000001.json": lambda: current(store),
        key(3): lambda: _plain(read_state(store, RUN, 3)),
    }


def _evaluated(store: Store, path: str) -> Any:
    found = read_evaluation(store.url_for(path))
    table = [value.tolist() if hasattr(value, "tolist") else value for value in vars(found.table).values()]
    return found.summary, table, found.options, found.worker_hours, found.name


def _plain(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), tree.tolist()
    return {name: _plain(value) for name, value in tree.items()} if isinstance(tree, dict) else tree


def test_no_flipped_bit_goes_unnoticed_that_changes_anything(lasting: tuple[Store, dict[str, Callable[[], Any]]]):
    store, readers = lasting
    for name, read in readers.items():
        told, whole, found = repr(read()), store.read(name), Counter[str]()
        for bit in _spread(8 * len(whole)):
            spoilt = bytearray(whole)
            spoilt[bit // 8] ^= 1 << bit % 8
            store.write(name, bytes(spoilt))
            try:
                found["harmless" if repr(read()) == told else f"unnoticed, bit {bit}"] += 1
            except TesseraError:
                found["noticed"] += 1
            except ValueError as error:  # read_map's, which those who read PNGs put into a sentence
                found["noticed" if name.endswith(".png") else repr(error)] += 1
        store.write(name, whole)
        assert found.keys() <= {"noticed", "harmless"}, (name, found)
        assert found["noticed"] > FLIPS / 3, (name, found)  # half of a small checkpoint is padding


def _spread(bits: int) -> list[int]:
    chosen = random.Random(0).sample(range(bits), min(FLIPS, bits))
    return sorted({*chosen, 0, bits - 1})


def test_every_kind_of_object_that_lasts_is_tried(lasting: tuple[Store, dict[str, Callable[[], Any]]]):
    store, readers = lasting
    unread = {"report.md", "report.html"}  # people read them, no command does
    kinds = {_kind(entry.key) for entry in store.list() if Path(entry.key).name not in unread}
    assert kinds == {_kind(name) for name in readers}


def _kind(name: str) -> tuple[str, str]:
    return name.partition("/")[0], Path(name).suffix if Path(name).stem.isalnum() else Path(name).name
