"""What TensorBoard itself reads of a run."""

import io
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infra.errors import TesseraError
from infra.store import Store, open_store
from tests.support.rows import course, rows
from training.metrics import Row, read_metrics, write_metrics
from training.tensorboard import write_panels, write_scalars

RUN = "train/0123"
SCALARS = f"{RUN}/tensorboard/scalars/events.out.tfevents.0000000000.tessera"
FIRST = Row(100, 0.5, {"instance": 0.7}, 1e-3, 2.5, 31.0, 0.25, 3.5, 2, 1_790_000_000.125)
ROWS = [
    FIRST,
    replace(FIRST, step=200, epoch=1.0, losses={}, figures={"pq": 41.5, "pq_things": 30.0}, time=1_790_000_050.5),
    replace(FIRST, step=300, epoch=1.5, losses={"semantic": float("nan")}, workers=1, time=1_790_000_090.75),
]


def seen(store: Store, part: str, folder: Path) -> EventAccumulator:
    """A part of the run as TensorBoard has it after one look at a copy."""
    for entry in store.list(f"{RUN}/tensorboard/{part}/"):
        (folder / entry.key.rpartition("/")[2]).write_bytes(store.read(entry.key))
    return EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()


def points(found: EventAccumulator, tag: str) -> list[tuple[float, int, float]]:
    return [(event.wall_time, event.step, event.value) for event in found.Scalars(tag)]


def test_tensorboard_reads_every_figure_of_every_row(store: Store, tmp_path: Path):
    write_scalars(store, RUN, ROWS)
    (tmp_path / "seen").mkdir()
    found = seen(store, "scalars", tmp_path / "seen")
    plain = ["data_wait", "epoch", "grad_norm", "images_per_s", "lr", "memory_gib", "workers"]
    assert sorted(found.Tags()["scalars"]) == sorted(
        ["loss/instance", "loss/semantic", "val/pq", "val/pq_things", *plain]
    )
    for name in plain:
        assert points(found, name) == [(row.time, row.step, np.float32(getattr(row, name))) for row in ROWS]
    assert points(found, "loss/instance") == [(FIRST.time, 100, np.float32(0.7))]
    assert points(found, "val/pq") == [(ROWS[1].time, 200, 41.5)]
    ((time, step, value),) = points(found, "loss/semantic")
    assert (time, step) == (ROWS[2].time, 300)
    assert np.isnan(value)
    assert found.FirstEventTimestamp() == FIRST.time


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_file_of_more_rows_goes_on_where_that_of_fewer_ends(tmp_path_factory, data):
    every = data.draw(rows(st.floats()))
    store = open_store(str(tmp_path_factory.mktemp("store")))
    files = []
    for count in range(len(every) + 1):
        write_scalars(store, RUN, every[:count])
        files.append(store.read(SCALARS))
    assert all(more.startswith(fewer) for fewer, more in itertools.pairwise(files))
    assert len(set(files)) == len(files)
    write_metrics(store, RUN, every)  # a resumed run has its rows from a store
    write_scalars(store, RUN, read_metrics(store, RUN))
    assert store.read(SCALARS) == files[-1]


def test_a_watching_tensorboard_reads_on_and_sees_a_resumed_run_once(tmp_path: Path):
    store, every = open_store(str(tmp_path)), course(60)
    write_scalars(store, RUN, every[:7])
    found = EventAccumulator(str(tmp_path / SCALARS.rpartition("/")[0]), {"scalars": 0}).Reload()
    for count in (20, 12, 60):  # of 20 rows the last 8 are lost and done again
        write_scalars(store, RUN, every[:count])
        found.Reload()
    assert points(found, "lr") == [(row.time, row.step, np.float32(row.lr)) for row in every]


def test_no_rows_are_an_empty_run(store: Store, tmp_path: Path):
    write_scalars(store, RUN, [])
    (tmp_path / "seen").mkdir()
    assert seen(store, "scalars", tmp_path / "seen").Tags()["scalars"] == []


def test_tensorboard_shows_the_panels_as_they_are(store: Store, tmp_path: Path):
    rng = np.random.default_rng(5)
    drawn = {
        step: {f"image {i}": rng.integers(0, 256, (h, w, 3), np.uint8) for i, h, w in ((7, 5, 9), (12, 33, 700))}
        for step in (20, 3, 100_000)
    }
    write_panels(store, RUN, 20, 1.0, drawn[3])
    for step, panels in drawn.items():  # that of step 20 anew, as a resumed run would
        write_panels(store, RUN, step, 1_790_000_000.5 + step, panels)
    names = [entry.key.rpartition("/")[2] for entry in store.list(f"{RUN}/tensorboard/panels/")]
    assert names == [f"events.out.tfevents.{step:010d}.tessera" for step in (3, 20, 100_000)]
    (tmp_path / "seen").mkdir()
    found = seen(store, "panels", tmp_path / "seen")
    assert sorted(found.Tags()["images"]) == ["image 12", "image 7"]
    for tag in found.Tags()["images"]:
        events = found.Images(tag)
        assert [(event.step, event.wall_time) for event in events] == [(s, 1_790_000_000.5 + s) for s in sorted(drawn)]
        for event in events:
            panel = drawn[event.step][tag]
            assert (event.height, event.width) == panel.shape[:2]
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), panel)


def test_a_store_that_refuses_is_told(tmp_path: Path):
    (tmp_path / "train").write_text("in the way")
    with pytest.raises(TesseraError, match=r"cannot write .*tfevents"):
        write_scalars(open_store(str(tmp_path)), RUN, ROWS)
