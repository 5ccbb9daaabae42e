"""kill -9 of a Ray worker, the driver and the store during precompute: the result is that of an undisturbed run."""

import hashlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from infra.seaweed import S3Server, seaweed
from infra.store import Store, open_store
from preprocessing.synthetic import SyntheticConfig, write_set

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# a tenth of a second a shard: time to be killed
DRIVER = """
import logging, sys
from infra.errors import TesseraError
from infra.ray_cluster import session
from preprocessing.coco import read_index
from preprocessing.ray_precompute import precompute
from preprocessing.shards import ShardConfig
logging.basicConfig(level=logging.INFO)
try:
    with session("local"):
        config = ShardConfig(grid=(1000, 1000), radius=100, samples=1)
        precompute("train", read_index(sys.argv[1], "train2017"), config, sys.argv[2])
except TesseraError as error:
    sys.exit(f"refused: {error}")
"""
SHARDS = 24


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("coco"), SyntheticConfig(train=SHARDS, val=1, size=(48, 48)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server of its own: it is killed."""
    with pytest.MonkeyPatch.context() as patch, seaweed(tmp_path_factory.mktemp("killed"), "kills") as running:
        for name, value in running.environ().items():
            patch.setenv(name, value)
        yield running


@pytest.fixture(scope="module")
def undisturbed(coco: Path, server: S3Server) -> dict[str, str]:
    store = fresh(server)
    run = start(coco, store)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    return hashes(store)


def fresh(server: S3Server) -> Store:
    return open_store(f"s3://{server.bucket}/{uuid.uuid4().hex}")


def start(coco: Path, store: Store) -> subprocess.Popen:
    command = [sys.executable, "-c", DRIVER, str(coco), store.url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def hashes(store: Store) -> dict[str, str]:
    return {e.key: hashlib.sha256(store.read(e.key)).hexdigest() for e in store.list("precompute/")}


def records(store: Store) -> dict[str, object]:
    found = store.list("precompute/shards/")
    return {e.key: e.modified for e in found if e.key.endswith(".json")}


def when(ready: Callable[[], bool], run: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert run.poll() is None, run.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def end_well(coco: Path, store: Store) -> None:
    run = start(coco, store)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output


def test_a_killed_worker_costs_its_shard(coco: Path, server: S3Server, undisturbed: dict[str, str]):
    store = fresh(server)
    run = start(coco, store)
    when(lambda: len(records(store)) >= 4, run)
    workers = [p for p in psutil.Process(run.pid).children(recursive=True) if p.name().startswith("ray::compute")]
    assert workers
    for worker in workers:
        worker.kill()
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert hashes(store) == undisturbed


def test_a_killed_driver_leaves_work_that_a_rerun_takes_up(coco: Path, server: S3Server, undisturbed: dict[str, str]):
    store = fresh(server)
    run = start(coco, store)
    when(lambda: len(records(store)) >= 4, run)
    # Ray's two agents go last, after a minute; they compute nothing
    children = [p for p in psutil.Process(run.pid).children(recursive=True) if "Agent" not in p.name()]
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, [process.cmdline() for process in alive]
    before = records(store)
    assert 4 <= len(before) < SHARDS
    end_well(coco, store)
    assert hashes(store) == undisturbed
    assert {key: records(store)[key] for key in before} == before  # none was written again


def test_a_killed_store_that_comes_back_loses_nothing(coco: Path, server: S3Server, undisturbed: dict[str, str]):
    store = fresh(server)
    run = start(coco, store)
    when(lambda: len(records(store)) >= 4, run)
    before = records(store)
    with server.killed():
        time.sleep(3)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert hashes(store) == undisturbed
    assert {key: records(store)[key] for key in before} == before
