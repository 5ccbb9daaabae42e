"""How the workers of a run on one machine's own Ray find each other: by a file, so that none of them listens for it.

torch's TCPStore, Ray's way, listens on all of the machine's addresses and asks nobody for anything.
"""

import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed
from ray.train.torch import TorchConfig

_LOOPBACK = "127."


def torch_config(backend: str, folder: str) -> TorchConfig:
    """For TorchTrainer. folder: of this machine, empty, for its workers alone; of no use on a cluster."""
    if ray.util.get_node_ip_address().startswith(_LOOPBACK):
        return _ByFile(backend=backend, folder=folder)
    return TorchConfig(backend=backend)


@dataclass
class _ByFile(TorchConfig):
    folder: str = ""

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # how workers end is as Ray has it
    def on_start(self, worker_group: Any, backend_config: _ByFile) -> None:
        """Each start of the workers has a file of its own."""
        url, world = f"file://{backend_config.folder}/{uuid.uuid4().hex}", len(worker_group)
        given = (backend_config.backend, url, world, backend_config.timeout_s)
        ray.get([worker_group.execute_single_async(rank, _join, rank, *given) for rank in range(world)])


def _join(rank: int, backend: str, url: str, world: int, seconds: int) -> None:
    torch.distributed.init_process_group(
        backend, init_method=url, rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
