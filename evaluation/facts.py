"""What a page is about: the heads of reports and comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass

from infra import records
from infra.artifacts import MANIFEST
from infra.page import UNKNOWN, date
from infra.store import Store
from infra.text import shown
from preprocessing.labels import LabelTable
from preprocessing.shards import ShardSet
from preprocessing.source import Origin

_ORIGINS = 3
"""Data sets that are named of a train set that many uploads went into."""


@dataclass(frozen=True)
class _Training:
    batch: int
    seed: int = 0


@dataclass(frozen=True)
class _Recipe:
    name: str
    train: _Training


@dataclass(frozen=True)
class _Run:
    """Of a run's manifest."""

    recipe: _Recipe
    steps: int
    train_set: str
    init: str | None = None
    workers: int | None = None
    best_of: str | None = None
    code: str = UNKNOWN


@dataclass(frozen=True)
class _Set:
    """Of a train set's manifest."""

    samples: int = 0
    origins: tuple[Origin, ...] = ()


def told(origins: Sequence[Origin]) -> str:
    """Where a set's samples came from."""
    more = f"; and {len(origins) - _ORIGINS} more" if len(origins) > _ORIGINS else ""
    return "; ".join(map(str, origins[:_ORIGINS])) + more if origins else UNKNOWN


def title_of(val_set: ShardSet) -> str:
    """The val set's, for titles."""
    return val_set.origins[0].title if val_set.origins else val_set.path


def evaluated_facts(val_set: ShardSet, images: int) -> dict[str, str]:
    """Which data, how many images and categories: the same for all runs on them."""
    return {
        "data set": told(val_set.origins),
        "evaluated": f"{images} images, {categories(val_set.labels)}, {val_set.path}",
    }


def categories(labels: LabelTable) -> str:
    """How many, and of what kind."""
    things = int(labels.is_thing.sum())
    return f"{len(labels)} categories ({things} things, {len(labels) - things} stuff)"


def trained_facts(store: Store, run: str) -> dict[str, str]:
    """What a finished run was trained on, how long and when, as far as its manifest and its data's say so."""
    found = records.read(store, f"{run}/{MANIFEST}", _Run)
    key = f"{found.train_set}/{MANIFEST}"
    of = records.read(store, key, _Set) if store.exists(key) else _Set()  # retention may have taken it
    images = found.recipe.train.batch * found.steps
    passes = f"{images / of.samples:.4g} epochs of {of.samples} images, " if of.samples else ""
    best = f"; the best weights of {found.best_of}" if found.best_of else ""
    init = f"; began with the weights of {shown(found.init)}" if found.init else ""
    steps = f"{found.steps} steps of {found.recipe.train.batch} images ({images} images seen)"
    workers = f", {found.workers} workers" if found.workers else ""
    return {
        "trained on": f"{told(of.origins)}, {found.train_set}",
        "training": f"{passes}{steps}{workers}, ended {written(store, run)}, {run}{best}{init}",
        "recipe": f"{found.recipe.name}, seed {found.recipe.train.seed}, trained by code {found.code}",
    }


def written(store: Store, path: str) -> str:
    """When what lies in a folder was finished, by the store's clock."""
    return date(store.stat(f"{path}/{MANIFEST}").modified)
