"""Finished runs on the store."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from infra import artifacts, records
from infra.errors import DamagedObject, TesseraError
from infra.records import Amount, Count, Key
from infra.store import Store, open_store
from preprocessing.labels import Category, LabelTable
from preprocessing.shards import read_set
from training.checkpoints import best_step, best_weights, read_state, steps_of
from training.methods.base import Method
from training.metrics import read_metrics, write_metrics
from training.recipe import Recipe
from training.tensors import pack, unpack

WEIGHTS = "model.safetensors"
log = logging.getLogger("tessera.train")


@dataclass(frozen=True)
class TrainedRun:
    """A finished run. How it went is in its table: metrics.read_metrics."""

    path: str
    """Folder under the store's root; it holds the weights, the metrics' table and the manifest."""
    steps: int
    seconds: float
    """Of the last attempt, waiting for workers included."""


@dataclass(frozen=True)
class RunFacts:
    """What the manifest of a finished run says."""

    recipe: dict[str, Any]
    train_set: Key
    steps: Count
    seconds: Amount

    def batch(self, url: str) -> int:
        """Images a step. url: of the run, for errors."""
        return records.restore(_Batched, self.recipe, url).train.batch


@dataclass(frozen=True)
class _Batch:
    batch: Count


@dataclass(frozen=True)
class _Batched:
    train: _Batch


def read_run(store_url: str, path: str) -> TrainedRun | None:
    """The finished run at `path`, or None."""
    content = artifacts.read_manifest(open_store(store_url), path, RunFacts)
    return None if content is None else TrainedRun(path, content.steps, content.seconds)


def forget_lost(store: Store, path: str) -> None:
    """Take back that a run is finished whose weights are gone, so that it is trained again.

    Raises TesseraError, with what to do, where something else of it is gone: new weights would not be those that were
    evaluated. That the weights of its best checkpoint are gone is told.
    """
    content = artifacts.read_manifest(store, path)
    if content is None:
        return
    best = content.get("best")
    named = best.get("run") if isinstance(best, dict) else None
    of_best = named if isinstance(named, str) and named != path else None
    if WEIGHTS in artifacts.lost(store, path):
        log.warning("%s/%s is gone: the run is trained again", store.url_for(path), WEIGHTS)
        for finished in (of_best, path):
            if finished is not None:
                store.delete(f"{finished}/{artifacts.MANIFEST}")
        return
    artifacts.refuse_lost(store, path)
    if of_best is not None and (names := artifacts.lost(store, of_best)):
        told = "%s: %s of the best checkpoint is gone; delete %s/%s to train the run again"
        log.warning(told, store.url_for(of_best), ", ".join(names), store.url_for(path), artifacts.MANIFEST)


def open_run(store_url: str, path: str, options: Mapping[str, Any] | None = None) -> tuple[Recipe, Method]:
    """Recipe and trained method of a finished run, with nothing but the store at hand; in evaluation mode, on the CPU.

    options: other ones of decoding, as Recipe.decoding takes them. The label table is that of the shards it was trained
    on. Raises TesseraError if there is no finished run at `path`, if its shards' manifest is gone, and for one that
    another version has written.
    """
    store = open_store(store_url)
    content = artifacts.read_manifest(store, path, RunFacts)
    if content is None:
        raise TesseraError(f"{store.url_for(path)}: no finished run")
    artifacts.refuse_lost(store, path)
    labels = _labels_of(store, path, content)
    recipe = Recipe.from_json(content.recipe, store.url_for(path)).decoding(options or {})
    return recipe, load_method(recipe, labels, store_url, path)


def load_method(recipe: Recipe, labels: LabelTable, store_url: str, path: str) -> Method:
    """The trained method of a finished run, in evaluation mode, on the CPU."""
    store = open_store(store_url)
    try:
        method = recipe.build(labels)
    except (RuntimeError, ValueError, TypeError, AssertionError, ArithmeticError) as error:  # by what is wrong with it
        raise TesseraError(f"{store.url_for(path)}: its recipe's network cannot be built: {error}") from error
    try:
        method.load_state_dict(_weights(store, path))
    except RuntimeError as error:
        raise TesseraError(f"{store.url_for(path)}/{WEIGHTS}: not of this run's network: {error}") from error
    return method.eval()


def _weights(store: Store, path: str) -> dict[str, Tensor]:
    """The trained weights of a run. TesseraError, naming the URL, if they are damaged."""
    key = f"{path}/{WEIGHTS}"
    return unpack(store.read(key), store.url_for(key))


def write_weights(store: Store, path: str, weights: dict[str, Tensor]) -> None:
    """The trained weights of a run."""
    store.write(f"{path}/{WEIGHTS}", pack(weights))


def finish_best(store: Store, path: str, content: dict[str, Any]) -> dict[str, Any] | None:
    """The best checkpoint of a run by PQ on the fixed val images, as a finished run of its own: all commands take it.

    content: what the run's manifest is to hold. Returns {"step", "pq", "run": its folder}, the run's own folder where
    the last weights are the best, or None where PQ was not measured and where the checkpoint is damaged.
    """
    rows = read_metrics(store, path)
    step = best_step([asdict(row) for row in rows], {*steps_of(store, path), content["steps"]})
    if step is None:
        return None
    until = [row for row in rows if row.step <= step]
    best = path
    if step < content["steps"]:
        try:
            weights = best_weights(read_state(store, path, step))
        except DamagedObject as error:  # the last weights are there nevertheless
            log.warning("the best weights are lost: %s", error)
            return None
        best = artifacts.step_path("train", 1, {"best": step}, [path])
        write_weights(store, best, weights)
        write_metrics(store, best, until)
        artifacts.write_manifest(store, best, content | {"steps": step, "best_of": path})
    return {"step": step, "pq": until[-1].figures["pq"], "run": best}


def start_weights(recipe: Recipe, labels: LabelTable, store_url: str, init: str) -> dict[str, Tensor]:
    """Those weights of the finished run at `init` that a run of `recipe` on other data can start with.

    With the same categories all of them; with others all whose shape does not follow from the number of categories.
    Raises TesseraError if there is no such run, or if its network is another one.
    """
    store = open_store(store_url)
    content = artifacts.read_manifest(store, init, RunFacts)
    if content is None:
        raise TesseraError(f"{store.url_for(init)}: no finished run to start from")
    artifacts.refuse_lost(store, init)
    theirs = _labels_of(store, init, content)
    weights = _weights(store, init)
    with torch.device("meta"):
        ours, more = (recipe.build(table).state_dict() for table in (labels, _with_one_more(labels)))
    if theirs != labels:
        weights = {n: value for n, value in weights.items() if n in ours and more[n].shape == ours[n].shape}
        ours = {n: value for n, value in ours.items() if more[n].shape == value.shape}
    differ = [n for n in ours.keys() | weights.keys() if _shape(ours, n) != _shape(weights, n)]
    if differ:
        name = min(differ)
        raise TesseraError(
            f"{store.url_for(init)}: its network is another one than that of recipe {recipe.name}: {len(differ)} "
            f"weights differ, as {name}: {_shape(weights, name)} there, {_shape(ours, name)} here"
        )
    return weights


def _shape(weights: dict[str, Tensor], name: str) -> list[int] | None:
    return list(weights[name].shape) if name in weights else None


def _with_one_more(labels: LabelTable) -> LabelTable:
    more = max(c.dataset_id for c in labels.categories) + 1
    return LabelTable((*labels.categories, Category(more, "one more", False, (0, 0, 0))))


def labels_of(store_url: str, path: str) -> LabelTable:
    """The categories that the finished run at `path` knows. Raises TesseraError as `open_run` does."""
    store = open_store(store_url)
    content = artifacts.read_manifest(store, path, RunFacts)
    if content is None:
        raise TesseraError(f"{store.url_for(path)}: no finished run")
    return _labels_of(store, path, content)


def _labels_of(store: Store, path: str, manifest: RunFacts) -> LabelTable:
    shards = read_set(store, manifest.train_set)
    if shards is None:
        raise TesseraError(f"{store.url_for(path)}: its data set {manifest.train_set} has no manifest any more")
    return shards.labels
