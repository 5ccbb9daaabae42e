"""A run for TensorBoard: `tensorboard --load_fast=false --logdir <run>/tensorboard`.

Its fast loader keeps files open; the store puts a new one in place of the old, which that loader would never see.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from infra.store import Store
from preprocessing.pictures import Picture
from training.metrics import Row, flat

FOLDER = "tensorboard"


def write_scalars(store: Store, run: str, rows: Sequence[Row]) -> None:
    """The run's one file of scalars, made anew, so that what a resumed run does again is there once.

    Tags: the columns of the run's table but `step` and `time`, which are the events'. The bytes follow from the rows,
    and those of more rows start with those of fewer: a TensorBoard that is watching reads on where it was. TesseraError
    if the store fails.
    """
    _write(store, f"{run}/{FOLDER}/scalars", 0, [_event(row.step, row.time, _scalars(row)) for row in rows])


def write_panels(store: Store, run: str, step: int, time: float, panels: Mapping[str, Picture]) -> None:
    """Pictures of a step by tag, uint8 (H, W, 3): a file for each step, in place of an earlier one of that step.

    time: seconds since 1970. TesseraError if the store fails.
    """
    _write(store, f"{run}/{FOLDER}/panels", step, [_event(step, time, [_picture(*panel) for panel in panels.items()])])


def _scalars(row: Row) -> list[Summary.Value]:
    # By name: the order of a row's losses is not the same after it was on the store.
    values = sorted(flat(row).items())
    return [Summary.Value(tag=tag, simple_value=value) for tag, value in values if tag not in ("step", "time")]


def _picture(tag: str, panel: Picture) -> Summary.Value:
    buffer = io.BytesIO()
    Image.fromarray(panel).save(buffer, "PNG")
    height, width, channels = panel.shape
    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=buffer.getvalue())
    return Summary.Value(tag=tag, image=image)


def _event(step: int, time: float, values: Iterable[Summary.Value]) -> Event:
    return Event(wall_time=time, step=step, summary=Summary(value=values))


def _write(store: Store, folder: str, number: int, events: Sequence[Event]) -> None:
    """One event file. TensorBoard takes its first event for the beginning of the run; without events it is empty."""
    first = [Event(wall_time=event.wall_time, file_version="brain.Event:2") for event in events[:1]]
    with TemporaryDirectory() as scratch:  # RecordWriter takes nothing but paths
        file = Path(scratch, "events")
        writer = RecordWriter(str(file))
        for event in (*first, *events):
            writer.write(event.SerializeToString(deterministic=True))
        writer.close()
        store.write(f"{folder}/events.out.tfevents.{number:010d}.tessera", file.read_bytes())
