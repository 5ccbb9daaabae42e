"""Several workers on one method: each with all of it (DDP), or each with a part (FSDP2). The arithmetic is the same."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from training.methods.base import Method

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where this worker stands."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sharded: bool = False
    """Weights and optimizer state lie in parts on the workers."""


def placed(method: Method, place: Place) -> Method:
    """The method on its device, in the memory layout that convolutions are fastest in, where that is allowed."""
    if not place.sharded:  # FSDP moves each part itself, and takes contiguous parameters only
        method.to(place.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return method


def spread(method: Method, place: Place) -> nn.Module:
    """What is called for losses, so that gradients are averaged over the workers.

    All workers must hold the same weights. With `place.sharded` the method itself is changed: its parameters become
    DTensors, and every call of losses or `predict` must be made by all workers together.
    """
    if place.sharded:
        mesh = init_device_mesh(place.device.type, (place.world,))
        for unit in (*_units(method), method):
            fully_shard(unit, mesh=mesh)
        register_fsdp_forward_method(method, "predict")
        return method
    if place.world == 1:
        return method
    devices = [place.device] if place.device.type == "cuda" else None
    return DistributedDataParallel(
        method, device_ids=devices, find_unused_parameters=method.alternates, gradient_as_bucket_view=True
    )


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """What is gathered and let go at once: the elements of the outermost lists of modules, as a backbone's layers."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (part for part in child if any(True for _ in part.parameters()))
        else:
            yield from _units(child)


def exchanging(trained: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """A context of a backward pass; gradients travel between the workers only where wanted."""
    if isinstance(trained, FSDPModule):
        trained.set_requires_gradient_sync(wanted)
    elif isinstance(trained, DistributedDataParallel) and not wanted:
        return trained.no_sync()
    return nullcontext()


def let_go(method: Method) -> None:
    """Keep only this worker's part again after calls of `predict`."""
    if isinstance(method, FSDPModule):
        method.reshard()


def clip_gradients(method: Method, largest: float) -> Tensor:
    """Scale gradients to a norm of at most `largest`; their norm before, a scalar on the device, alike everywhere."""
    norm = nn.utils.clip_grad_norm_(method.parameters(), largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole(state: T, place: Place) -> T:
    """A tree of tensors as copies on the CPU, parts put together. Called by all workers; of use on worker 0 only."""

    def copied(tensor: Tensor) -> Tensor | None:
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()  # by all workers together
        return tensor.detach().to("cpu", copy=True) if place.rank == 0 else None

    return tree_map_only(Tensor, copied, state)


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Whole tensors into a module that may be spread. Raises what load_state_dict does."""
    now = module.state_dict()
    module.load_state_dict({name: _like(value, now.get(name)) for name, value in weights.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Whole tensors into the optimizer of parameters that may be spread.

    Its moments must lie in memory as the parameters do: AdamW's fused kernel on CPUs goes by memory, and a state
    written by workers of another layout would be mixed up without an error.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {i: {k: _like(v, parameters[i]) for k, v in row.items()} for i, row in state["state"].items()}
    optimizer.load_state_dict(state | {"state": moments})


def _like(value: Any, like: Any) -> Any:
    """A copy in the layout, and the part, of another tensor of the same shape; counts are copied as they are."""
    if not isinstance(value, Tensor):
        return value
    if not isinstance(like, Tensor) or value.shape != like.shape:
        return value.clone()
    if isinstance(like, DTensor):
        whole_tensor = value.to(like.device).contiguous()
        return distribute_tensor(whole_tensor, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, dtype=value.dtype).copy_(value)


def agreed(value: T, place: Place) -> T:
    """Worker 0's value, on all of them."""
    if place.world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, device=place.device)
    return values[0]


def gathered(value: T, place: Place) -> list[T]:
    """Everybody's value, in the order of their ranks, on all of them."""
    if place.world == 1:
        return [value]
    values: list[Any] = [None] * place.world
    dist.all_gather_object(values, value)
    return values


def summed(tensor: Tensor, place: Place) -> Tensor:
    """The sum over workers, in place."""
    if place.world > 1:
        dist.all_reduce(tensor)
    return tensor
