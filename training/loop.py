"""The train loop: one worker's part of a run, without Ray."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from infra.errors import TesseraError
from preprocessing.shards import ShardSet
from training.batch import Batch
from training.methods.base import Method
from training.reader import BatchStream, load_batches
from training.recipe import Recipe, TrainConfig

State = dict[str, Any]
"""What a run goes on from: method, average, optimizer, step, history. Tensors and plain values only."""


@dataclass(frozen=True)
class Place:
    """Where this worker stands."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Progress:
    """One line of a run's history, averaged since the line before. Losses are of this worker's share of the batch."""

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
    """Training stopped before a step that would have spoiled the weights.

    own: whether this worker's losses were at fault; the gradient is every worker's.
    """

    def __init__(self, message: str, own: bool) -> None:
        super().__init__(message, own)  # both, so that it can be pickled
        self.own = own

    def __str__(self) -> str:
        return str(self.args[0])


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
    method = recipe.build(shards.labels)
    if state is None:
        method.load_pretrained()
    method.to(place.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = _Run(method, config, steps)
    if state is not None:
        run.restore(state)
    if config.compile:
        method.network.compile()
    images, passes = config.split_batch(place.world)
    radius, start = math.ceil(recipe.method.distance_radius), run.step * passes
    stream = BatchStream(shards, store_url, recipe.reader, images, place.rank, place.world, start, radius=radius)
    trained = _distributed(method, place)
    batches, meter, guard = load_batches(stream), _Meter(), _Guard(place.device)
    due = _report_steps(steps, config.checkpoints)
    method.train()
    while run.step < steps:
        losses, norm = _step(run, trained, batches, passes, place, meter, guard)
        meter.add(losses, norm, config.batch)
        if run.step in due:
            guard.settle()
            progress = meter.progress(run.step, steps, max(group["lr"] for group in run.optimizer.param_groups))
            run.history.append(asdict(progress))
            report(progress, run.state() if due[run.step] else None)
    return run.best, run.history


@dataclass
class _Run:
    """What changes during a run."""

    method: Method
    config: TrainConfig
    steps: int
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        groups = self.method.parameter_groups(config.lr, config.weight_decay, config.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, fused=True)
        self.peaks = [group["lr"] for group in groups]
        average = get_ema_multi_avg_fn(config.ema)
        self.ema = AveragedModel(self.method, multi_avg_fn=average) if config.ema else None

    @property
    def best(self) -> Method:
        """What evaluation uses."""
        averaged: Any = self.ema
        return self.method if averaged is None else averaged.module

    def advance(self, norm: Tensor) -> None:
        """The optimizer's step, which the device itself leaves out where the gradient's norm is not finite."""
        share = self.config.lr_share(self.step, self.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = share * peak
        self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # as GradScaler does
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.method)
        self.step += 1

    def state(self) -> State:
        return {
            "step": self.step,
            "method": self.method.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }

    def restore(self, state: State) -> None:
        self.method.load_state_dict(state["method"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], list(state["history"])


def _step(
    run: _Run,
    trained: nn.Module,
    batches: Iterator[Batch],
    passes: int,
    place: Place,
    meter: "_Meter",
    guard: "_Guard",
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimizer step over `passes` forward and backward passes; its losses and gradient norm.

    Nothing here makes the host wait for the device.
    """
    run.optimizer.zero_grad(set_to_none=True)
    torch.manual_seed(hash((run.config.seed, run.step, place.rank)))  # so that a resumed run draws the same noise
    sums: dict[str, Tensor] = {}
    keys: list[str] = []
    for i in range(passes):
        with meter.waiting():
            batch = next(batches)
        keys += batch.keys
        with _exchange(trained, i == passes - 1):
            with torch.autocast(place.device.type, torch.bfloat16, enabled=run.config.bf16):
                losses = trained(batch.to(place.device), run.step)
            (torch.stack(list(losses.values())).sum() / passes).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros((), device=place.device)) + value.detach() / passes
    norm = nn.utils.clip_grad_norm_(run.method.parameters(), run.config.clip or math.inf)
    guard.watch(run.step, norm, sums, keys)  # after the exchange of gradients, so that all ranks see the same
    run.advance(norm)
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


class _Guard:
    """Stops the run at a gradient that is not finite.

    The host looks at a norm one step later on a GPU, when it is there without waiting; the device has left that
    step out by itself, so the weights are still those before it.
    """

    def __init__(self, device: torch.device) -> None:
        self.lag = 1 if device.type == "cuda" else 0
        self.pending: deque[tuple[int, Tensor, dict[str, Tensor], list[str]]] = deque()
        self.copied: deque[torch.cuda.Event] = deque()

    def watch(self, step: int, norm: Tensor, losses: dict[str, Tensor], keys: list[str]) -> None:
        """Take a step's norm; raise NonFiniteLoss for an earlier one, or on a CPU for this one."""
        host = torch.empty((), pin_memory=self.lag > 0).copy_(norm.detach(), non_blocking=True)
        if self.lag:
            self.copied.append(torch.cuda.Event())
            self.copied[-1].record()
        self.pending.append((step, host, losses, keys))
        self.settle(self.lag)

    def settle(self, lag: int = 0) -> None:
        """Look at all but the newest `lag` steps."""
        while len(self.pending) > lag:
            step, norm, losses, keys = self.pending.popleft()
            if self.lag:
                self.copied.popleft().synchronize()
            if not norm.isfinite():
                told = {name: float(value) for name, value in losses.items()}
                message = f"step {step}: gradient norm {float(norm)}, losses {told}, samples {', '.join(keys)}"
                raise NonFiniteLoss(message, own=not all(map(math.isfinite, told.values())))


class _Meter:
    """Averages between two reports."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.losses: dict[str, list[Tensor]] = {}
        self.norms: list[Tensor] = []
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context whose time counts as waiting for data."""
        since = time.perf_counter()
        yield
        self.waited += time.perf_counter() - since

    def add(self, losses: dict[str, Tensor], norm: Tensor, images: int) -> None:
        for name, value in losses.items():
            self.losses.setdefault(name, []).append(value)
        self.norms.append(norm)
        self.images += images

    def progress(self, step: int, steps: int, lr: float) -> Progress:
        seconds = time.perf_counter() - self.started
        losses = {name: float(torch.stack(values).mean()) for name, values in self.losses.items()}
        norm = float(torch.stack(self.norms).mean())
        result = Progress(step, steps, losses, lr, norm, self.images / seconds, self.waited / seconds)
        self._clear()
        return result
