"""A SIGKILL at each step of retraining, and what the next run did."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from evaluation.champion import give, history
from infra.errors import TesseraError
from infra.store import Store, open_store
from pipelines.upload import upload
from preprocessing.inbox import WHOLE, decisions
from tests.day import data
from tests.day.chronicle import Chronicle
from tests.day.stage import Stage
from training.metrics import read_metrics

_TRAIN = """
from pipelines.job import TrainCoco
from pipelines.train_coco import train_coco
train_coco(TrainCoco.model_validate_json({job!r}))
"""
_RETRAIN = """
from pipelines.retrain import retrain
from pipelines.retrain_job import Retrain
job = Retrain(epochs=12, lr_share=1, options={{"upkeep.minutes": 0.02}})
state = retrain(job, return_state=True)
print("STATE", state.name, state.message, flush=True)
"""
_PATIENCE = 300.0


@dataclass(frozen=True)
class Kill:
    """A moment of retraining."""

    title: str
    reached: Callable[[Store, set[str]], bool]
    """Whether the store, or its keys, say that it is there."""


def _new(prefix: str, suffix: str = "") -> Callable[[Store, set[str]], bool]:
    """A key that was not there before the run."""
    return lambda store, keys: any(key.startswith(prefix) and key.endswith(suffix) for key in keys)


KILLS = (
    Kill("the upload is being read", _new("running/")),
    Kill("a shard of it is there", _new("precompute/shards/", ".json")),
    Kill("it was decided on", _new("uploads/")),
    Kill("the round was planned", _new("retrain/", "plan.json")),
    Kill("a checkpoint is there", _new("train/", ".pt")),
    Kill("the challenger is trained", _new("train/", "manifest.json")),
    Kill("a shard is evaluated", _new("evaluate/", ".json")),
    Kill("the challenger is evaluated", _new("evaluate/", "manifest.json")),
    Kill("it was promoted", _new("champion/")),
    Kill("the comparison is written", _new("retrain/", "compare.html")),
)


def small_store(stage: Stage, tell: Chronicle) -> Store:
    """A store with a champion and an upload, made once."""
    origin, folder = open_store("s3://day/kills/origin"), stage.folder / "kills"
    if folder.exists():
        return origin
    data.base(folder, 48, 40)
    job = {"data": str(folder), "recipe": "demo", "options": {"train.batch": 4}, "epochs": 1}
    run_code(stage, "kills-train", _TRAIN.format(job=json.dumps(job)), origin)
    (manifest,) = [e.key for e in origin.list("evaluate/") if e.key.endswith("/manifest.json")]
    tell.note(f"champion {give(origin, origin.url_for(manifest.removesuffix('/manifest.json')))}")
    arrived = data.arrival(stage.folder / "kills-upload", 5000, 100)
    upload(arrived, origin, "new")
    return origin


def play(stage: Stage, tell: Chronicle) -> None:
    """One chapter for each moment, each on a copy of one small store with a champion and an upload."""
    with tell.chapter("a small champion, and an upload"):
        origin = small_store(stage, tell)
    undisturbed = copy(origin, "undisturbed")
    with tell.chapter("undisturbed"):
        began = time.monotonic()
        tell.note(f"{retrained(stage, 'kills-undisturbed', undisturbed)} after {time.monotonic() - began:.0f} s")
    for number, kill in enumerate(KILLS):
        with tell.chapter(f"killed when {kill.title}"):
            _play(stage, tell, kill, copy(origin, f"kill-{number}"), undisturbed)


def _play(stage: Stage, tell: Chronicle, kill: Kill, store: Store, undisturbed: Store) -> None:
    name, before = f"kills-{store.url.rpartition('/')[2]}", {entry.key for entry in store.list()}
    process, end = stage.flow(name, _RETRAIN.format(), store.url), time.monotonic() + _PATIENCE
    while not kill.reached(store, {entry.key for entry in store.list()} - before):
        if process.poll() is not None or time.monotonic() > end:
            raise TesseraError(f"never came to it; see {stage.folder / name}.log")
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left, began = {entry.key for entry in store.list()} - before, time.monotonic()
    told = retrained(stage, f"{name}-next", store)
    tell.note(f"{len(left)} objects were there by then; the next run: {told}, after {time.monotonic() - began:.0f} s")
    heads, wanted = history(store), history(undisturbed)
    tell.expect(
        [e.run for e in heads] == [e.run for e in wanted], f"champions {[e.number for e in heads]}, the same runs"
    )
    tell.expect([e.pq for e in heads] == [e.pq for e in wanted], f"PQ {heads[-1].pq['all']:.2f}, as undisturbed")
    states = [decision.state for decision in decisions(store, heads[-1].line).values()]
    tell.expect(states == ["accepted"], "the upload was decided on once")
    steps = [row.step for row in read_metrics(store, heads[-1].run)]
    tell.expect(steps == [*range(1, len(steps) + 1)], f"every one of {len(steps)} steps is in the table once")
    again = retrained(stage, f"{name}-again", store)
    tell.expect("NothingNew" in again, f"a run after that: {again.split(' ')[0]}")


def retrained(stage: Stage, name: str, store: Store) -> str:
    """Run retrain on a store; the name of its last state and the message."""
    output = run_code(stage, name, _RETRAIN.format(), store)
    return output.rpartition("STATE ")[2].strip()


def run_code(stage: Stage, name: str, code: str, store: Store) -> str:
    """Its output when it has ended. TesseraError if it failed."""
    process = stage.flow(name, code, store.url)
    process.wait()
    output = (stage.folder / f"{name}.log").read_text(errors="replace")
    if process.returncode:
        raise TesseraError(f"{name} ended with {process.returncode}:\n{output[-2000:]}")
    return output


def copy(origin: Store, name: str) -> Store:
    """A store of this name beside another one, with the same objects."""
    target = open_store(f"{origin.url.rpartition('/')[0]}/{name}")
    for entry in sorted(origin.list(), key=lambda entry: entry.key.endswith(WHOLE)):  # last, as it was
        target.write(entry.key, origin.read(entry.key))
    return target
