"""The train loop: one worker's part of a run, without Ray."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from infra.errors import TesseraError
from infra.version import code_version
from preprocessing.shards import ShardSet
from training import parallel, precision
from training.batch import Batch
from training.checkpoints import State
from training.dry_run import keeping_buffers, largest_batch, optimizer_room, telling_knobs
from training.methods.base import Method
from training.metrics import Meter, Row, memory_gib
from training.parallel import Place
from training.reader import BatchStream, load_batches
from training.recipe import Recipe
from training.shares import Share

_ROWS = 10_000  # of a run at most: in a week one a minute


class NonFiniteLoss(TesseraError):
    """Training stopped before a step that would have spoiled the weights.

    step: the one that was not taken. keys: this worker's samples in it. own: whether this worker's losses were at
    fault; the gradient is every worker's.
    """

    def __init__(self, step: int, norm: float, losses: dict[str, float], keys: tuple[str, ...]) -> None:
        super().__init__(step, norm, losses, keys)  # all of them, so that it can be pickled
        self.step, self.norm, self.losses, self.keys = step, norm, losses, keys
        self.own = not all(map(math.isfinite, losses.values()))

    def __str__(self) -> str:
        return f"step {self.step}: gradient norm {self.norm}, losses {self.losses}, samples {', '.join(self.keys)}"


class Watcher(Protocol):
    """What happens around the steps of a run, called on every worker at the same steps."""

    def says(self, line: str) -> None:
        """Something that a person may want to know."""

    def row(self, row: Row, steps: int) -> None:
        """What the run was like since the last row; `steps`: of the whole run."""

    def wants_checkpoint(self) -> bool:
        """Whether it is time for a checkpoint beside those at fixed steps; worker 0's answer counts."""

    def save(self, state: State) -> None:
        """A checkpoint, on worker 0 only; its tensors are nobody else's."""

    def check(self, method: Method, step: int) -> dict[str, float]:
        """Measure the method, in evaluation mode: figures by name, the same on every worker."""


def train(
    recipe: Recipe,
    shards: ShardSet,
    store_url: str,
    place: Place,
    state: State | None,
    watcher: Watcher,
    init: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], list[Row]]:
    """Train `recipe` on `shards`, going on from `state` if there is one.

    init: weights by name to start with, instead of the backbone's published ones. Returns the trained weights that
    evaluation uses, whole, on the CPU of worker 0, and the run's rows. Raises NonFiniteLoss on all workers at once,
    before the optimizer's step, DoesNotFit where a pass needs more memory than there is, and TesseraError where the
    workers cannot share the batch.
    """
    config, steps = recipe.train, recipe.train.steps(shards.samples)
    share = recipe.plan(shards).share(place.rank, place.world, config.micro_batch)
    torch.manual_seed(config.seed)
    method = recipe.build(shards.labels)
    if state is None:
        method.load_pretrained() if init is None else method.load_state_dict(init, strict=False)
    trainer = Trainer(recipe, method, steps, place, share)
    if state is not None:
        trainer.restore(state)
    watcher.says(trainer.dry_run())
    radius, start = math.ceil(recipe.method.distance_radius), trainer.step
    where = place.rank, place.world, start
    stream = BatchStream(shards, store_url, recipe.reader, config.batch, *where, seed=config.seed, radius=radius)
    batches, due = load_batches(stream), _Due(recipe, shards.samples)
    while trainer.step < steps:
        trainer.take_step(batches)
        if not due.row(trainer.step):
            continue
        row, wanted = trainer.row(shards.samples, watcher.wants_checkpoint())
        if due.check(trainer.step):
            row.figures.update(trainer.measured(watcher))
        watcher.row(row, steps)
        if wanted or due.save(trainer.step):
            found = trainer.state()
            if found is not None:
                watcher.save(found)
    return parallel.whole(trainer.best.state_dict(), place), trainer.rows


@dataclass(frozen=True)
class _Due:
    """What happens after which step."""

    recipe: Recipe
    samples: int

    def check(self, step: int) -> bool:
        """Every so many epochs, and at the end."""
        every = self.recipe.upkeep.check_epochs
        if every is None:
            return False
        done, before = (s * self.recipe.train.batch / self.samples / every for s in (step, step - 1))
        return step == self._steps or int(done + 1e-9) > int(before + 1e-9)

    def save(self, step: int) -> bool:
        """So many times over the run, always after the last step and after those that are checked."""
        return _among(step, self._steps, self.recipe.upkeep.checkpoints) or self.check(step)

    def row(self, step: int) -> bool:
        """After every step of a short run."""
        return _among(step, self._steps, _ROWS) or self.save(step)

    @property
    def _steps(self) -> int:
        return self.recipe.train.steps(self.samples)


def _among(step: int, steps: int, count: int) -> bool:
    """Whether a step is one of `count` that lie evenly over the run, the last one always among them."""
    return step * count // steps > (step - 1) * count // steps


class Trainer:
    """A method in training: it takes steps, and its state can be taken and put back between any two of them."""

    def __init__(self, recipe: Recipe, method: Method, steps: int, place: Place, share: Share) -> None:
        """method: on the CPU; it is moved, spread over the workers and compiled here. steps: of the whole run."""
        self.recipe, self.config, self.steps, self.place, self.share = recipe, recipe.train, steps, place, share
        self.step, self.rows = 0, list[Row]()
        self.method = parallel.placed(method, place)
        average = get_ema_multi_avg_fn(self.config.ema)
        self.ema = AveragedModel(method, multi_avg_fn=average) if self.config.ema else None
        self.spread = parallel.spread(method, place)
        if place.sharded and self.ema is not None:
            parallel.spread(self.best, place)  # called by nobody but evaluation, it lies where the weights do
        if self.config.compile:
            method.network.compile()
        groups = method.parameter_groups(self.config.lr, self.config.weight_decay, self.config.layer_decay)
        self.peaks = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=self.config.betas, fused=True)
        self.meter, self.guard = Meter(place.device), _Guard(place.device)
        method.train()

    @property
    def best(self) -> Method:
        """What evaluation uses."""
        averaged: Any = self.ema
        return self.method if averaged is None else averaged.module

    def take_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step on the next batch; nothing here makes the host wait for the device.

        Raises NonFiniteLoss of this step, or on a GPU of the one before.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self.meter.waiting():
            batch = next(batches)
        torch.manual_seed(hash((self.config.seed, self.step, self.place.rank)))  # so that a resume draws alike
        sums: dict[str, Tensor] = {}
        for part in self.share.slices:
            last = part.stop == self.share.images
            with parallel.exchanging(self.spread, last):
                losses = self._pass(self.spread, batch[part], self.step)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach()
        norm = parallel.clip_gradients(self.method, self.config.clip or math.inf)
        self.guard.watch(self.step, norm, sums, batch.keys)  # gradients are exchanged: all workers see the same
        self.advance(norm)
        self.meter.add(sums, norm, self.config.batch)

    def _pass(self, module: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """Forward and backward; the losses' part in the mean over the images of a whole step."""
        part = len(batch.keys) / self.config.batch
        with precision.autocast(self.config.bf16, self.place.device):
            losses = module(batch.to(self.place.device), step)
        total = torch.stack(list(losses.values())).sum()
        (total * (part * self.place.world)).backward()  # gradients are averaged over workers, whose shares may differ
        return {name: value * part for name, value in losses.items()}

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

    def dry_run(self) -> str:
        """Passes at the largest shape, which change nothing; what they took, in words.

        Raises DoesNotFit where they need more memory than there is.
        """
        images, size = max(self.share.passes), self.recipe.trained
        shape = f"{images} images of {size[0]} x {size[1]}"
        distances = self.recipe.method.distance_radius > 0
        with telling_knobs(f"a pass of {shape}"), optimizer_room(self.optimizer), keeping_buffers(self.method):
            batch = largest_batch(images, size, self.method.labels, distances)
            for step in range(3 if self.method.alternates else 1):
                for _ in self.share.passes[:2]:  # the second has the gradients of the first beside it
                    self._pass(self.spread, batch, step)  # and the exchange of gradients, whose buffers count too
                self.optimizer.zero_grad(set_to_none=True)
        kind = precision.told(self.config.bf16, self.place.device)
        return f"dry run: a pass of {shape} fits, {memory_gib(self.place.device):.1f} GiB held, in {kind}"

    def row(self, samples: int, wants: bool) -> tuple[Row, bool]:
        """(what the run was like since the last row, whether worker 0 `wants` something); the same on all workers."""
        self.guard.settle()
        losses, measured = self.meter.take()
        waits = [0.0] * self.place.world
        waits[self.place.rank] = measured.pop("data_wait")
        own = torch.tensor([float(wants and self.place.rank == 0), *waits], device=self.place.device)
        told = parallel.summed(torch.cat([torch.stack(list(losses.values())), own]), self.place).tolist()
        values, (wanted, *waits) = told[: len(losses)], told[len(losses) :]
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        epoch = self.step * self.config.batch / samples
        named = dict(zip(losses, values, strict=True))
        facts = {"data_wait": max(waits), **measured}
        self.rows.append(Row(self.step, epoch, named, lr=lr, workers=self.place.world, figures={}, **facts))
        return self.rows[-1], wanted > 0

    def measured(self, watcher: Watcher) -> dict[str, float]:
        """Figures of the weights that evaluation uses."""
        self.best.eval()
        figures = watcher.check(self.best, self.step)
        self.best.train()
        parallel.let_go(self.best)
        self.meter.clear()  # evaluation is no part of the training's pace
        return figures

    def state(self) -> State | None:
        """What to go on from, on worker 0; all workers must call it."""
        parts = {
            "method": self.method.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        found = parallel.whole(parts, self.place)
        if self.place.rank > 0:
            return None
        facts = {"recipe": asdict(self.recipe), "code": code_version()}
        return {"step": self.step, "rows": [asdict(row) for row in self.rows], **found, **facts}

    def restore(self, state: State) -> None:
        """Take up a state of any number of workers, whether they held all or parts."""
        parallel.load_weights(self.method, state["method"])
        if self.ema is not None:
            parallel.load_weights(self.ema, state["ema"])
        parallel.load_optimizer(self.optimizer, state["optimizer"])
        self.step, self.rows = state["step"], [Row(**row) for row in state["rows"]]


class _Guard:
    """Stops the run at a gradient that is not finite.

    The host looks at a norm one step later on a GPU, when it is there without waiting; the device has left that
    step out by itself, so the weights are still those before it.
    """

    def __init__(self, device: torch.device) -> None:
        self.lag = 1 if device.type == "cuda" else 0
        self.pending: deque[tuple[int, Tensor, dict[str, Tensor], tuple[str, ...]]] = deque()
        self.copied: deque[torch.cuda.Event] = deque()

    def watch(self, step: int, norm: Tensor, losses: dict[str, Tensor], keys: tuple[str, ...]) -> None:
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
                raise NonFiniteLoss(step, float(norm), {name: float(value) for name, value in losses.items()}, keys)
