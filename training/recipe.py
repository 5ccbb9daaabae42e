"""Recipe: one frozen, typed, fully resolved description of a training run."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

import torch

from infra import artifacts, records
from infra.errors import TesseraError
from infra.text import quoted
from preprocessing.geometry import Frame, Size
from preprocessing.kernels import MAX_RADIUS
from preprocessing.labels import Category, LabelTable
from preprocessing.shards import ShardConfig, ShardSet
from training.backbones import build_backbone
from training.backbones.weights import LoadReport, fingerprint
from training.methods import METHODS
from training.methods.base import Method, MethodConfig
from training.reader import ReaderConfig
from training.shares import Plan

SCHEMA_VERSION = 2
"""Part of every run's path: raise it when the same recipe would train differently."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation. Schedules are in epochs, so that they hold for any data set and batch."""

    batch: int
    """Images per optimizer step over all workers; each one's share follows from their number."""
    epochs: float
    """Passes over the train split."""
    lr: float
    """Peak learning rate (AdamW; Adam where weight_decay is 0), of everything but the backbone's lower layers."""
    warmup_epochs: float = 0.0
    """Epochs of the linear warm-up; less than all."""
    decay: Literal["cosine", "poly"] = "cosine"
    """How the rate falls to 0: by a half cosine, or as (1 - share of the steps)^0.9, DeepLab's."""
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    """Each layer of the backbone learns at this share of the rate of the layer above; 1: all alike."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    """Largest gradient norm; None: any."""
    ema: float = 0.0
    """Decay per step of the moving average of the weights that evaluation uses; 0: none."""
    micro_batch: int = 32
    """Most images one worker takes at once; the rest of its share follows in further passes. No part of a run's
    identity."""
    bf16: bool = True
    """Autocast to bfloat16 where the device multiplies in it: precision.autocast. Losses stay in float32."""
    compile: bool = False
    """torch.compile the network: a minute at the start for faster steps, where benchmarks/train_step.py shows any."""
    seed: int = 0
    """Of all that is drawn: fresh weights, the order of images, flips and crops, dropout."""

    def __post_init__(self) -> None:
        positive = min(self.batch, self.micro_batch) >= 1 and min(self.epochs, self.lr) > 0
        finite = math.isfinite(self.epochs + self.lr + self.weight_decay)
        positive = positive and (self.clip is None or 0 < self.clip < math.inf)
        if not (positive and finite and self.weight_decay >= 0 and all(0 <= beta < 1 for beta in self.betas)):
            raise TesseraError(f"train config: batch, epochs, lr, clip, ... must be positive: {self}")
        if not 0 <= self.seed < 1 << 63:  # what both NumPy and torch take
            raise TesseraError(f"train config: seed {self.seed}, expected one from 0 to 2^63 - 1")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise TesseraError(f"train config: {self.warmup_epochs} warm-up epochs in {self.epochs}")
        if not (0 < self.layer_decay <= 1 and 0 <= self.ema < 1):
            raise TesseraError(f"train config: layer_decay {self.layer_decay} or ema {self.ema} is out of range")

    def steps(self, samples: int) -> int:
        """Optimizer steps of the run on a train split of this many samples."""
        return max(1, round(self.epochs * samples / self.batch))

    def lr_share(self, step: int, steps: int) -> float:
        """Share of the peak rate at a step: linear warm-up times `decay`; a function of the step alone."""
        warmup, done = max(1, round(self.warmup_epochs / self.epochs * steps)), step / steps
        left = (1 - done) ** 0.9 if self.decay == "poly" else 0.5 * (1 + math.cos(math.pi * done))
        return min(1.0, (step + 1) / warmup) * left


@dataclass(frozen=True, kw_only=True)
class UpkeepConfig:
    """How a run is kept and watched. No part of its identity: it trains the same weights with any of these."""

    checkpoints: int = 10
    """Checkpoints written over the run at the least."""
    minutes: float = 20.0
    """Most time between two of them."""
    keep: int = 2
    """Newest checkpoints that are kept, beside the one with the best PQ."""
    check_epochs: float | None = None
    """Epochs between measurements of PQ on `check_images` val images, and one at the end; None: none."""
    check_images: int = 200
    """Val images that PQ is measured on during training, always the same ones."""

    def __post_init__(self) -> None:
        if min(self.checkpoints, self.keep, self.check_images) < 1 or self.minutes <= 0:
            raise TesseraError(f"upkeep config: checkpoints, minutes, keep, check_images must be positive: {self}")
        if self.check_epochs is not None and not 0 < self.check_epochs < math.inf:
            raise TesseraError(f"upkeep config: PQ every {self.check_epochs} epochs")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method with its options, the shards it needs, and how it is trained."""

    name: str
    """"<method>/<name>", as training.recipes has it: one over all methods, the same in reports and comparisons."""
    method: MethodConfig
    shards: ShardConfig
    train: TrainConfig
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    upkeep: UpkeepConfig = field(default_factory=UpkeepConfig)
    frame: Frame | None = None
    """How images come onto the network's grid in evaluation; None: squashed to the train shards' grid."""

    def __post_init__(self) -> None:
        if self.shards.grid is None and self.reader.crop is None:
            raise TesseraError(f"recipe {self.name}: training needs shards of one grid, or a crop of all images")
        if self.shards.grid is None and self.frame is None:
            raise TesseraError(f"recipe {self.name}: shards of the images' own sizes say no frame for evaluation")
        exact = self.shards.radius if self.reader.crop is None else MAX_RADIUS
        if self.method.distance_radius > exact:
            raise TesseraError(
                f"recipe {self.name}: the method needs distances up to {self.method.distance_radius:g} px, they are "
                f"exact up to {exact}"
            )

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str = "recipe") -> "Recipe":
        """Inverse of dataclasses.asdict and JSON, as runs' manifests hold recipes. source: what errors call it.

        Raises TesseraError for one that another version has written, whose options differ from today's, or damage.
        """
        try:
            return _restored(cls, content)
        except (KeyError, TesseraError, TypeError) as error:
            raise TesseraError(f"{source}: a recipe of another version, or damaged: {error}") from error

    def changed(self, options: Mapping[str, Any]) -> "Recipe":
        """The same recipe with other options, by dotted name: {"method.eds_distance": 0, "train.seed": 1}.

        Raises TesseraError for a name that is none, or a value of another type than the option's.
        """
        return _changed(self, "", dict(options))

    def decoding(self, options: Mapping[str, Any]) -> "Recipe":
        """`changed`, for a run that is trained: TesseraError for options of anything but decoding."""
        other = [name for name in options if not f"{name}.".startswith("method.decode.")]
        if other:
            raise TesseraError(f"option {other[0]!r}: of a finished run only method.decode can be changed")
        return self.changed(options)

    @property
    def val_shards(self) -> ShardConfig:
        """Evaluation shards: the images' own sizes, since PQ is measured there; no distances, only losses want them."""
        return dataclasses.replace(self.shards, grid=None, radius=0)

    def lasting(self, epochs: float) -> "Recipe":
        """The same recipe for another number of epochs; the warm-up keeps its share."""
        warmup = self.train.warmup_epochs * epochs / self.train.epochs
        return dataclasses.replace(self, train=dataclasses.replace(self.train, epochs=epochs, warmup_epochs=warmup))

    @property
    def evaluated(self) -> Frame:
        """How images come onto the network's grid in evaluation."""
        if self.frame is not None:
            return self.frame
        assert self.shards.grid is not None  # checked above
        return Frame(size=self.shards.grid)

    @property
    def trained(self) -> Size:
        """Height, width of the images that the network sees in training."""
        size = self.reader.crop.size if self.reader.crop is not None else self.shards.grid
        assert size is not None  # checked above
        return size

    def build(self, labels: LabelTable) -> Method:
        """A method with fresh weights."""
        return METHODS[type(self.method)](self.method, labels, self.evaluated)

    def rehearse(self) -> LoadReport | None:
        """Run the network once without computing, and load the backbone's published weights to see what they fill.

        None if it has none. Raises TesseraError for what training would only meet after precompute.
        """
        two = LabelTable(tuple(Category(i, str(i), i == 1, (0, 0, 0)) for i in (1, 2)))
        try:
            with torch.device("meta"):
                network = self.build(two).to("meta").network  # after torch.compile some buffers are made elsewhere
            for size in {self.trained, self.evaluated.size}:
                network(torch.zeros(2, 3, *size, device="meta"))
        except (RuntimeError, ValueError, AssertionError, ArithmeticError) as error:
            raise TesseraError(f"recipe {self.name}: its network cannot be built: {error}") from error
        if self.method.backbone.weights is None:
            return None
        return build_backbone(self.method.backbone, self.evaluated.size).load_pretrained()

    def plan(self, shards: ShardSet) -> Plan:
        """How the batches of a run on these shards are drawn, whoever reads them."""
        return self.reader.plan(self.train.batch, sum(1 for shard in shards.shards if shard.image_ids))

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides what is trained: not decoding, upkeep, the name, or how many images a worker takes at once.

        Reads the pretrained weights' file, whose content is part of it; TesseraError where there is none.
        """
        facts: dict[str, Any] = dataclasses.asdict(self) | {"version": self.method.version}
        for name in ("name", "upkeep"):
            facts.pop(name)
        facts["method"].pop("decode")
        facts["train"].pop("micro_batch")
        facts["method"]["backbone"]["weights"] = fingerprint(self.method.backbone.weights)
        return facts

    def run_path(self, train_set: str, init: str | None = None) -> str:
        """Folder of a run on the shards at `train_set` that starts with the weights of the run `init`, if any."""
        return artifacts.step_path("train", SCHEMA_VERSION, self.identity, [train_set, *([init] if init else [])])


def _changed(config: Any, place: str, options: dict[str, Any]) -> Any:
    """A frozen dataclass with all options below `place` replaced at once: some are only allowed together."""
    changes: dict[str, Any] = {}
    for name in _known(config, place, options):
        below = {o.removeprefix(f"{name}."): value for o, value in options.items() if o.startswith(f"{name}.")}
        value, types = getattr(config, name), get_type_hints(type(config))[name]
        nested = _kinds(types) and (below or isinstance(options.get(name), dict))
        if nested:
            below = (options.get(name) or {}) | below
        if nested and value is None:
            _known(_kinds(types)[0], f"{place}{name}.", below)
            changes[name] = _typed(types, below, f"{place}{name}")
            continue
        if nested and name in options:
            value = _of_kind(value, types, below)
        elif name in options:
            value = _typed(types, options[name], f"{place}{name}")
        changes[name] = _changed(value, f"{place}{name}.", below) if below else value
    return dataclasses.replace(config, **changes)


def _known(config: Any, place: str, options: dict[str, Any]) -> list[str]:
    """The fields of a dataclass that the options are of. TesseraError for one that is none."""
    known = {f.name for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    names = list(dict.fromkeys(option.split(".")[0] for option in options))
    for name in names:
        if name not in known:
            raise TesseraError(f"option '{place}{name}': there is none; there are {', '.join(sorted(known)) or 'none'}")
    return names


def _restored(types: Any, value: Any) -> Any:
    """A value of a field of these types; among several dataclasses it is the one with just these fields."""
    if isinstance(value, Mapping):
        kinds = tuple(METHODS) if types is MethodConfig else _kinds(types)
        kind = next((k for k in kinds if {f.name for f in dataclasses.fields(k)} == value.keys()), None)
        if kind is None:
            raise KeyError(f"no {' or '.join(k.__name__ for k in kinds)} has the fields {', '.join(sorted(value))}")
        hints = get_type_hints(kind)
        return kind(**{name: _restored(hints[name], part) for name, part in value.items()})
    records.restore(types, value, "a value of it")  # as it is: 6 for 6.0 would be another run
    if any(isinstance(part, int) and abs(part) >= 1 << 63 for part in (value if isinstance(value, list) else [value])):
        raise TypeError(f"{quoted(value)} is no number of 64 bits")
    return tuple(value) if isinstance(value, list) else value


def _kinds(types: Any) -> tuple[Any, ...]:
    """The dataclasses among the types that a field may have."""
    return tuple(kind for kind in get_args(types) or (types,) if dataclasses.is_dataclass(kind))


def _of_kind(config: Any, types: Any, options: dict[str, Any]) -> Any:
    """`config`; where it lacks one of these options, the default of a kind that the field may be and that has all."""
    for kind in (type(config), *_kinds(types)):
        if {option.split(".")[0] for option in options} <= {f.name for f in dataclasses.fields(kind)}:
            return config if isinstance(config, kind) else kind()
    return config


def _typed(types: Any, value: Any, name: str) -> Any:
    from pydantic import TypeAdapter, ValidationError  # only where a user's options come in

    try:
        return TypeAdapter(types).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = f"{first['loc'][-1]}: " if first["loc"] else ""
        raise TesseraError(f"option '{name}': {value!r}: {field}{first['msg']}") from error
