"""Finding a trained run's decoding thresholds: the network runs once, decoding many times."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.evaluate import load_samples
from evaluation.pq import PQStats, compare, summarise
from infra import artifacts
from infra.errors import TesseraError
from infra.store import open_store
from preprocessing.panoptic_map import PanopticMap
from preprocessing.shards import ShardSet
from training.methods.base import Method, Outputs
from training.recipe import Recipe
from training.run import load_method

log = logging.getLogger("tessera.tune")

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Trial:
    """One setting and what it reached."""

    decode: Any
    """The method's decode config."""
    pq: float


@dataclass(frozen=True)
class Tuned:
    """The best setting, and all that were tried, the recipe's own first."""

    path: str
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The first of those with the highest PQ."""
        return max(self.trials, key=lambda trial: trial.pq)

    def options(self) -> dict[str, Any]:
        """What differs from the recipe, as its options."""
        before, after = (dataclasses.asdict(t.decode) for t in (self.trials[0], self.best))
        return {f"method.decode.{name}": value for name, value in after.items() if value != before[name]}


@dataclass(frozen=True)
class _Seen:
    """A batch that the network has seen."""

    outputs: Outputs
    truths: tuple[PanopticMap, ...]


def tune(recipe: Recipe, run: str, val_set: ShardSet, store_url: str, images: int = 50) -> Tuned:
    """Try the decode config's `candidates` field by field on the first `images` of `val_set`, as long as PQ rises.

    What is found has seen these images: measure it on others. Writes a manifest under "tune" with every trial.
    Raises TesseraError if the method's decode config has no candidates.
    """
    method = load_method(recipe, val_set.labels, store_url, run)
    candidates = getattr(recipe.method.decode, "candidates", None)
    if not candidates:
        raise TesseraError(f"tune: {type(recipe.method.decode).__name__} names no candidates to try")
    seen = list(_look(method, store_url, val_set, images))
    trials = _climb(method, seen, candidates)
    path = artifacts.step_path("tune", SCHEMA_VERSION, [recipe.method.decode, images], [run, val_set.path])
    found = Tuned(path, tuple(trials))
    looked_at = sum(len(batch.truths) for batch in seen)
    content = {"options": found.options(), "pq": found.best.pq, "images": looked_at, "trials": found.trials}
    artifacts.write_manifest(open_store(store_url), path, content)
    return found


def _look(method: Method, store_url: str, val_set: ShardSet, images: int) -> Iterator[_Seen]:
    left, at_once = images, method.images_at_once
    for samples in (batch for shard in val_set.shards for batch in load_samples(store_url, shard, at_once)):
        if not left:
            return
        taken = samples[:left]
        outputs = method.predict(method.inputs([sample.decoded() for sample in taken]))
        yield _Seen(outputs, tuple(sample.panoptic for sample in taken))
        left -= len(taken)


def _climb(method: Method, seen: Sequence[_Seen], candidates: dict[str, tuple[Any, ...]]) -> list[Trial]:
    """Coordinate ascent: field by field, again while a whole round gains."""
    tried: dict[Any, Trial] = {}

    def trial(decode: Any) -> Trial:
        if decode not in tried:
            tried[decode] = Trial(decode, _pq(method, seen, decode))
            log.info("PQ %.2f with %s", tried[decode].pq, decode)
        return tried[decode]

    best, before = trial(method.config.decode), -1.0
    while best.pq > before:
        before = best.pq
        for name, values in candidates.items():
            found = [trial(dataclasses.replace(best.decode, **{name: value})) for value in values]
            best = max(best, *found, key=lambda t: t.pq)
    return list(tried.values())


def _pq(method: Method, seen: Sequence[_Seen], decode: Any) -> float:
    method.config = dataclasses.replace(method.config, decode=decode)
    stats = PQStats.zero(len(method.labels))
    for batch in seen:
        predictions = method.decode(batch.outputs, [truth.size for truth in batch.truths])
        for truth, prediction in zip(batch.truths, predictions, strict=True):
            stats += compare(truth, prediction, len(method.labels))
    return float(summarise(stats, method.labels)["pq"]["all"] or 0)
