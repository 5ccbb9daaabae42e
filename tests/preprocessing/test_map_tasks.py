"""ray_cluster.map_tasks: all results, a bounded window, and what tasks warn of."""

import logging
import os
import platform
import threading
import time
from collections.abc import Iterator

import pytest
import ray

from infra import interrupt, ray_cluster
from infra.errors import TesseraError
from infra.version import SHIPPED, code_version

pytestmark = pytest.mark.usefixtures("ray_local")


def warned(number: int) -> int:
    logging.getLogger("tessera.somewhere").warning("number %d is odd", number)
    logging.getLogger("tessera.somewhere").info("nobody asked")
    return number


def test_warnings_of_tasks_are_in_the_drivers_log_with_their_machine(caplog: pytest.LogCaptureFixture):
    assert sorted(ray_cluster.map_tasks(warned, [(1,), (3,)], lambda number: None)) == [1, 3]
    assert sorted(caplog.messages) == [f"{platform.node()}: number {n} is odd" for n in (1, 3)]


def test_arguments_are_taken_only_as_there_is_room(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_cluster, "_window", lambda: 2 + len(done) // 2)  # a cluster that grows
    monkeypatch.setattr(ray_cluster, "_LOOK_SECONDS", 0)
    taken, done, most = list[int](), list[int](), list[int]()

    def arguments() -> Iterator[tuple[int]]:
        for number in range(12):
            taken.append(number)
            most.append(len(taken) - len(done))
            yield (number,)

    assert sorted(ray_cluster.map_tasks(abs, arguments(), done.append)) == [*range(12)]
    assert max(most[:4]) <= 3
    assert max(most) > 3


def test_an_error_of_a_task_is_raised_as_it_was():
    with pytest.raises(TesseraError, match="'a' is no store"):
        ray_cluster.map_tasks(fails, [("a",)], lambda nothing: None)


def fails(name: str) -> None:
    raise TesseraError(f"{name!r} is no store")


def test_tasks_are_of_the_drivers_version():
    assert ray_cluster.map_tasks(_version, [()], lambda told: None) == [code_version()]
    assert SHIPPED not in os.environ


def _version() -> str:
    return os.environ[SHIPPED]


def sleeps() -> None:
    time.sleep(600)


def test_interrupted_work_leaves_no_task_behind():
    ends, begun = threading.Event(), threading.Semaphore(0)

    def work(wait) -> None:
        interrupt.interruptible(ends)
        with pytest.raises(interrupt.Interrupted):
            wait()

    waits = (
        lambda: ray_cluster.map_tasks(sleeps, [()], lambda nothing: None),
        lambda: ray_cluster.wait_for(ray.remote(sleeps).options(num_cpus=0).remote(), begun.release),
    )
    threads = [threading.Thread(target=work, args=[wait]) for wait in waits]
    for thread in threads:
        thread.start()
    assert begun.acquire(timeout=60)
    ends.set()
    for thread in threads:
        thread.join()
    assert ray_cluster.map_tasks(abs, [(-1,)], lambda number: None) == [1]  # its CPU is free
