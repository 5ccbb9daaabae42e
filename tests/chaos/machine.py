"""What the runs stand on: a SeaweedFS server, and a Ray cluster of three nodes on this machine."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from infra.seaweed import S3Server, seaweed
from infra.store import Store, open_store
from preprocessing.synthetic import write_set
from tests.chaos.plan import DATA

_BUCKET = "chaos"
_HEALTH = {  # a node that is gone is given up after some seconds, not half a minute
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
_OBJECTS = 100 << 20  # bytes of a node's object store
_COORDINATOR = 22  # seconds: it looks every 20


class Machine:
    """A store, and nodes that can be killed and added. The head has no CPU: it holds the drivers and what they need.

    Only to be used from the main thread: Ray sets signal handlers for its nodes' processes.
    """

    def __init__(self, folder: Path, server: S3Server) -> None:
        """server: its environment is this process' already, and so the nodes'."""
        self.folder, self.server = folder, server
        self.data = write_set(folder / "data", DATA)
        head = {"num_cpus": 0, "object_store_memory": _OBJECTS, "include_dashboard": False, "_system_config": _HEALTH}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[str, tuple[Any, int]] = {}

    @property
    def address(self) -> str:
        """For ray.init."""
        return str(self.cluster.address)

    def store(self, case: str) -> Store:
        """A root of its own for each case: what a run is called depends on its config alone."""
        return open_store(f"s3://{_BUCKET}/{case}")

    def arrange(self, cpus: int, known: bool) -> None:
        """Have two nodes of so many CPUs beside the head, and no others.

        known: wait until Ray's autoscaling coordinator has seen new ones, or an elastic run starts with too few.
        """
        new = len(self._nodes) < 2 or any(has != cpus for _, has in self._nodes.values())
        for name, (node, has) in list(self._nodes.items()):
            if has != cpus:
                del self._nodes[name]
                self.cluster.remove_node(node)
        while len(self._nodes) < 2:
            self.add(cpus)
        if new and known:
            time.sleep(_COORDINATOR)

    def add(self, cpus: int) -> None:
        """One more node."""
        node = self.cluster.add_node(num_cpus=cpus, object_store_memory=_OBJECTS)
        self._nodes[node.node_id] = node, cpus

    def kill(self, name: str) -> None:
        """SIGKILL all processes of a node, its raylet first, so that nobody can report the others' death."""
        node, _ = self._nodes.pop(name)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in (raylet, *raylet.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                os.kill(process.pid, signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=False)


@contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """All parts up; this process' environment leads to the store from now on."""
    with seaweed(folder / "store", _BUCKET) as server:
        os.environ.update(server.environ())
        os.environ.update({"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"})
        started = Machine(folder, server)
        try:
            yield started
        finally:
            started.cluster.shutdown()
