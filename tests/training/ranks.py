"""Several gloo processes on this machine, without Ray."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from preprocessing.shards import ShardSet
from training.loop import Place, train
from training.recipe import Recipe


@dataclass(frozen=True)
class Trained:
    """What one rank has at the end."""

    history: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]

    @property
    def losses(self) -> list[dict[str, float]]:
        return [row["losses"] for row in self.history]


def train_alone(recipe: Recipe, shards: ShardSet, store_url: str, place: Place | None = None) -> Trained:
    """A run in this process."""
    method, history = train(recipe, shards, store_url, place or Place(), None, lambda *_: None)
    return Trained(history, method.state_dict())


def train_ranks(recipe: Recipe, shards: ShardSet, store_url: str, world: int, folder: Path) -> list[Trained]:
    """A run in `world` processes; results by rank."""
    spawn(_rank, (recipe, shards, store_url, world, folder), nprocs=world)
    return [Trained(**torch.load(folder / f"{rank}.pt", weights_only=True)) for rank in range(world)]


def _rank(rank: int, recipe: Recipe, shards: ShardSet, store_url: str, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.save(vars(train_alone(recipe, shards, store_url, Place(rank, world))), folder / f"{rank}.pt")
    dist.destroy_process_group()
