"""Predicting files, and writing what comes of it in COCO's panoptic format: no Ray here."""

import errno
import io
import json
import math
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NotRequired, cast

from PIL import Image
from typing_extensions import TypedDict

from evaluation import coco_format
from evaluation.images import UserImage, read_image
from evaluation.predict import Prediction, Predictor
from evaluation.predict_plan import RECORDS, Failure, Item, Plan, Work
from infra import records
from infra.errors import NoSuchObject, StoreError, TesseraError
from infra.opening import check_size
from infra.records import Count
from infra.store import Store, open_store
from infra.text import shown
from preprocessing.labels import LabelTable
from preprocessing.opening import NoMemory, within_memory
from preprocessing.source import stable_id

CHUNK = 32
"""Images of one task."""

_BATCH = 8
_BATCH_PIXELS = 24_000_000  # with labels and masks about 20 bytes each
_OVERLAY = 2048
_NAMELESS = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_NUMBERED = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{1,15})", re.ASCII)
"""COCO's names: 000000000139.jpg, COCO_val2014_000000000042.jpg."""

Row = dict[str, Any]
"""What the store keeps of one predicted image: file_name, png, height, width, segments_info, notes, empty, key."""


@dataclass(frozen=True)
class Outcome:
    """What came of some images."""

    rows: tuple[Row, ...]
    failed: tuple[Failure, ...]
    fresh: int
    """Images that were predicted just now; the other rows were there already."""


@dataclass(frozen=True)
class Summary:
    """What one call came to; the URLs of what it wrote."""

    images: int
    fresh: int
    failed: tuple[Failure, ...]
    empty: tuple[Failure, ...]
    """Images without any segment, and why."""
    ignored: int
    outputs: tuple[str, ...]
    """Folders of the input that were left out, as they hold what earlier calls wrote."""
    predictions: str
    problems: str
    archive: str | None
    """The zip for COCO's server, if every image of the list was done."""


def predict_chunk(work: Work, items: Sequence[Item], device: str | None) -> Outcome:
    """Predict the images that are not done yet: PNG, overlay, then the record, whose presence means done.

    An image that cannot be read, is of another size than listed, or on which the network fails is told in `failed`.
    """
    output = open_store(work.output)
    rows, todo = [], []
    for item in items:
        row = _done(output, work, item)
        rows.append(row) if row else todo.append(item)
    failed: list[Failure] = []
    fresh: list[Row] = []
    for batch in _batches(work, todo, failed):
        for item, prediction in _predicted(work, batch, device, failed):
            try:
                with within_memory():
                    fresh.append(_write(output, work, item, prediction))
            except NoMemory as error:
                failed.append(Failure(item.name, str(error)))
            except StoreError as error:
                if not _of_its_name(error):
                    raise
                failed.append(Failure(item.name, f"its predictions have no place in the output: {error}"))
    return Outcome((*rows, *fresh), tuple(failed), len(fresh))


def _of_its_name(error: StoreError) -> bool:
    """Whether a store refused an object for what it is called: too long, or the folder of another. No other fails."""
    cause = error.__cause__
    return (isinstance(cause, OSError) and cause.errno in _NAMELESS) or "KeyTooLong" in str(error)


def _done(output: Store, work: Work, item: Item) -> Row | None:
    record = f"{RECORDS}/{item.name}.json"
    try:
        row = _record(output, item.name) if output.exists(record) else None
    except TesseraError:  # a name that is no key: reading the image will say so; or a damaged record
        return None
    if row is None or row["key"] != item.key(work):
        return None
    promised = {f"{work.folder}/{item.png}": row.get("png_bytes")}
    promised |= {_overlay(item): row.get("overlay_bytes")} if work.overlays else {}
    return row if all(_is_there(output, *one) for one in promised.items()) else None


def _is_there(output: Store, key: str, size: int | None) -> bool:
    """Whether the object is there, and whole by its size, where the record has that."""
    with suppress(NoSuchObject):
        return output.stat(key).size == size if size is not None else output.exists(key)
    return False


def _overlay(item: Item) -> str:
    return f"overlays/{PurePosixPath(item.png).with_suffix('.jpg')}"


def _batches(work: Work, items: Sequence[Item], failed: list[Failure]) -> Iterator[list[tuple[Item, UserImage]]]:
    """Decoded images, as many at once as memory is sure to hold."""
    source, batch, pixels = open_store(work.source), list[tuple[Item, UserImage]](), 0
    for item in items:
        try:
            check_size(item.bytes)
            with within_memory():
                image = read_image(source.read(item.name), work.upright)
            _check_shape(item, image)
        except (OSError, TesseraError) as error:
            failed.append(Failure(item.name, str(error)))
            continue
        size = math.prod(image.rgb_HW3.shape[:2])
        if batch and (len(batch) == _BATCH or pixels + size > _BATCH_PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append((item, image))
        pixels += size
    if batch:
        yield batch


def _check_shape(item: Item, image: UserImage) -> None:
    height, width = image.rgb_HW3.shape[:2]
    if item.size is not None and item.size != (height, width):
        raise TesseraError(f"the image is {width}x{height}, the list says {item.size[1]}x{item.size[0]}")


def _predicted(
    work: Work, batch: list[tuple[Item, UserImage]], device: str | None, failed: list[Failure]
) -> Iterator[tuple[Item, Prediction]]:
    """Predictions of a batch; where the network fails on it, one by one, so that only its culprit is lost."""
    predictor = load_predictor(work.storage, work.run, work.options, device)
    try:
        yield from zip([item for item, _ in batch], predictor.batch([image for _, image in batch]), strict=True)
    except TesseraError as error:
        if len(batch) == 1:
            failed.append(Failure(batch[0][0].name, str(error)))
            return
        for single in batch:
            yield from _predicted(work, [single], device, failed)


@lru_cache(maxsize=1)
def load_predictor(storage: str, run: str, options: str, device: str | None) -> Predictor:
    """Predictor.load, once in a process that predicts many chunks; options: JSON."""
    return Predictor.load(storage, run, device, json.loads(options))


def _write(output: Store, work: Work, item: Item, prediction: Prediction) -> Row:
    png, overlay_bytes = coco_format.png(prediction.panoptic), None
    output.write(f"{work.folder}/{item.png}", png)
    if work.overlays:
        buffer = io.BytesIO()
        Image.fromarray(prediction.overlay(_OVERLAY)).save(buffer, "JPEG", quality=90)
        output.write(_overlay(item), buffer.getvalue())
        overlay_bytes = len(buffer.getvalue())
    height, width = prediction.panoptic.size
    row = {
        "key": item.key(work),
        "file_name": item.name,
        "png": item.png,
        "height": height,
        "width": width,
        "segments_info": coco_format.annotation(prediction.panoptic, prediction.labels, 0, item.png)["segments_info"],
        "notes": prediction.notes,
        "empty": prediction.empty,
        "png_bytes": len(png),
        "png_crc": zlib.crc32(png),
        "overlay_bytes": overlay_bytes,
    }
    output.write(f"{RECORDS}/{item.name}.json", records.to_json(row, indent=None))
    return row


def finish(plan: Plan, labels: LabelTable, outcomes: Sequence[Outcome]) -> Summary:
    """Write `<folder>.json` and problems.json, and for a COCO list, once all its images are done, the zip.

    The JSON lists what earlier calls with the same run and input predicted, too: nothing in the output is lost. What
    failed is told of this call only, as the next one tries it again.
    """
    work, output = plan.work, open_store(plan.work.output)
    failed = (*plan.missing, *(failure for outcome in outcomes for failure in outcome.failed))
    rows = [row for outcome in outcomes for row in outcome.rows]
    if not plan.listed:
        earlier = _earlier(output, {row["file_name"] for row in rows} | {failure.file_name for failure in failed})
        taken = {row["png"]: row["file_name"] for row in rows}
        rows += [row for row in earlier if row["png"] not in taken]
        failed += tuple(
            Failure(row["file_name"], f"its PNG was replaced by that of {taken[row['png']]}: predict it again")
            for row in earlier
            if row["png"] in taken
        )
    rows.sort(key=lambda row: row["file_name"])
    listing = json.dumps(_to_coco(rows, _image_ids(plan, rows), labels)).encode()
    output.write(f"{work.folder}.json", listing)
    empty = tuple(Failure(row["file_name"], row["empty"]) for row in rows if row["empty"])
    _write_problems(output, plan, rows, failed, empty)
    archive = None
    if plan.listed and not failed:
        output.write(f"{work.folder}.zip", _zipped(output, work, rows, listing))
        archive = output.url_for(f"{work.folder}.zip")
    fresh = sum(outcome.fresh for outcome in outcomes)
    urls = output.url_for(f"{work.folder}.json"), output.url_for("problems.json")
    return Summary(len(rows), fresh, failed, empty, len(plan.ignored), plan.outputs, *urls, archive)


def _earlier(output: Store, known: set[str]) -> list[Row]:
    keys = (entry.key for entry in output.list(f"{RECORDS}/") if entry.key.endswith(".json"))
    names = (key.removeprefix(f"{RECORDS}/").removesuffix(".json") for key in keys)
    return [
        _record(output, name) for name in names if name not in known and not PurePosixPath(name).name.startswith(".")
    ]


class _Record(TypedDict):
    key: str
    file_name: str
    png: str
    height: Count
    width: Count
    segments_info: list[coco_format.SegmentInfo]
    notes: list[str]
    empty: str
    png_bytes: NotRequired[Count | None]
    png_crc: NotRequired[Count | None]
    overlay_bytes: NotRequired[Count | None]


def _record(output: Store, name: str) -> Row:
    key = f"{RECORDS}/{name}.json"
    try:
        row = records.read(output, key, _Record)
    except StoreError:
        raise
    except TesseraError as error:
        raise TesseraError(f"{error}; delete it and run again") from error
    if row["file_name"] != name:
        raise TesseraError(f"{output.url_for(key)}: it is the record of another image; delete it and run again")
    return cast(Row, row)


def _image_ids(plan: Plan, rows: Sequence[Row]) -> list[int]:
    """The COCO list's ids; else each file's number, where its name is one that no other file has, as COCO's are; else a
    hash of its name."""
    if plan.listed:
        id_by_name = {item.name: item.image_id for item in plan.items}
        return [int(id_by_name[row["file_name"]] or 0) for row in rows]
    numbers = [_number(row["file_name"]) for row in rows]
    counts = Counter(numbers)
    taken = {number for number in numbers if number is not None}
    ids: list[int] = []
    for row, number in zip(rows, numbers, strict=True):
        if number is None or counts[number] > 1:
            number = stable_id(row["file_name"])
            while number in taken:
                number += 1
            taken.add(number)
        ids.append(number)
    return ids


def _number(name: str) -> int | None:
    found = _NUMBERED.fullmatch(PurePosixPath(name).stem)
    return int(found[1]) if found else None


def _to_coco(rows: Sequence[Row], ids: Sequence[int], labels: LabelTable) -> dict[str, Any]:
    numbered = list(zip(ids, rows, strict=True))
    return {
        "images": [{"id": i, **{name: row[name] for name in ("file_name", "height", "width")}} for i, row in numbered],
        "annotations": [
            {"image_id": i, "file_name": row["png"], "segments_info": row["segments_info"]} for i, row in numbered
        ],
        "categories": labels.to_coco(),
    }


def _write_problems(
    output: Store, plan: Plan, rows: Sequence[Row], failed: Sequence[Failure], empty: Sequence[Failure]
) -> None:
    content = {
        "failed": [vars(failure) for failure in failed],
        "empty": [vars(failure) for failure in empty],
        "notes": [{"file_name": row["file_name"], "notes": row["notes"]} for row in rows if row["notes"]],
        "ignored": plan.ignored,
        "outputs": plan.outputs,
    }
    output.write("problems.json", json.dumps(content, indent=1).encode())


def _zipped(output: Store, work: Work, rows: Sequence[Row], listing: bytes) -> bytes:
    """What COCO's server takes: the JSON and the folder of PNGs, by one name, at the top of a zip of that name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # PNGs are deflated already
        archive.writestr(f"{work.folder}.json", listing, zipfile.ZIP_DEFLATED)
        for row in rows:
            png = output.read(key := f"{work.folder}/{row['png']}")
            if row.get("png_crc") not in (None, zlib.crc32(png)):
                raise TesseraError(f"{output.url_for(key)}: damaged since it was written; delete it and run again")
            archive.writestr(key, png)
    return buffer.getvalue()


def told(row: Row, labels: LabelTable) -> str:
    """One line about a predicted image: what was found, the most frequent categories first."""
    counts: dict[str, int] = {}
    for segment in row["segments_info"]:
        name = labels.names[labels.contiguous[segment["category_id"]]]
        counts[name] = counts.get(name, 0) + 1
    named = [f"{n} {name}" if n > 1 else name for name, n in sorted(counts.items(), key=lambda item: -item[1])]
    more = f" and {len(named) - 8} more categories" if len(named) > 8 else ""
    found = f"{_counted(len(row['segments_info']))}: {', '.join(named[:8])}{more}" if counts else row["empty"]
    notes = f" ({'; '.join(row['notes'])})" if row["notes"] else ""
    return f"{shown(row['file_name'])}: {row['width']}x{row['height']}, {found}{notes}"


def _counted(segments: int) -> str:
    return "1 segment" if segments == 1 else f"{segments} segments"
