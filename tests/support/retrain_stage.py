"""The flow retrain without server, Ray and training: what replaces them, and what a test asks of a store."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from evaluation.champion import history
from evaluation.evaluate import evaluation_path
from infra.artifacts import read_manifest
from infra.store import Store, open_store
from pipelines import retrain as flow
from pipelines.retrain_job import Retrain, read_line
from preprocessing.shards import ShardSet
from preprocessing.source import Index
from preprocessing.synthetic import CATEGORIES
from tests.support.coco_folder import CocoFolder, cut
from tests.support.retraining import (
    VAL,
    Base,
    clone,
    put,
    watch_changes,
    write_evaluation,
    write_run,
    write_upload,
)
from training.recipe import Recipe

STEPS = ("check_job", "look", "check_recipe", "take_in_uploads", "begin_round", "train_challenger", "settle_round")
Skill = Callable[[Recipe, ShardSet], int]
State = dict[str, object]
DATE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC")
"""When a page was written, to the minute."""


class Stage:
    """The parts that were replaced: how good challengers are, and what was trained and told."""

    def __init__(self) -> None:
        self.skill: Skill = lambda recipe, train_set: VAL
        self.trained: list[str] = []
        self.evaluated: list[str] = []
        self.told: list[str] = []
        self.sessions = 0

    def run_training(self, recipe, train_set, url, crew, *, init, check, watch):
        self.trained.append(recipe.run_path(train_set.path, init))
        return write_run(open_store(url), recipe, train_set, self.skill(recipe, train_set), init)

    def evaluate(self, recipe, run, val_set, url, gpus):
        store, path = open_store(url), evaluation_path(recipe, run.path, val_set.path)
        if read_manifest(store, path) is None:
            self.evaluated.append(run.path)
        return write_evaluation(store, recipe, run, val_set)

    @contextmanager
    def session(self, *_, **__) -> Iterator[None]:
        self.sessions += 1
        yield


def retrain(store: Store, **options) -> tuple[str, str]:
    """The name and the message of the state that the flow ends in."""
    state = flow.retrain.fn(Retrain(storage=store.url, **options))
    assert state.is_completed()
    return state.name, state.message


def upload(store: Store, folder: Path, name: str, first_id: int, spoiled: int = 0) -> None:
    made = CocoFolder(write_upload(folder / f"upload {name}", first_id, 2))
    for position in range(spoiled):
        cut(made.image(position))
    put(made.root, store, name)


def everything(store: Store) -> State:
    """All that a store holds but for times, and for what work in progress leaves when it is killed."""
    found: State = {}
    for entry in store.list():
        if entry.key.startswith(("running/", "probe-")):
            continue
        data: object = store.read(entry.key)
        if entry.key.startswith(("uploads/", "champion/")):
            data = {k: v for k, v in json.loads(data).items() if k != "time"}
        if entry.key.endswith(".html"):
            data = DATE.sub("", data.decode())
        found[entry.key] = data
    return found


def moments(store: Store, folder: Path, run: Callable[[], object]) -> list[Path]:
    """What a kill at each change of the store would leave behind, each state once."""
    found, seen = list[Path](), list[State]()

    def before(_key: str) -> None:
        now = everything(store)
        if now not in seen[-1:]:
            seen.append(now)
            found.append(folder / f"{len(found)}")
            clone(Path(store.url), found[-1])

    with pytest.MonkeyPatch.context() as patch:
        watch_changes(patch, store, before)
        run()
    return found


def champions(store: Store) -> list[tuple[int, str, str]]:
    return [(e.number, e.run, e.how) for e in history(store)]


def base_of(store: Store) -> Base:
    found = read_line(store)
    return Base(Index(CATEGORIES, (), ()), found.base, found.val_set)


def rounds_of(store: Store) -> list[str]:
    return sorted({entry.key.rpartition("/")[0] for entry in store.list("retrain/")})
