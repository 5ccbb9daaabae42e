"""Runs alone and as several gloo processes on this machine, without Ray; and methods that are out of the ordinary."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import spawn

from preprocessing.labels import LabelTable
from preprocessing.shards import ShardSet
from training.batch import Batch
from training.checkpoints import State
from training.loop import NonFiniteLoss, Trainer, train
from training.methods.base import Method
from training.methods.generalist.model import Generalist
from training.metrics import Row
from training.parallel import Place
from training.recipe import Recipe
from training.recipes.generalist import debug
from training.shares import Plan


def recipe_of(upkeep: dict | None = None, **changes) -> Recipe:
    """The debug recipe in float32, with other train options."""
    base = debug()
    train = replace(base.train, **{"bf16": False, **changes})
    return replace(base, train=train, upkeep=replace(base.upkeep, **(upkeep or {})))


def trainer_of(recipe: Recipe, labels: LabelTable, steps: int) -> Trainer:
    """A trainer of a method with fresh weights, alone."""
    batch = recipe.train.batch
    return Trainer(recipe, recipe.build(labels), steps, Place(), Plan(batch, 1, 1).share(0, 1, batch))


@dataclass
class Recorder:
    """A loop.Watcher that keeps what it hears; `figures` are what every check measures."""

    rows: list[Row] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    checked: list[int] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    wants: Callable[[], bool] = lambda: False

    def says(self, line: str) -> None:
        self.lines.append(line)

    def row(self, row: Row, steps: int) -> None:
        self.rows.append(row)

    def wants_checkpoint(self) -> bool:
        return self.wants()

    def save(self, state: State) -> None:
        self.states.append(state)

    def check(self, method: Method, step: int) -> dict[str, float]:
        assert not method.training
        self.checked.append(step)
        return dict(self.figures)


@dataclass(frozen=True)
class Trained:
    """What one rank has at the end."""

    rows: list[Row]
    weights: dict[str, Tensor]
    """On rank 0."""
    states: list[State]
    """On rank 0."""
    failure: str = ""
    own: bool = False

    @property
    def losses(self) -> list[dict[str, float]]:
        return [row.losses for row in self.rows]

    @property
    def gradients(self) -> dict[int, Tensor]:
        """Of a run of one step, averaged over ranks, by the optimizer's number of the parameter."""
        (state,) = self.states
        rows = state["optimizer"]["state"]
        return {i: row["exp_avg"] / (1 - state["recipe"]["train"]["betas"][0]) for i, row in rows.items()}


def train_alone(
    recipe: Recipe,
    shards: ShardSet,
    store_url: str,
    place: Place | None = None,
    state: State | None = None,
) -> Trained:
    """A run in this process."""
    recorder = Recorder()
    try:
        weights, rows = train(recipe, shards, store_url, place or Place(), state, recorder)
    except NonFiniteLoss as error:
        return Trained([], {}, [], str(error), error.own)
    return Trained(rows, weights, recorder.states)


@dataclass(frozen=True)
class Ranks:
    """Runs of several processes, one after another: recipe, whether sharded, and the state to go on from."""

    recipe: Recipe
    sharded: bool = False
    state: State | None = None


def train_ranks(
    runs: dict[str, Ranks], shards: ShardSet, store_url: str, world: int, folder: Path
) -> dict[str, list[Trained]]:
    """Runs in `world` processes, one after another; results by run and rank."""
    spawn(_rank, (runs, shards, store_url, world, folder), nprocs=world)
    return {name: [pickle.loads((folder / f"{name} {rank}").read_bytes()) for rank in range(world)] for name in runs}


def _rank(rank: int, runs: dict[str, Ranks], shards: ShardSet, store_url: str, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for name, run in runs.items():
        found = train_alone(run.recipe, shards, store_url, Place(rank, world, sharded=run.sharded), run.state)
        (folder / f"{name} {rank}").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


class Noisy(Generalist):
    """Its losses are scaled by chance."""

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        draw = torch.rand(())
        return {"draw": draw} | {name: (0.5 + draw) * value for name, value in super().losses(batch, step).items()}


@dataclass(frozen=True, kw_only=True)
class NoisyRecipe(Recipe):
    """A recipe that trains Noisy."""

    def build(self, labels: LabelTable) -> Noisy:
        return Noisy(self.method, labels, self.evaluated)


class Spoiled(Generalist):
    """Its losses, or only their gradients, are not finite on a batch that holds a certain sample."""

    key = ""
    silent = False

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        found = super().losses(batch, step)
        if self.key in batch.keys:
            zero = 0 * self.network.instance_head.bias.sum()
            found["spoiled"] = zero.sqrt() if self.silent else (zero + 1) * float("inf")
        return found


@dataclass(frozen=True, kw_only=True)
class SpoiledRecipe(Recipe):
    """A recipe that trains Spoiled."""

    key: str
    silent: bool = False

    def build(self, labels: LabelTable) -> Spoiled:
        method = Spoiled(self.method, labels, self.evaluated)
        method.key, method.silent = self.key, self.silent
        return method


def noisy(recipe: Recipe) -> NoisyRecipe:
    return NoisyRecipe(**vars(recipe))


def spoiled(recipe: Recipe, key: str, silent: bool = False) -> SpoiledRecipe:
    return SpoiledRecipe(**vars(recipe), key=key, silent=silent)
