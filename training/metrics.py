"""What a run tells of itself: rows over its steps, and the one table of them on the store."""

import io
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from infra import checksums
from infra.errors import TesseraError
from infra.store import Store

METRICS = "metrics.parquet"
_CHECKSUM = b"crc32"
STARVED = 0.3
"""Share of the time spent waiting for batches above which a run is called data-starved."""
_LOSS, _FIGURE = "loss/", "val/"


@dataclass(frozen=True)
class Row:
    """A run between two of its steps: averages since the row before."""

    step: int
    """Steps done."""
    epoch: float
    """Passes over the train split done."""
    losses: dict[str, float]
    """Over all workers' images, by name."""
    lr: float
    """Of the heads."""
    grad_norm: float
    """Before clipping."""
    images_per_s: float
    """Over all workers, evaluation left out."""
    data_wait: float
    """Share of the time spent waiting for batches, by the worker that waited most."""
    memory_gib: float
    """Most that worker 0 has held so far: of its GPU's memory, or else resident in its process."""
    workers: int
    time: float
    """Seconds since 1970 at the end."""
    figures: dict[str, float] = field(default_factory=dict)
    """PQ and the like on the fixed val images, where they were measured after this step."""

    @property
    def starved(self) -> bool:
        """Whether the readers were too slow for the training."""
        return self.data_wait > STARVED

    def __str__(self) -> str:
        losses = " ".join(f"{name} {value:.3f}" for name, value in self.losses.items())
        pace = f"{self.images_per_s:.1f} images/s, {self.data_wait:.0%} waiting for data, {self.memory_gib:.1f} GiB"
        told = f"{losses} | lr {self.lr:.2g}, gradient {self.grad_norm:.2g}, {pace}"
        if self.starved:
            told += " | data-starved: more reader.workers, TESSERA_CACHE or a nearer store would make it faster"
        if self.figures:
            told += " | " + " ".join(f"{name} {value:.1f}" for name, value in self.figures.items())
        return told


_PLAIN = tuple(one.name for one in fields(Row) if one.name not in ("losses", "figures"))
"""The table's columns that every run has."""


def training_seconds(rows: Sequence[Row], batch: int) -> list[float]:
    """How long the steps before each row took, evaluation, waiting for workers and steps that were lost left out.

    batch: images a step, over all workers.
    """
    before = (0, *(row.step for row in rows))
    return [(row.step - last) * batch / row.images_per_s for row, last in zip(rows, before, strict=False)]


def worker_hours(rows: Sequence[Row], batch: int) -> float:
    """Of the training, over all of its attempts with however many workers: its seconds times those at work."""
    return sum(s * row.workers for s, row in zip(training_seconds(rows, batch), rows, strict=True)) / 3600


class Meter:
    """Averages between two rows."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._losses: dict[str, list[Tensor]] = {}
        self._norms: list[Tensor] = []
        self._images, self._waited = 0, 0.0
        self._started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context whose time counts as waiting for data."""
        since = time.perf_counter()
        yield
        self._waited += time.perf_counter() - since

    def add(self, losses: dict[str, Tensor], norm: Tensor, images: int) -> None:
        """A step: this worker's part of the losses, the gradient's norm, all workers' images."""
        for name, value in losses.items():
            self._losses.setdefault(name, []).append(value)
        self._norms.append(norm)
        self._images += images

    def take(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(this worker's part of the mean losses, the fields of a Row that are measured here); begins anew."""
        losses = {name: torch.stack(values).mean() for name, values in self._losses.items()}
        norm = float(torch.stack(self._norms).mean())  # waits for a GPU, so the clock is read after it
        seconds = time.perf_counter() - self._started
        pace = {"images_per_s": self._images / seconds, "data_wait": self._waited / seconds}
        measured = {"grad_norm": norm, **pace, "memory_gib": memory_gib(self.device), "time": time.time()}
        self.clear()
        return losses, measured


def memory_gib(device: torch.device) -> float:
    """Most memory held so far, GiB: of a GPU by torch, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def write_metrics(store: Store, run: str, rows: Sequence[Row]) -> None:
    """The table of a run: a column a field, `loss/<name>` and `val/<name>`; null where a step has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    table = pa.Table.from_pylist([flat(row) for row in rows], _schema(rows))
    table = table.replace_schema_metadata({_CHECKSUM: _checksum(table.to_pylist())})
    pq.write_table(table, buffer, write_page_checksum=True)
    store.write(f"{run}/{METRICS}", buffer.getvalue())


def read_metrics(store: Store, run: str) -> tuple[Row, ...]:
    """The rows of a run. TesseraError if its table is gone, damaged or none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    key = f"{run}/{METRICS}"
    data = store.read(key)
    try:
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        for column in table.schema:
            if column.name in _PLAIN or column.name.startswith((_LOSS, _FIGURE)):
                _check(column.name, column.type == _type(column.name), f"is of {column.type}")
        for name in _PLAIN:
            _check(name, name in table.column_names and not table[name].null_count, "is not there, or has gaps")
        found, told = table.to_pylist(), (table.schema.metadata or {}).get(_CHECKSUM)
        checksums.require(told is None or told == _checksum(found), store.url_for(key))
        return tuple(_row(values) for values in found)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:  # what damage and other tables lead to
        raise TesseraError(f"{store.url_for(key)}: expected the metrics of a run: {error}") from error


def _checksum(values: list[dict[str, Any]]) -> bytes:
    """Of a table's content: pages of Parquet have one, its names and counts have none."""
    return f"{checksums.crc32(json.dumps(values, sort_keys=True).encode()):08x}".encode()


def flat(row: Row) -> dict[str, Any]:
    """A row's fields by the name of their column, in the table's order."""
    named = asdict(row)
    losses, figures = named.pop("losses"), named.pop("figures")
    named |= {_LOSS + name: value for name, value in losses.items()}
    return named | {_FIGURE + name: value for name, value in figures.items()}


def _schema(rows: Sequence[Row]) -> Any:
    import pyarrow as pa

    names = dict.fromkeys(_PLAIN)
    names |= dict.fromkeys(name for row in rows for name in flat(row))
    return pa.schema([(name, _type(name)) for name in names])


def _type(column: str) -> Any:
    import pyarrow as pa

    return pa.int64() if column in ("step", "workers") else pa.float64()


def _check(column: str, good: bool, problem: str) -> None:
    if not good:
        raise ValueError(f"column {column} {problem}")


def _row(values: dict[str, Any]) -> Row:
    def under(prefix: str) -> dict[str, float]:
        named = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        return {name: value for name, value in named.items() if value is not None}

    plain = {name: values[name] for name in _PLAIN}  # a later version may have more
    return Row(**plain, losses=under(_LOSS), figures=under(_FIGURE))
