"""Ray Train around the train loop: workers, checkpoints on the store, going on after a failure."""

import json
import logging
import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from safetensors.torch import save

from infra import artifacts, ray_cluster
from infra.errors import TesseraError
from infra.store import open_store
from preprocessing.shards import ShardSet, read_set
from training.loop import NonFiniteLoss, Place, Progress, State, train
from training.reader import BatchStream
from training.recipe import Recipe
from training.run import WEIGHTS, TrainedRun, read_run

log = logging.getLogger("tessera.train")


@dataclass(frozen=True)
class TrainJob:
    """What one worker needs."""

    recipe: Recipe
    store_url: str
    train_set: str
    run: str


def run_training(recipe: Recipe, train_set: ShardSet, store_url: str, workers: int, gpus: bool) -> TrainedRun:
    """Train, or return the run that is finished already. Needs a Ray connection.

    A run that was interrupted goes on from its newest checkpoint. Raises TesseraError when a batch cannot
    be split exactly, when there are fewer shards than readers, and when training meets a non-finite loss.
    """
    store = open_store(store_url)
    path = recipe.run_path(train_set.path)
    finished = read_run(store_url, path)
    if finished is not None:
        log.info("trained already: %s", path)
        return finished
    images, passes = recipe.train.split_batch(workers)
    radius = math.ceil(recipe.method.distance_radius)
    BatchStream(train_set, store_url, recipe.reader, images, 0, workers, radius=radius)  # refuses here, not there
    steps = recipe.train.steps(train_set.samples)
    share = f"{recipe.train.batch} images = {workers} workers x {passes} passes x {images} images"
    log.info("recipe %s: %d steps of %s", recipe.name, steps, share)
    started = time.monotonic()
    board = _Board.options(num_cpus=0).remote()  # type: ignore[attr-defined]
    job = TrainJob(recipe, store.url, train_set.path, path)
    task = ray.remote(_fit).options(num_cpus=0, max_retries=0).remote(job, workers, gpus, board)
    try:
        ray_cluster.wait_for(task, lambda: _log_lines(board))
    except RayError as error:
        _raise_failure(board, error)  # what a worker said of it is worth more than Ray's account of how it ended
        raise
    _raise_failure(board)
    content = {
        "recipe": recipe,
        "train_set": train_set.path,
        "steps": steps,
        "workers": workers,
        "seconds": time.monotonic() - started,
        "history": json.loads(store.read(f"{path}/history.json")),
    }
    artifacts.write_manifest(store, path, content)
    return TrainedRun.of(path, content)


def _raise_failure(board: Any, cause: Exception | None = None) -> None:
    failure = ray.get(board.failure.remote())
    if failure:
        raise TesseraError(failure) from cause


def _fit(job: TrainJob, workers: int, gpus: bool, board: Any) -> None:
    """Runs as a Ray task: `fit` blocks, and a cancelled flow must not wait for it."""
    TorchTrainer(
        _worker,
        train_loop_config={"job": job, "board": board},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name="ray",  # the same name and path find the checkpoints of an interrupted run
            storage_path=f"{job.store_url}/{job.run}",
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def _worker(config: dict[str, Any]) -> None:
    job, board = config["job"], config["board"]
    context, store = ray.train.get_context(), open_store(job.store_url)
    place = Place(context.get_world_rank(), context.get_world_size(), get_device())

    def report(progress: Progress, state: State | None) -> None:
        if place.rank == 0:
            board.say.remote(str(progress))
        if state is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if place.rank == 0:
                torch.save(state, Path(folder) / "state.pt")
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report(asdict(progress), checkpoint=checkpoint)

    shards, state = read_set(store, job.train_set), _newest_state()
    assert shards is not None  # the flow made it before
    if state is not None and place.rank == 0:
        board.say.remote(f"going on from the checkpoint of step {state['step']}")
    try:
        method, history = train(job.recipe, shards, job.store_url, place, state, report)
    except NonFiniteLoss as error:  # on all ranks at once, and a restart would meet it again
        ray.get(board.fail.remote(str(error), error.own))
        return
    except TesseraError as error:  # perhaps on this rank alone, and the others must not wait for it
        ray.get(board.fail.remote(str(error), True))
        raise
    if place.rank == 0:
        weights = {name: value.contiguous().cpu() for name, value in method.state_dict().items()}
        store.write(f"{job.run}/{WEIGHTS}", save(weights))
        store.write(f"{job.run}/history.json", json.dumps(history).encode())


def _newest_state() -> State | None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / "state.pt", weights_only=True, map_location="cpu")


@ray.remote
class _Board:
    """Where workers leave what the flow's log shows: their own output stays on their machines."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.problem = ""

    def say(self, line: str) -> None:
        self.lines.append(line)

    def fail(self, problem: str, own: bool) -> None:
        """All workers fail at once; the one whose samples are at fault is to be heard."""
        if own or not self.problem:
            self.problem = problem

    def failure(self) -> str:
        return self.problem

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


def _log_lines(board: Any) -> None:
    for line in ray.get(board.take.remote()):
        log.info("%s", line)
