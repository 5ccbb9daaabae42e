"""The table of a run, and what its rows are averaged from."""

import io
import math
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infra.errors import TesseraError
from infra.store import Store, open_store
from tests.support.rows import rows
from training.metrics import STARVED, Meter, Row, read_metrics, worker_hours, write_metrics

RUN = "train/0123"
KEY = f"{RUN}/metrics.parquet"
ROW = Row(100, 0.5, {"instance": 0.7}, 1e-3, 2.5, 31.25, 0.25, 3.5, 2, 1_790_000_000.125)
PLAIN = ["step", "epoch", "lr", "grad_norm", "images_per_s", "data_wait", "memory_gib", "workers", "time"]


def told(found: list[Row] | tuple[Row, ...]) -> list[tuple[Row, dict[str, str]]]:
    """Rows that compare equal where losses are both nan."""
    return [(replace(row, losses={}), {name: repr(value) for name, value in row.losses.items()}) for row in found]


@settings(max_examples=100, deadline=None)
@given(rows(st.floats()))
@example([])
@example(
    [replace(ROW, losses={"a": math.nan, "b": -math.inf}), replace(ROW, losses={}), replace(ROW, figures={"a": 0})]
)
def test_rows_come_back_as_they_were(tmp_path_factory, every):
    store = open_store(str(tmp_path_factory.mktemp("store")))
    write_metrics(store, RUN, every)
    assert told(read_metrics(store, RUN)) == told(every)


def test_anything_that_reads_parquet_reads_the_table(store: Store):
    lost = replace(ROW, step=200, losses={"semantic": math.nan}, figures={"pq": 41.5})
    write_metrics(store, RUN, [ROW, lost])
    table = pq.read_table(io.BytesIO(store.read(KEY)))
    assert table.column_names == [*PLAIN, "loss/instance", "loss/semantic", "val/pq"]
    whole = {"step", "workers"}
    assert all(table.schema.field(n).type == (pa.int64() if n in whole else pa.float64()) for n in table.column_names)
    for name in PLAIN:
        assert table[name].to_pylist() == [getattr(ROW, name), getattr(lost, name)]
    assert table["loss/instance"].to_pylist() == [0.7, None]
    assert table["val/pq"].to_pylist() == [None, 41.5]
    missing, nan = table["loss/semantic"].to_pylist()
    assert missing is None
    assert math.isnan(nan)


def test_worker_hours_are_those_of_all_attempts_with_the_workers_that_each_had():
    two = [replace(ROW, step=step, images_per_s=20.0, workers=2) for step in (10, 20)]
    alone = replace(ROW, step=30, images_per_s=8.0, workers=1)  # gone on with one worker, after whatever wait
    assert worker_hours([*two, alone], batch=8) == pytest.approx((2 * (80 + 80) / 20 + 80 / 8) / 3600)
    assert worker_hours([], batch=8) == 0


def test_a_table_without_rows_has_its_columns_all_the_same(store: Store):
    write_metrics(store, RUN, [])
    assert pq.read_table(io.BytesIO(store.read(KEY))).column_names == PLAIN


def test_a_table_takes_the_place_of_an_earlier_one(store: Store):
    write_metrics(store, RUN, [ROW, replace(ROW, step=200)])
    write_metrics(store, RUN, [replace(ROW, losses={"other": 1.0})])
    assert read_metrics(store, RUN) == (replace(ROW, losses={"other": 1.0}),)


def foreign(columns: dict[str, list]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no table",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],  # a figure: without checksums just another one
        lambda data: data[:4] + bytes(100) + data[104:],
        lambda data: foreign({"step": [1], "epoch": [1.0]}),
        lambda data: foreign({"speed": [1]}),
    ],
    ids=["empty", "text", "short", "half", "bit", "zeroes", "columns missing", "another table"],
)
def test_a_damaged_table_is_told_with_its_url(store: Store, damage):
    write_metrics(store, RUN, [replace(ROW, step=i, lr=i / 7) for i in range(100)])
    store.write(KEY, damage(store.read(KEY)))
    with pytest.raises(TesseraError) as raised:
        read_metrics(store, RUN)
    assert str(raised.value).startswith(f"{store.url_for(KEY)}: expected the metrics of a run")


def test_a_table_that_is_gone_is_told_with_its_url(store: Store):
    with pytest.raises(TesseraError) as raised:
        read_metrics(store, RUN)
    assert store.url_for(KEY) in str(raised.value)


class Clock:
    """Stands still unless it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "time", lambda: 5e5 + self.now)


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_a_meter_averages_over_the_steps_since_the_last_row(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    meter = Meter(torch.device("cpu"))
    for losses, norm, images in ((scalars(a=1.0, b=4.0), 2.0, 8), (scalars(a=3.0), 4.0, 8), (scalars(a=5.0), 9.0, 4)):
        with meter.waiting():
            clock.now += 0.5
        clock.now += 1.5
        meter.add(losses, torch.tensor(norm), images)
    losses, measured = meter.take()
    assert {name: float(value) for name, value in losses.items()} == {
        "a": 3.0,
        "b": 4.0,
    }  # b: of the steps that have it
    assert measured.pop("memory_gib") > 0.01
    assert measured == {"grad_norm": 5.0, "images_per_s": 20 / 6, "data_wait": 0.25, "time": 501_006.0}
    clock.now += 2
    meter.add(scalars(c=7.0), torch.tensor(1.0), 5)
    losses, measured = meter.take()
    assert list(losses) == ["c"]
    assert (measured["images_per_s"], measured["data_wait"], measured["grad_norm"]) == (2.5, 0.0, 1.0)


def test_a_cleared_meter_leaves_out_what_was_before(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    meter = Meter(torch.device("cpu"))
    meter.add(scalars(a=100.0), torch.tensor(100.0), 100)
    with meter.waiting():
        clock.now += 50
    meter.clear()
    clock.now += 4
    meter.add(scalars(a=1.0), torch.tensor(2.0), 8)
    losses, measured = meter.take()
    assert (float(losses["a"]), measured["images_per_s"], measured["data_wait"]) == (1.0, 2.0, 0.0)


@pytest.mark.parametrize("wait", [0.0, STARVED, math.nextafter(STARVED, 1), 1.0])
def test_a_run_that_waits_too_long_is_called_starved_and_told_what_helps(wait: float):
    row = replace(ROW, data_wait=wait)
    assert row.starved == (wait > STARVED)
    words = ("data-starved", "reader.workers", "TESSERA_CACHE", "nearer store")
    assert [word in str(row) for word in words] == [row.starved] * 4


def test_a_row_reads_as_a_line():
    row = replace(ROW, losses={"instance": 0.71, "semantic": 1.2}, figures={"pq": 41.46, "pq_things": 30.0})
    assert str(row) == (
        "instance 0.710 semantic 1.200 | lr 0.001, gradient 2.5, 31.2 images/s, 25% waiting for data, 3.5 GiB"
        " | pq 41.5 pq_things 30.0"
    )


def test_the_table_lies_in_the_folder_of_its_run(tmp_path: Path):
    store = open_store(str(tmp_path))
    write_metrics(store, RUN, [ROW])
    assert [entry.key for entry in store.list()] == [KEY]
