"""Which process on which node is which training worker: for whoever wants to kill one of them."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import ray

from preprocessing.pictures import Picture
from training.methods.base import Method
from training.parallel import Place

PAUSE = "pause"


@dataclass(frozen=True)
class Worker:
    """A training worker, as it said itself."""

    rank: int
    world: int
    pid: int
    node: str
    """Ray's id of its node, hexadecimal."""
    time: float
    """When it said so, seconds since 1970."""


@dataclass(frozen=True)
class Whereabouts:
    """A ray_train.Check that measures nothing: each worker leaves word of itself in a folder of this machine.

    A number in the file `pause` makes each of them rest for so many seconds, so that a run can last without more steps.
    """

    folder: str

    def __call__(self, method: Method, place: Place) -> tuple[dict[str, float], dict[str, Picture]]:
        """No figures, no pictures."""
        node = ray.get_runtime_context().get_node_id()
        told = Worker(place.rank, place.world, os.getpid(), node, time.time())
        path = Path(self.folder) / f"{place.rank}.json"
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(asdict(told)))
        partial.replace(path)
        pause = Path(self.folder) / PAUSE
        time.sleep(float(pause.read_text()) if pause.exists() else 0)
        return {}, {}


def workers(folder: Path) -> dict[int, Worker]:
    """The workers by rank that have left word."""
    told = [Worker(**json.loads(path.read_text())) for path in folder.glob("*.json")]
    world = max(told, key=lambda one: one.time).world if told else 0
    return {one.rank: one for one in told if one.rank < world}  # of a larger group before there may be others
