"""Finished runs on the store."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load

from infra import artifacts
from infra.errors import TesseraError
from infra.store import open_store
from preprocessing.labels import LabelTable
from preprocessing.shards import read_set
from training.methods.base import Method
from training.recipe import Recipe

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class TrainedRun:
    """A finished run and how it went."""

    path: str
    """Folder under the store's root; it holds the weights and the manifest."""
    steps: int
    workers: int
    seconds: float
    """Of the last attempt, waiting for workers included."""
    history: tuple[dict[str, Any], ...]
    """Rows of loop.Progress."""

    @classmethod
    def of(cls, path: str, manifest: dict[str, Any]) -> "TrainedRun":
        """From the manifest's content."""
        history = tuple(manifest["history"])
        return cls(path, manifest["steps"], manifest["workers"], manifest["seconds"], history)


def read_run(store_url: str, path: str) -> TrainedRun | None:
    """The finished run at `path`, or None."""
    content = artifacts.read_manifest(open_store(store_url), path)
    return None if content is None else TrainedRun.of(path, content)


def open_run(store_url: str, path: str, options: Mapping[str, Any] | None = None) -> tuple[Recipe, Method]:
    """Recipe and trained method of a finished run, with nothing but the store at hand; in evaluation mode, on the CPU.

    options: other ones of decoding, as Recipe.decoding takes them. The label table is that of the shards it was trained
    on. Raises TesseraError if there is no finished run at
    `path`, if its shards' manifest is gone, and for one that another version has written.
    """
    store = open_store(store_url)
    content = artifacts.read_manifest(store, path)
    if content is None:
        raise TesseraError(f"{store.url_for(path)}: no finished run")
    shards = read_set(store, content["train_set"])
    if shards is None:
        raise TesseraError(f"{store.url_for(path)}: its data set {content['train_set']} has no manifest any more")
    recipe = Recipe.from_json(content["recipe"]).decoding(options or {})
    return recipe, load_method(recipe, shards.labels, store_url, path)


def load_method(recipe: Recipe, labels: LabelTable, store_url: str, path: str) -> Method:
    """The trained method of a finished run, in evaluation mode, on the CPU."""
    method = recipe.build(labels)
    method.load_state_dict(load(open_store(store_url).read(f"{path}/{WEIGHTS}")))
    return method.eval()
