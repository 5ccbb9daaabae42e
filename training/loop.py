"""The train loop: one worker's part of a run, without Ray."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from infra.errors import TesseraError
from preprocessing.shards import ShardSet
from training.batch import Batch
from training.methods.base import Method
from training.reader import BatchStream, load_batches
from training.recipe import Recipe, TrainConfig

log = logging.getLogger("tessera.train")

State = dict[str, Any]
"""What a run goes on from: method, optimizer, step, rng, history. Tensors and plain values only."""


@dataclass(frozen=True)
class Place:
    """Where this worker stands."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Progress:
    """One line of a run's history, averaged since the line before, of this worker's share of the batch."""

    step: int
    steps: int
    losses: dict[str, float]
    lr: float
    grad_norm: float
    images_per_s: float
    data_wait: float
    """Share of the time spent waiting for batches."""

    def __str__(self) -> str:
        losses = " ".join(f"{name} {value:.3f}" for name, value in self.losses.items())
        pace = f"{self.images_per_s:.1f} images/s, {self.data_wait:.0%} waiting for data"
        return f"step {self.step} of {self.steps}: {losses} | {pace}"


class NonFiniteLoss(TesseraError):
    """Training stopped before a step that would have spoiled the weights."""


def train(
    recipe: Recipe,
    shards: ShardSet,
    store_url: str,
    place: Place,
    state: State | None,
    report: Callable[[Progress, State | None], None],
) -> tuple[Method, list[dict[str, Any]]]:
    """Train `recipe` on `shards`, going on from `state` if there is one.

    `report` is called on every rank at the same steps, with a state when a checkpoint is due. Returns the
    trained method and the run's history, a row per report. Raises NonFiniteLoss on all ranks at once,
    before the optimizer's step.
    """
    config, steps = recipe.train, recipe.train.steps(shards.samples)
    torch.manual_seed(config.seed)
    method = recipe.build(shards.labels).to(place.device)
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = _Run(method, config, steps)
    if state is not None:
        run.restore(state)
    images, passes = config.split_batch(place.world)
    stream = BatchStream(shards, store_url, recipe.reader, images, place.rank, place.world, run.step * passes)
    trained = _distributed(method, place)
    batches, meter = load_batches(stream), _Meter()
    due = _report_steps(steps, config.checkpoints)
    method.train()
    while run.step < steps:
        losses, norm = _step(run, trained, batches, passes, place.device, meter)
        meter.add(losses, norm, config.batch)
        if run.step in due:
            progress = meter.progress(run.step, steps, run.optimizer.param_groups[0]["lr"])
            run.history.append(asdict(progress))
            report(progress, run.state() if due[run.step] else None)
    return method, run.history


@dataclass
class _Run:
    """What changes during a run."""

    method: Method
    config: TrainConfig
    steps: int
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        groups = self.method.parameter_groups(self.config.lr, self.config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=self.config.betas, fused=True)
        self.peaks = [group["lr"] for group in groups]

    def set_lr(self) -> None:
        """Linear warm-up, then cosine to 0 at the end of the run: a function of the step alone."""
        warmup = max(1, round(self.config.warmup * self.steps))
        share = min(1.0, (self.step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = share * peak

    def state(self) -> State:
        return {
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "history": self.history,
        }

    def restore(self, state: State) -> None:
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step, self.history = state["step"], list(state["history"])


def _step(
    run: _Run,
    trained: nn.Module,
    batches: Iterator[Batch],
    passes: int,
    device: torch.device,
    meter: "_Meter",
) -> tuple[dict[str, Tensor], float]:
    """One optimizer step over `passes` forward and backward passes; its losses and gradient norm."""
    run.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    keys: list[str] = []
    for i in range(passes):
        with meter.waiting():
            batch = next(batches)
        keys += batch.keys
        with _exchange(trained, i == passes - 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=run.config.bf16):
                losses = trained(batch.to(device), run.step)
            (torch.stack(list(losses.values())).sum() / passes).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach() / passes
    norm = float(nn.utils.clip_grad_norm_(run.method.parameters(), run.config.clip))
    if not math.isfinite(norm):  # after the exchange of gradients, so that all ranks see it
        told = {name: float(value) for name, value in sums.items()}
        raise NonFiniteLoss(f"step {run.step}: gradient norm {norm}, losses {told}, samples {', '.join(keys)}")
    run.set_lr()
    run.optimizer.step()
    run.step += 1
    return sums, norm


def _exchange(trained: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Gradients travel between workers once a step, in its last pass."""
    if isinstance(trained, DistributedDataParallel) and not wanted:
        return trained.no_sync()
    return nullcontext()


def _distributed(method: Method, place: Place) -> nn.Module:
    if place.world == 1:
        return method
    devices = [place.device] if place.device.type == "cuda" else None
    return DistributedDataParallel(method, device_ids=devices, find_unused_parameters=method.alternates)


def _report_steps(steps: int, checkpoints: int) -> dict[int, bool]:
    """Steps after which to report: 50 over the run; True where a checkpoint is due, the last one always."""
    saved = {round(steps * i / checkpoints) for i in range(1, checkpoints + 1)} - {0}
    told = {round(steps * i / 50) for i in range(1, 51)} - {0}
    return {step: step in saved for step in sorted(saved | told)}


class _Meter:
    """Averages between two reports."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.losses: dict[str, list[Tensor]] = {}
        self.norms: list[float] = []
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context whose time counts as waiting for data."""
        since = time.perf_counter()
        yield
        self.waited += time.perf_counter() - since

    def add(self, losses: dict[str, Tensor], norm: float, images: int) -> None:
        for name, value in losses.items():
            self.losses.setdefault(name, []).append(value)
        self.norms.append(norm)
        self.images += images

    def progress(self, step: int, steps: int, lr: float) -> Progress:
        seconds = time.perf_counter() - self.started
        losses = {name: float(torch.stack(values).mean()) for name, values in self.losses.items()}
        norm = sum(self.norms) / len(self.norms)
        result = Progress(step, steps, losses, lr, norm, self.images / seconds, self.waited / seconds)
        self._clear()
        return result
