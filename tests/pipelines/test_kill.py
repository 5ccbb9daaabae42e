"""A killed run, started again by the same command, goes on where it was."""

import os
import signal
import time

import psutil
import pytest

from infra.store import open_store
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.pipelines.test_train_coco import run_flow

# it starts three times; on a busy machine that takes its time
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def coco(tmp_path):
    return write_set(tmp_path, SyntheticConfig(train=120, val=4, size=(64, 64), seed=3))


def kill_when(run, ready, timeout):
    """SIGKILL the flow's process alone once `ready()`; its Ray must end by itself."""
    end = time.monotonic() + timeout
    while not ready():
        assert run.poll() is None, run.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    # Ray's agents give up on their own a minute later
    children = [p for p in psutil.Process(run.pid).children(recursive=True) if "Agent" not in p.name()]
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, [p.cmdline() for p in alive]


def test_a_run_killed_in_precompute_and_in_training_computes_nothing_twice(coco, tmp_path):
    store = open_store(str(tmp_path / "store"))
    job = {"data": str(coco), "storage": store.url, "recipe": "debug", "epochs": 40, "workers": 1}

    def records():
        return {e.key: e.modified for e in store.list("precompute/shards/") if e.key.endswith(".json")}

    kill_when(run_flow(tmp_path, job), lambda: len(records()) >= 3, 400)
    first = records()
    assert not [e for e in store.list("precompute/") if e.key.endswith("manifest.json")] or len(first) < 31

    kill_when(run_flow(tmp_path, job), lambda: any("/checkpoints/" in e.key for e in store.list("train/")), 400)
    second = records()
    assert len(second) == 31  # 30 train shards of 4 images, 1 val shard
    assert {key: second[key] for key in first} == first

    run = run_flow(tmp_path, job)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    assert "going on from the checkpoint of step" in output
    assert records() == second
