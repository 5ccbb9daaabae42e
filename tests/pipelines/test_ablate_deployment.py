"""A grid through `prefect deployment run`, on S3: one trial's worker is killed, another trial fails."""

import io
import json
import re
import threading

import pyarrow.parquet as pq
import pytest

from infra.store import open_store
from pipelines.ablate_job import Ablate
from preprocessing.shards import read_set
from tests.pipelines.test_deployment import job, prefect, train_workers, until  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ENDED = r"\b(COMPLETED|FAILED|CRASHED)\b"


def run_grid(prefect, asked: dict) -> tuple[str, str]:  # noqa: F811
    """How the flow run ended, and its log."""
    output = prefect("deployment", "run", "ablate/ablate", "--param", f"job={json.dumps(asked)}")
    run_id = re.search(r"UUID: ([0-9a-f-]{36})", output)[1]
    until(lambda: re.search(ENDED, prefect("flow-run", "inspect", run_id)), 900)
    state = re.search(ENDED, prefect("flow-run", "inspect", run_id))[1]
    return state, prefect("flow-run", "logs", run_id)


def table(store, log: str) -> list[dict]:
    (folder,) = set(re.findall(r"(ablate/[0-9a-f]+)/report\.html", log.replace("\n", "")))
    return pq.read_table(io.BytesIO(store.read(f"{folder}/table.parquet"))).to_pylist()


def trainings(log: str) -> int:
    return len(re.findall(r"recipe generalist/debug: \d+", log))


def damage_the_last(store, asked: dict) -> str:
    """Once the train split's shards are there, leave a checkpoint that is none in the last trial's folder; its key."""

    def train_sets():
        found = [e.key for e in store.list("precompute/") if e.key.endswith("/manifest.json")]
        sets = [read_set(store, key.removesuffix("/manifest.json")) for key in found]
        return [one for one in sets if one is not None and one.config.grid is not None]

    until(train_sets, 300)
    run = Ablate(**asked).trials()[-1].chosen.run_path(train_sets()[0].path)
    key = f"{run}/checkpoints/00000001.pt"
    store.write(key, b"no checkpoint")
    return key


def kill_one(store) -> None:
    """Once a trial has a checkpoint, the process that trains it, or the one beside it."""
    until(lambda: any(entry.key.endswith(".pt") and entry.size > 100 for entry in store.list("train/")), 300)
    until(train_workers, 60)
    train_workers()[0].kill()


def test_a_killed_trial_goes_on_a_failing_one_is_told_and_one_more_value_trains_only_what_is_new(prefect, job):  # noqa: F811
    store = open_store(job["storage"])
    asked = job | {"epochs": 60, "seeds": [0, 1], "budget": 2}
    asked["grid"] = {"train.lr": [1e-3, 2e-3], "method.dice": [0, 1]}
    damaged: list[str] = []
    others = [threading.Thread(target=lambda: damaged.append(damage_the_last(store, asked)))]
    others.append(threading.Thread(target=kill_one, args=[store]))
    for thread in others:
        thread.start()
    state, log = run_grid(prefect, asked)
    assert state == "FAILED"
    assert "1 of 8 trials failed, the table has the others" in log.replace("\n", " ")
    attempts = set(re.findall(r"\[(lr=[^]]*)\] going on from", log))
    assert len(attempts - {"lr=0.002, dice=1, seed 1"}) == 1  # that one has the damaged checkpoint
    rows = table(store, log)
    (failed,) = [row for row in rows if row["error"] is not None]
    assert (failed["train.lr"], failed["method.dice"], failed["seed"]) == (2e-3, 1, 1)
    assert "are damaged" in failed["error"]
    assert len([row for row in rows if row["PQ"] is not None]) == 7

    store.delete(damaged[0])
    state, log = run_grid(prefect, asked | {"grid": {"train.lr": [1e-3, 2e-3, 3e-3], "method.dice": [0, 1]}})
    assert state == "COMPLETED"
    assert "12 trials, 7 of them are there already" in log
    assert trainings(log) == 5  # the new value's four, and the one that failed
    assert [row["error"] for row in table(store, log)] == [None] * 12
