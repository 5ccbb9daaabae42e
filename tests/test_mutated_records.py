"""Whatever becomes of a JSON on the store, its readers refuse it by its URL, or give what it said: none ends in a
traceback, and none gives another number."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from evaluation import compare, predict_files, rounds
from evaluation.champion import current, history
from evaluation.compare import read_evaluation
from evaluation.evaluate import EvalJob, evaluate_shard, read_score
from evaluation.predict_plan import Work, claim
from evaluation.references import REFERS, texts_of
from evaluation.report import read_report
from evaluation.rounds import Round
from evaluation.summary import read_summary
from infra import in_use, records
from infra.errors import TesseraError
from infra.store import Store, open_store
from pipelines.retrain_job import read_line
from preprocessing import inbox
from preprocessing.inbox import Upload, decide, decisions
from preprocessing.sample import from_fields
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import read_set, read_shard
from tests.support.json_mutations import mutations
from tests.support.retraining import begin_line
from training import names
from training.recipes.generalist import debug
from training.run import read_run

Read = Callable[[Store, str], object]
EVERY = 10
"""By default each tenth mutation is tried; `slow` tries all."""
PLAUSIBLE = ["another of its type", "null", "a fraction", "negative", "huge float", "dropped"]
"""May be read as what it says: another name, a share of 1.9 %, no PQ of a category, a default. No shape tells of it."""


@dataclass
class Made:
    """A finished store, and what its JSONs are read by."""

    store: Store
    readers: dict[str, Read]
    """By key."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("mutated")
    store = open_store(str(folder / "store"))
    base = begin_line(folder, store, pictures=True)
    entry, recipe, shard = current(store), debug(), base.val_set.shards[0]
    facts = {"data": "d", "train": {"lr": 0.1}}
    names.give(store, "mine", entry.run, facts)
    upload = Upload("monday", "0" * 16, 3, 10, True)
    rejected = (inbox.Rejected(1, "a.jpg", "no image"),)
    decide(store, entry.line, upload, state="accepted", shards=base.train_set.path, samples=2, rejected=rejected)
    planned = Round(f"retrain/{'a' * 16}", entry.root, base.train_set.path, 1, entry.run, entry.run, ("monday-0",))
    rounds.begin(store, planned)
    job = EvalJob(recipe, store.url, entry.run, f"evaluate/{'c' * 16}", base.val_set.labels, shard)
    evaluate_shard(job)
    store.write(f"running/{'b' * 32}.json", json.dumps({"prefixes": ["train/"], "host": "h", "pid": 1}).encode())
    labels, ids = base.val_set.labels, shard.image_ids
    work = Work(store.url, entry.run, "in", f"{store.url}/predicted", "predictions", False, True)
    claim(work)
    row = {"key": "k", "file_name": "a.jpg", "png": "a.png", "height": 4, "width": 4, "segments_info": []}
    store.write("predicted/records/a.jpg.json", json.dumps(row | {"notes": [], "empty": "nothing"}).encode())
    fields = next(iter(read_shard_samples(store.url, shard)))
    store.write("sample.json", fields["json"])
    evaluation, run_shard = entry.evaluation, base.train_set.shards[0].key
    one = read_evaluation(store.url_for(evaluation))
    predicted = open_store(f"{store.url}/predicted")
    readers: dict[str, Read] = {
        "champion/000001.json": lambda s, _: [*map(str, history(s))],
        f"uploads/{entry.line}/{upload.title}.json": lambda s, _: decisions(s, entry.line),
        "names/train/mine.json": lambda s, _: names.refuse_changed(s, "mine", facts),
        f"{planned.path}/plan.json": lambda s, _: rounds.begin(s, planned),
        f"{entry.run}/manifest.json": lambda s, _: (read_run(s.url, entry.run), read_line(s).recipe),
        f"{evaluation}/manifest.json": lambda s, _: (read_report(recipe, s.url, evaluation), read_line(s)),
        f"{evaluation}/report.json": lambda s, _: (
            read_summary(s, evaluation),
            read_evaluation(s.url_for(evaluation)).summary,
        ),
        f"{evaluation}/images.json": lambda s, _: repr(read_evaluation(s.url_for(evaluation)).table),
        f"{evaluation}/predictions.json": lambda s, _: repr(compare._predictions(one, ids[:1])),
        f"{job.path}/shards/{Path(shard.key).stem}.json": lambda s, k: read_score(
            s, k, len(labels), ids
        ).score.to_json(),
        f"{base.val_set.path}/manifest.json": lambda s, _: read_set(s, base.val_set.path),
        run_shard.replace(".tar", ".json"): lambda s, _: read_shard(s, run_shard),
        f"running/{'b' * 32}.json": lambda s, k: records.read(s, k, in_use.Said).prefixes,
        "predicted/tessera-predict.json": lambda s, _: claim(work),
        "predicted/records/a.jpg.json": lambda s, _: predict_files._record(predicted, "a.jpg"),
        "sample.json": lambda s, k: repr(from_fields({**fields, "json": s.read(k)})),
    }
    return Made(store, readers)


def wrong_of(made: Made, every: int) -> list[str]:
    """Mutations that end in a traceback or are taken for what they are not."""
    counts, wrong = Counter[str](), list[str]()
    for key, read in made.readers.items():
        data = made.store.read(key)
        right = read(made.store, key)
        for what, mutated in [*mutations(data, b'{"kind": "other", "number": 7}')][::every]:
            made.store.write(key, mutated)
            try:
                found = read(made.store, key)
                if REFERS.match(key):
                    [*texts_of(made.store, key)]
                outcome = "right" if found == right else "plausible"
                wrong += [f"{key} {what}"] * (outcome != "right" and what.rpartition(": ")[2] not in PLAUSIBLE)
            except Exception as error:  # noqa: BLE001
                told = str(error)
                fine = isinstance(error, TesseraError) and told.isprintable() and len(told) < 1100
                outcome = "refused" if fine else "traceback"
                wrong += [] if fine else [f"{key} {what}: {type(error).__name__} {told[:200]}"]
            counts[outcome] += 1
        made.store.write(key, data)
    sys.stdout.write(f"\nrecords: tried {counts.total()}, {dict(counts)}\n")
    return wrong


def test_mutations_are_refused_or_right(made: Made):
    assert "\n".join(wrong_of(made, EVERY)) == ""


@pytest.mark.slow
def test_all_mutations_are_refused_or_right(made: Made):
    assert "\n".join(wrong_of(made, 1)) == ""
