"""Runs alone and as several gloo processes on this machine, without Ray; and methods that are out of the ordinary."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import spawn

from preprocessing.labels import LabelTable
from preprocessing.shards import ShardSet
from training.batch import Batch
from training.loop import NonFiniteLoss, Place, train
from training.methods.generalist.model import Generalist
from training.recipe import Recipe


@dataclass(frozen=True)
class Trained:
    """What one rank has at the end."""

    history: list[dict[str, Any]]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    """Of the last step, averaged over ranks."""
    failure: str = ""
    own: bool = False

    @property
    def losses(self) -> list[dict[str, float]]:
        return [row["losses"] for row in self.history]


def train_alone(recipe: Recipe, shards: ShardSet, store_url: str, place: Place | None = None) -> Trained:
    """A run in this process."""
    try:
        method, history = train(recipe, shards, store_url, place or Place(), None, lambda *_: None)
    except NonFiniteLoss as error:
        return Trained([], {}, {}, str(error), error.own)
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return Trained(history, method.state_dict(), gradients)


def train_ranks(
    recipes: dict[str, Recipe], shards: ShardSet, store_url: str, world: int, folder: Path
) -> dict[str, list[Trained]]:
    """Runs in `world` processes, one after another; results by recipe and rank."""
    spawn(_rank, (recipes, shards, store_url, world, folder), nprocs=world)
    return {
        name: [Trained(**torch.load(folder / f"{name} {rank}.pt", weights_only=True)) for rank in range(world)]
        for name in recipes
    }


def _rank(rank: int, recipes: dict[str, Recipe], shards: ShardSet, store_url: str, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for name, recipe in recipes.items():
        found = train_alone(recipe, shards, store_url, Place(rank, world))
        torch.save(vars(found), folder / f"{name} {rank}.pt")
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
