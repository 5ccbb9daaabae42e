"""What is done to runs."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import psutil

from infra.errors import TesseraError
from tests.chaos.scene import Scene
from training import checkpoints

EXACT, NEAR = 1e-6, 1e-4
"""NEAR: another number of workers sums up the same images in another order, and training magnifies the last bits.

4e-5 was seen (2026-11-22); in one process, passes of 4 images instead of 8 from the first step on made 2.4e-4.
"""


@dataclass(frozen=True)
class Case:
    """A disturbance, and what must follow."""

    name: str
    title: str
    strike: Callable[[Scene], None]
    """Called when the run is at step `at`; blocks until all is done that is to be done to it."""
    at: int = 190
    restarts: bool = True
    """Whether the run must go on from a checkpoint; else it must not."""
    crews: tuple[int, ...] = (2,)
    """Workers of the finished run's steps, in the order in which they changed."""
    nodes: int | None = None
    """On how many nodes the workers are at the end."""
    least: int | None = None
    cpus: int = 2
    """Of each of the two nodes."""
    tolerance: float = EXACT
    environ: dict[str, str] = field(default_factory=dict)
    """Of the driver; {folder} is the case's."""


def nothing(scene: Scene) -> None:
    """The reference."""


def kill_worker(rank: int) -> Callable[[Scene], None]:
    """SIGKILL of a training worker's process."""

    def strike(scene: Scene) -> None:
        scene.mark(f"SIGKILL of worker {rank}")
        os.kill(scene.worker(rank).pid, signal.SIGKILL)

    return strike


def kill_driver(scene: Scene) -> None:
    """SIGKILL of the driver, and at once the same command again."""
    scene.mark("SIGKILL of the driver")
    scene.kill_driver()
    scene.start()


def kill_driver_then_one_worker(scene: Scene) -> None:
    """SIGKILL of the driver, and the same command again but for the number of workers."""
    scene.mark("SIGKILL of the driver")
    scene.kill_driver()
    scene.job = replace(scene.job, workers=1)
    scene.start()


def kill_driver_and_damage(scene: Scene) -> None:
    """SIGKILL of the driver; while nobody is there, the newest checkpoint loses its second half."""
    scene.mark("SIGKILL of the driver, newest checkpoint cut")
    pids = [worker.pid for worker in scene.workers().values()]
    scene.kill_driver()
    _until_gone(pids)
    run = next(e.key for e in scene.store.list("train/")).rsplit("/checkpoints/")[0]
    before, newest = checkpoints.steps_of(scene.store, run)[-2:]
    key = f"{run}/checkpoints/{newest:08d}.pt"
    whole = scene.store.read(key)
    scene.store.write(key, whole[: len(whole) // 2])
    scene.expected = before
    scene.say(f"checkpoint of step {newest} cut short; that of step {before} must be used")
    scene.start()


def kill_node(rank: int) -> Callable[[Scene], None]:
    """SIGKILL of all processes of the node of a worker."""

    def strike(scene: Scene) -> None:
        scene.mark(f"node of worker {rank} killed")
        scene.machine.kill(scene.worker(rank).node)

    return strike


def kill_node_and_bring_it_back(scene: Scene) -> None:
    """A node dies, and comes back when the run has gone on without it."""
    scene.rest(6)  # Ray looks for new nodes once a minute
    kill_node(1)(scene)
    scene.until(lambda: _works_with(scene, 1))
    scene.mark("a node comes back")
    scene.machine.add(1)
    scene.until(lambda: _works_with(scene, 2))
    scene.rest(0)


def kill_store(scene: Scene) -> None:
    """60 s without a store."""
    scene.mark("store killed for 60 s")
    with scene.machine.server.killed():
        scene.pass_seconds(60)
    scene.marked_until_now()


def hang_store(scene: Scene) -> None:
    """20 s in which the store answers nothing."""
    scene.rest(1)  # or there would be no steps left
    scene.mark("store hung for 20 s")
    with scene.machine.server.hung():
        scene.pass_seconds(20)
    scene.marked_until_now()


def _works_with(scene: Scene, workers: int) -> bool:
    told = [event for event in scene.events if "step" in event]
    return bool(told) and told[-1]["workers"] == workers


def _until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in pids):
        if time.monotonic() > end:
            raise TesseraError(f"workers {pids} outlived their driver by a minute")
        time.sleep(0.1)


CASES = (
    Case("reference", "undisturbed, 2 workers", nothing, restarts=False, nodes=2),
    Case("worker", "SIGKILL of worker 1", kill_worker(1)),
    Case("worker0", "SIGKILL of worker 0", kill_worker(0)),
    Case("driver", "SIGKILL of the driver, run again", kill_driver),
    Case("node", "a node dies", kill_node(0), nodes=1),
    Case("store", "store killed for 60 s", kill_store, restarts=False),
    Case(
        "hang",
        "store hung for 20 s, shards cached",
        hang_store,
        at=70,
        restarts=False,
        environ={"TESSERA_CACHE": "{folder}/cache"},
    ),
    Case(
        "elastic",
        "a node dies and comes back, 2 -> 1 -> 2 workers",
        kill_node_and_bring_it_back,
        at=90,
        crews=(2, 1, 2),
        nodes=2,
        least=1,
        cpus=1,
        tolerance=NEAR,
    ),
    Case("damage", "SIGKILL of the driver, newest checkpoint cut short", kill_driver_and_damage),
    Case(
        "fewer",
        "SIGKILL of the driver, run again with 1 worker",
        kill_driver_then_one_worker,
        crews=(2, 1),
        tolerance=NEAR,
    ),
)
