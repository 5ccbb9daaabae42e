"""Ray Train around the train loop: workers on any nodes, restarted after a failure, as many as there are.

Checkpoints are our own (training.checkpoints), read and written by the workers: Ray only places and restarts them.
"""

import logging
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra import artifacts, ray_cluster, records
from infra.errors import TesseraError
from infra.in_use import in_use
from infra.store import open_store
from infra.version import code_version
from preprocessing.pictures import Picture
from preprocessing.shards import ShardSet, read_set
from training import checkpoints, tensorboard
from training.board import STEPPING, Board
from training.checkpoints import State
from training.dry_run import DoesNotFit
from training.loop import NonFiniteLoss, train
from training.methods.base import Method
from training.metrics import Row, write_metrics
from training.parallel import Place, agreed, gathered
from training.ray_group import torch_config
from training.recipe import Recipe
from training.run import TrainedRun, finish_best, forget_lost, read_run, start_weights, write_weights
from training.shares import Crew

_SILENT_SECONDS = 180.0  # before the flow's log says that nothing happens
_UNPLACED = ("PENDING", "PREPARED", "RESCHEDULING")  # states of a placement group without its workers' places
_MACHINES_TOLD = 8
_MINUTES_BELOW = 2.0  # between checkpoints of a group that is smaller than it is to be
log = logging.getLogger("tessera.train")


class Check(Protocol):
    """Measures a method while it is trained, on all workers at once."""

    def __call__(self, method: Method, place: Place) -> tuple[dict[str, float], dict[str, Picture]]:
        """(figures by name, the same on every worker; pictures by title, on worker 0)."""


class Watch(Protocol):
    """Hears how far a run is: of the newest row, at most once a second."""

    def __call__(self, row: Row, steps: int) -> None: ...


@dataclass(frozen=True)
class TrainJob:
    """What every worker needs."""

    recipe: Recipe
    store_url: str
    train_set: str
    run: str
    init: str | None
    crew: Crew
    check: Check | None
    board: Any


def run_training(
    recipe: Recipe,
    train_set: ShardSet,
    store_url: str,
    crew: Crew,
    *,
    init: str | None = None,
    check: Check | None = None,
    watch: Watch = lambda row, steps: None,
) -> TrainedRun:
    """Train, or return the run that is finished already. Needs a Ray connection.

    A run that was interrupted goes on from its newest checkpoint. init: folder of a run whose weights it starts with.
    Raises TesseraError when the batch cannot be shared, when training meets a non-finite loss, when a batch does not
    fit into memory, and when three attempts in a row did not get past one checkpoint.
    """
    store, path = open_store(store_url), recipe.run_path(train_set.path, init)
    with in_use(store, f"{path}/"):
        forget_lost(store, path)
        finished = read_run(store_url, path)
        if finished is not None:
            log.info("trained already: %s", path)
            return finished
        told = crew.told(recipe.plan(train_set), recipe.train.micro_batch)
        log.info("recipe %s: %d steps of %s", recipe.name, recipe.train.steps(train_set.samples), told)
        started, board = time.monotonic(), ray.remote(Board).options(num_cpus=0, scheduling_strategy=_here()).remote()
        _train(TrainJob(recipe, store.url, train_set.path, path, init, crew, check, board), watch)
        steps, seconds = recipe.train.steps(train_set.samples), time.monotonic() - started
        content = {
            "recipe": recipe,
            "train_set": train_set.path,
            "init": init,
            "steps": steps,
            "workers": crew.workers,
            "seconds": seconds,
            "code": code_version(),
        }
        best = finish_best(store, path, content)
        if best is not None:
            log.info("best of the checked weights: PQ %.1f after step %d, %s", best["pq"], best["step"], best["run"])
        artifacts.write_manifest(store, path, content | {"best": best})
        return TrainedRun(path, steps, seconds)


def _train(job: TrainJob, watch: Watch) -> None:
    """Until the run's weights are written. TesseraError with what a worker said of its failure."""
    task = ray.remote(_fit).options(num_cpus=0, max_retries=0, scheduling_strategy=_here()).remote(job)
    try:
        ray_cluster.wait_for(task, _Listener(job.board, watch))
    except RayError as error:
        _raise_failure(job.board, error)  # what a worker said of it is worth more than Ray's account of how it ended
        raise
    _raise_failure(job.board)


def _here() -> NodeAffinitySchedulingStrategy:
    """The driver's node: what dies with another node must not take the run along."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class _Listener:
    """Passes on what workers left on the board, and says when that was nothing for long."""

    def __init__(self, board: Any, watch: Watch) -> None:
        self.board, self.watch, self.heard = board, watch, time.monotonic()

    def __call__(self) -> None:
        lines, latest = ray.get(self.board.take.remote())
        for line in lines:
            log.info("%s", line)
        if latest is not None:
            self.watch(*latest)
        silent = time.monotonic() - self.heard
        if lines or latest is not None:
            self.heard = time.monotonic()
        elif silent > _SILENT_SECONDS:
            log.warning("no step since %.0f min: %s", silent / 60, self._why())
            self.heard = time.monotonic()

    def _why(self) -> str:
        doing = ray.get(self.board.does.remote())
        if doing == STEPPING:
            return "the workers wait for the store or for each other"
        groups = ray.util.placement_group_table().values()
        if not doing and any(group["state"] in _UNPLACED for group in groups):
            return "the workers wait for nodes, Ray has too few free CPUs or GPUs for them: see `ray status`"
        return "the workers are starting: weights, a dry run and the first images come before it"


def _raise_failure(board: Any, cause: Exception | None = None) -> None:
    failure = ray.get(board.failure.remote())
    if failure:
        raise TesseraError(failure) from cause


def _fit(job: TrainJob) -> None:
    """Runs as a Ray task: `fit` blocks, and a cancelled flow must not wait for it."""
    crew = job.crew
    size: Any = (crew.least, crew.workers) if crew.least else crew.workers  # Ray's hints do not know of ranges
    strategy = "PACK" if crew.gpus else "SPREAD"  # GPUs of a node are near each other; CPUs have enough to do
    with tempfile.TemporaryDirectory(prefix="tessera-train-") as folder:
        TorchTrainer(
            _worker,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(num_workers=size, use_gpu=crew.gpus, placement_strategy=strategy),
            torch_config=torch_config("nccl" if crew.gpus else "gloo", folder),
            run_config=RunConfig(
                storage_path=folder,  # holds nothing that lasts
                failure_config=FailureConfig(max_failures=-1),  # for weeks of them; _begin ends those without progress
                callbacks=[_Problems(job.board)],  # type: ignore[list-item]  # Ray's hints are of an earlier version
            ),
        ).fit()


def _worker(config: dict[str, Any]) -> None:
    job: TrainJob = config["job"]
    context, store = ray.train.get_context(), open_store(job.store_url)
    rank, world = context.get_world_rank(), context.get_world_size()
    place = Place(rank, world, get_device(), job.crew.sharded and world > 1)
    warned = ray_cluster.Warnings(lambda line: job.board.says.remote(f"worker {rank}: {line}"))
    logging.getLogger("tessera").addHandler(warned)
    watcher = _Watcher(job, place)
    try:
        state = _begin(job, place)
        if state is None:
            return
        shards = read_set(store, job.train_set)
        assert shards is not None  # the flow made it before
        init = start_weights(job.recipe, shards.labels, job.store_url, job.init) if job.init and not state else None
        weights, rows = train(job.recipe, shards, job.store_url, place, state or None, watcher, init)
        if rank == 0:
            watcher.publish(rows)  # once more: an earlier attempt may have died just after its last checkpoint
            write_weights(store, job.run, weights)
    except NonFiniteLoss as error:  # on all workers at once, and a restart would meet it again
        watcher.spoilt(error)
    except DoesNotFit as error:
        if not state:  # in the middle of a run it may be that a dying process still holds memory
            ray.get(job.board.fails.remote(str(error), True))
        raise
    finally:
        watcher.close()


class _Problems(UserCallback):
    """Tells the board why workers ended, also those that could not say so themselves."""

    def __init__(self, board: Any) -> None:
        self.board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        told = [f"worker {rank}: {type(e).__name__}: {_first_line(e)}" for rank, e in worker_exceptions.items()]
        own = [f"worker {rank}: {e}" for rank, e in worker_exceptions.items() if isinstance(e, TesseraError)]
        self.board.stumbles.remote((own or told)[0])  # the others' connections broke for it


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "").strip()


def _begin(job: TrainJob, place: Place) -> State | None:
    """The state to go on from, {} for none; None where the run is to end: the same on all workers."""
    store = open_store(job.store_url)
    state, ends, problem = None, False, ""
    if place.rank == 0:
        try:
            state = checkpoints.newest(store, job.run)
        except TesseraError as error:  # an attempt like any other, so that there is an end to them
            problem = str(error)
        ends = ray.get(job.board.begins.remote(state["step"] if state else 0, place.world))
    step, ends, problem = agreed((state["step"] if state else 0, ends, problem), place)
    if ends:
        return None
    if problem:
        raise TesseraError(problem)
    _say_where(job, place)
    if state and state["code"] != code_version():
        log.warning("the checkpoint of step %d was written by %s, this is %s", step, state["code"], code_version())
    if step and place.rank > 0:
        state = checkpoints.read_state(store, job.run, step)
    return state or {}


def _say_where(job: TrainJob, place: Place) -> None:
    machines = Counter(gathered(platform.node(), place))
    if place.rank == 0 and place.world > 1:
        told = ", ".join(f"{name} ({count})" for name, count in machines.most_common(_MACHINES_TOLD))
        more = f" and {len(machines) - _MACHINES_TOLD} more machines" if len(machines) > _MACHINES_TOLD else ""
        job.board.says.remote(f"{place.world} workers: {told}{more}")


class _Watcher:
    """loop.Watcher of one worker: tells the board, writes checkpoints, metrics and TensorBoard's files."""

    def __init__(self, job: TrainJob, place: Place) -> None:
        self.job, self.place, self.store = job, place, open_store(job.store_url)
        self.writer = checkpoints.Writer(self.store, job.run, job.recipe.upkeep.keep, self._saved)
        self.saved = time.monotonic()

    def says(self, line: str) -> None:
        if self.place.rank == 0:
            self.job.board.says.remote(line)

    def row(self, row: Row, steps: int) -> None:
        if self.place.rank == 0:
            self.job.board.row.remote(row, steps)

    def wants_checkpoint(self) -> bool:
        """The group is started anew as soon as it can grow, so a small one saves more often."""
        minutes = self.job.recipe.upkeep.minutes
        grows = self.place.world < self.job.crew.workers
        return time.monotonic() - self.saved > 60 * (min(_MINUTES_BELOW, minutes) if grows else minutes)

    def save(self, state: State) -> None:
        self.saved = time.monotonic()
        self.writer.save(state)

    def check(self, method: Method, step: int) -> dict[str, float]:
        if self.job.check is None:
            return {}
        figures, panels = self.job.check(method, self.place)
        if panels:
            self.writer.do(partial(tensorboard.write_panels, self.store, self.job.run, step, time.time(), panels))
        return figures

    def spoilt(self, error: NonFiniteLoss) -> None:
        """Leave the worker's samples on the store, and the reason with the flow."""
        facts = {"step": error.step, "gradient_norm": error.norm, "losses": error.losses, "samples": error.keys}
        key = f"{self.job.run}/non_finite/{error.step:08d}-{self.place.rank}.json"
        self.store.write(key, records.to_json(facts))
        ray.get(self.job.board.fails.remote(str(error), error.own))

    def close(self) -> None:
        self.writer.close()

    def publish(self, rows: Sequence[Row]) -> None:
        write_metrics(self.store, self.job.run, rows)
        tensorboard.write_scalars(self.store, self.job.run, rows)

    def _saved(self, state: State) -> None:
        self.publish([Row(**row) for row in state["rows"]])
