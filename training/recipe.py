"""Recipe: one frozen, typed, fully resolved description of a training run."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from infra import artifacts
from infra.errors import TesseraError
from preprocessing.labels import LabelTable
from preprocessing.shards import ShardConfig
from training.methods import METHODS, MethodConfig
from training.methods.base import Method
from training.reader import ReaderConfig

SCHEMA_VERSION = 1
"""Part of every run's path: raise it when the same recipe would train differently."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation. Schedules are shares of the run, so that they hold for any data set and length."""

    batch: int
    """Images per optimizer step over all workers; accumulation follows from their number."""
    epochs: float
    """Passes over the train split."""
    lr: float
    """Peak learning rate (AdamW), after a linear warm-up; then cosine to 0."""
    warmup: float = 0.015
    """Share of the run."""
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    """Largest gradient norm."""
    micro_batch: int = 32
    """Most images one worker takes at once."""
    bf16: bool = True
    """Autocast to bfloat16; losses stay in float32."""
    checkpoints: int = 10
    """Checkpoints written over the run."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.batch, self.micro_batch, self.checkpoints) < 1 or min(self.epochs, self.lr) <= 0:
            raise TesseraError(f"train config: batch, epochs, lr, ... must be positive: {self}")

    def steps(self, samples: int) -> int:
        """Optimizer steps of the run on a train split of this many samples."""
        return max(1, round(self.epochs * samples / self.batch))

    def split_batch(self, workers: int) -> tuple[int, int]:
        """(images per worker and forward pass, passes per step). TesseraError if it cannot be exact."""
        if self.batch % workers:
            raise TesseraError(f"a total batch of {self.batch} does not divide among {workers} workers")
        share = self.batch // workers
        passes = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= self.micro_batch)
        return share // passes, passes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method with its options, the shards it needs, and how it is trained."""

    name: str
    method: MethodConfig
    shards: ShardConfig
    train: TrainConfig
    reader: ReaderConfig = field(default_factory=ReaderConfig)

    def __post_init__(self) -> None:
        if self.shards.grid is None:
            raise TesseraError(f"recipe {self.name}: training needs shards of one grid")
        if self.method.eds_radius > self.shards.radius:
            raise TesseraError(
                f"recipe {self.name}: the method needs distances up to {self.method.eds_radius:g} px, the "
                f"shards are exact up to {self.shards.radius}"
            )

    @property
    def val_shards(self) -> ShardConfig:
        """Evaluation shards: the images' own sizes, since PQ is measured there."""
        return dataclasses.replace(self.shards, grid=None)

    def lasting(self, epochs: float) -> "Recipe":
        """The same recipe for another number of epochs."""
        return dataclasses.replace(self, train=dataclasses.replace(self.train, epochs=epochs))

    def build(self, labels: LabelTable) -> Method:
        """A method with fresh weights."""
        assert self.shards.grid is not None  # checked above
        return METHODS[type(self.method)](self.method, labels, self.shards.grid)

    def run_path(self, train_set: str) -> str:
        """Folder of a run on the shards at `train_set`. Decoding is no part of training, nor of its path."""
        facts: dict[str, Any] = dataclasses.asdict(self)
        facts["method"].pop("decode")
        return artifacts.step_path("train", SCHEMA_VERSION, facts, [train_set])
