"""`python -m evaluation.coco_files TRUTH.json PREDICTIONS.json`: PQ of files in COCO's panoptic format.

What the COCO panoptic API computes, from the same files, with areas counted from the pixels. PNGs lie in a folder of
the JSON's name without its ending, or where --truth-pngs and --predicted-pngs say.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.overlaps import overlaps_of
from evaluation.pq import PQStats, match, summarise, tally
from infra.errors import TesseraError
from infra.text import quoted
from preprocessing import rgb_ids
from preprocessing.files import File, leads_outside
from preprocessing.geometry import Size
from preprocessing.json_file import read_json
from preprocessing.json_values import flag, image_key, is_crowd, whole
from preprocessing.kernels import UNKNOWN
from preprocessing.labels import LabelTable
from preprocessing.opening import BROKEN, within_memory
from preprocessing.source import BadSample, known_size
from preprocessing.tree import Folder

log = logging.getLogger("tessera.pq")


@dataclass(frozen=True)
class Entry:
    """One entry of `annotations`."""

    png: File
    ids_N: NDArray[np.int32]
    category_N: NDArray[np.int64]
    """Contiguous ids."""
    crowd_N: NDArray[np.bool_]
    areas: tuple[int | None, ...]
    """Pixels as the JSON has them, where it has them: nothing is computed from these."""
    size: Size | None = None
    """Height, width as the JSON's `images` have them, if they do."""


def score_files(truth: Path, predictions: Path, truth_pngs: Path, predicted_pngs: Path) -> dict[str, Any]:
    """As pq.summarise, over all images of the truth's JSON.

    What the files say twice must agree: raises TesseraError, naming file and image, for an image without prediction or
    with two, a PNG that cannot be read or has another size than the other one or than a JSON says, an id that is only
    in a PNG or only in a JSON, predictions whose own list of categories or images contradicts the truth's, an unknown
    category and a malformed entry. What may be well meant is told in the log: areas that the pixels contradict, PNGs
    that bear another image's name, images that are listed and have no entry.
    """
    true, predicted = _read(truth), _read(predictions)
    labels = LabelTable.from_coco(_objects(true, "categories", truth), str(truth))
    check_categories(_objects(predicted, "categories", predictions), str(predictions), labels, str(truth))
    listed, repeated = _images(true, truth), _images(predicted, predictions)
    for image_id in repeated.keys() & listed.keys():
        for ours, theirs in zip(repeated[image_id], listed[image_id], strict=True):
            if None not in (ours, theirs) and ours != theirs:
                told = f"{quoted(ours)} in images, {quoted(theirs)} in those of {truth}"
                raise TesseraError(f"{predictions}: image {quoted(image_id)} is {told}")
    entries = _by_image(true["annotations"], truth, truth_pngs, labels, listed)
    by_image = _by_image(predicted["annotations"], predictions, predicted_pngs, labels, repeated)
    if listed and (strays := entries.keys() - listed.keys()):
        raise TesseraError(f"{truth}: image {quoted(min(strays, key=str))} of annotations is not in images")
    total = PQStats.zero(len(labels))
    doubts = list(_doubts(entries, by_image, len(listed.keys() - entries.keys())))
    for image_id, entry in entries.items():
        if image_id not in by_image:
            raise TesseraError(f"{predictions}: no prediction for image {quoted(image_id)}")
        total += score_image(entry, by_image[image_id], len(labels), doubts)
    for doubt in doubts[:_TOLD]:
        log.warning("%s", doubt)
    if len(doubts) > _TOLD:
        log.warning("and %d more of this kind", len(doubts) - _TOLD)
    return summarise(total, labels)


_TOLD = 5
"""Doubts that are told one by one."""


def score_image(truth: Entry, prediction: Entry, categories: int, doubts: list[str] | None = None) -> PQStats:
    """Statistics of one image. Adds to `doubts`. Raises TesseraError as `score_files` does."""
    doubts = [] if doubts is None else doubts
    truth_HW, predicted_HW = _read_png(truth, doubts), _read_png(prediction, doubts)
    if truth_HW.shape != predicted_HW.shape:
        raise TesseraError(f"{prediction.png}: {_px(predicted_HW.shape)}, the truth is {_px(truth_HW.shape)}")
    for entry in (truth, prediction):
        if entry.size and entry.size != truth_HW.shape:
            raise TesseraError(f"{entry.png}: {_px(truth_HW.shape)}, the JSON's images say {_px(entry.size)}")
    overlaps = overlaps_of(truth_HW, predicted_HW, truth.ids_N.size, prediction.ids_N.size)
    found = match(overlaps, overlaps.iou_P, truth.category_N, prediction.category_N, truth.crowd_N)
    return tally(found, truth.category_N, prediction.category_N, categories)


def check_categories(listed: Sequence[Mapping[str, Any]], source: str, labels: LabelTable, whose: str) -> None:
    """TesseraError for the first category of predictions that contradicts the table, by id or by name.

    listed: as predictions have them, perhaps without `isthing`, perhaps not all. source, whose: what the error calls
    the list and the table.
    """
    by_name = {category.name: category for category in labels.categories}
    for entry in listed:
        number, name, is_thing = whole(entry.get("id")), entry.get("name"), flag(entry.get("isthing"))
        place = None if number is None else labels.contiguous.get(number)
        known = by_name.get(str(name)) if place is None else labels.categories[place]
        if known is None:  # no segment may have it
            continue
        if (
            number != known.dataset_id
            or (name is not None and str(name) != known.name)
            or is_thing not in (None, known.is_thing)
        ):
            raise TesseraError(f"{source}: category {quoted(dict(entry))}; {whose} has {known}")


def _doubts(entries: Mapping[Any, Entry], predictions: Mapping[Any, Entry], without: int) -> Iterator[str]:
    """What may be well meant, and may be a mistake."""
    if without:
        yield f"{without} images are listed in the truth's JSON and have no entry in its annotations: not scored"
    if extra := len(predictions.keys() - entries.keys()):
        yield f"{extra} images are predicted that the truth does not have: not scored"
    owner = {PurePosixPath(entry.png.name).stem: image_id for image_id, entry in entries.items()}
    for image_id, entry in predictions.items():
        other = owner.get(PurePosixPath(entry.png.name).stem, image_id)
        if other != image_id:
            yield f"{entry.png}: predicted for image {quoted(image_id)}, has the name of image {quoted(other)}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(File(str(path)))
    except (OSError, RecursionError, ValueError) as error:
        raise TesseraError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise TesseraError(f"{path}: expected a COCO panoptic JSON with annotations")
    return content


def _objects(content: Mapping[str, Any], name: str, path: Path) -> list[dict[str, Any]]:
    """A list that may be missing or null. TesseraError if it is something else."""
    listed = content.get(name) or []
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise TesseraError(f"{path}: {name} are no list of objects")
    return listed


_Listed = dict[int | str, tuple[Size | None, str | None]]
"""By image id: height and width, and the file's name without folder and ending, unless the id itself is a name."""


def _images(content: Mapping[str, Any], path: Path) -> _Listed:
    """The `images` of a JSON, none where it has no such list."""
    found: _Listed = {}
    for entry in _objects(content, "images", path):
        key, name = image_key(entry.get("id")), entry.get("file_name")
        try:
            size = known_size(entry)
        except BadSample as problem:
            raise TesseraError(f"{path}: image {quoted(entry.get('id'))}: {problem}") from problem
        if key is None or key in found:
            raise TesseraError(f"{path}: an image has the id {quoted(entry.get('id'))}, expected an id of its own")
        found[key] = size, PurePosixPath(name).stem if isinstance(name, str) and isinstance(key, int) else None
    return found


def _px(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]} px"


def _by_image(
    annotations: list[Any], path: Path, pngs: Path, labels: LabelTable, listed: _Listed
) -> dict[int | str, Entry]:
    found: dict[int | str, Entry] = {}
    folder = Folder.on_disk(str(pngs))
    for place, annotation in enumerate(annotations):
        written = annotation.get("image_id") if isinstance(annotation, dict) else None
        image_id = image_key(written)
        if image_id is None:
            raise TesseraError(f"{path}: entry {place} of annotations has the image_id {quoted(written)}")
        if image_id in found:
            raise TesseraError(f"{path}: image {quoted(image_id)} has more than one entry in annotations")
        size, _ = listed.get(image_id, (None, None))
        found[image_id] = read_entry(annotation, path, folder, labels, size)
    return found


def read_entry(
    annotation: dict[str, Any], path: Path, pngs: Folder, labels: LabelTable, size: Size | None = None
) -> Entry:
    """An entry of the JSON at `path`. Raises TesseraError naming file, image or segment, and what was expected."""
    name, rows = annotation.get("file_name"), annotation.get("segments_info")
    where = f"{path}: image {quoted(annotation.get('image_id'))}"
    if not isinstance(name, str) or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TesseraError(f"{where}: expected a file_name and segments_info, a list of objects")
    if leads_outside(name):
        raise TesseraError(f"{where}: {quoted(name)} leads outside of {pngs.path}")
    png = pngs.file(name, ".png")
    read = [_row(row, png, labels) for row in rows]
    ids, categories, crowds, areas = zip(*read, strict=True) if read else ((), (), (), ())
    if len(set(ids)) < len(ids):
        raise TesseraError(f"{png}: the JSON lists a segment of it more than once")
    arrays = np.array(ids, np.int32), np.array(categories, np.int64), np.array(crowds, bool)
    return Entry(png, *arrays, tuple(areas), size)


def _row(row: dict[str, Any], png: File, labels: LabelTable) -> tuple[int, int, bool, int | None]:
    """Id, contiguous category, whether a crowd, and the area that it claims."""
    number, category, crowd = whole(row.get("id")), whole(row.get("category_id")), is_crowd(row)
    if number is None or not 0 < number <= rgb_ids.MAX_ID:
        expected = f"expected 1 to {rgb_ids.MAX_ID}"
        raise TesseraError(f"{png}: the JSON has a segment with the id {quoted(row.get('id'))}, {expected}")
    if category is None or category not in labels.contiguous:
        raise TesseraError(f"{png}: the category {quoted(row.get('category_id'))} is not in the truth's JSON")
    if crowd is None:
        raise TesseraError(f"{png}: segment {number} has iscrowd {quoted(row['iscrowd'])} in the JSON, expected 0 or 1")
    place = labels.contiguous[category]
    if flag(row.get("isthing")) not in (None, labels.is_thing[place]):
        known = labels.categories[place]
        raise TesseraError(f"{png}: segment {number} has isthing {quoted(row['isthing'])}, its category is {known}")
    return number, place, crowd, whole(row.get("area"))


def _read_png(entry: Entry, doubts: list[str]) -> NDArray[np.uint16]:
    """Labels of an entry's PNG, whose segments are those of the JSON."""
    try:
        with within_memory(str(entry.png)):
            data = entry.png.read()
            labels_HW, (area_N, *_) = rgb_ids.read_labels(data, entry.ids_N)
            if int(area_N.sum()) != labels_HW.size:
                ids = np.unique(rgb_ids.read_png(data)[labels_HW == UNKNOWN])
                covered = f"{(labels_HW == UNKNOWN).sum()} px have ids that are not in the JSON"
                raise TesseraError(f"{entry.png}: {covered}: {', '.join(map(str, ids[:5]))}")
    except BROKEN as error:
        raise TesseraError(f"{entry.png}: not a readable panoptic PNG ({error})") from error
    empty = entry.ids_N[area_N[1:] == 0]
    if empty.size:
        raise TesseraError(f"{entry.png}: segment {empty[0]} of the JSON has no pixel in it")
    wrong = [i for i, area in enumerate(entry.areas) if area and area != area_N[i + 1]]
    if wrong:
        first = f"segment {entry.ids_N[wrong[0]]} has {entry.areas[wrong[0]]} in the JSON, {area_N[wrong[0] + 1]} px"
        doubts.append(f"{entry.png}: {len(wrong)} of {len(entry.areas)} areas are other ones in the PNG: {first}")
    return labels_HW


def to_text(summary: dict[str, Any]) -> str:
    """The headline table."""
    lines = [f"{'':8}{'PQ':>7}{'SQ':>7}{'RQ':>7}{'categories':>12}"]
    for group in ("all", "things", "stuff"):
        values = "".join(f"{'-' if (v := summary[m][group]) is None else f'{v:.2f}':>7}" for m in ("pq", "sq", "rq"))
        lines.append(f"{group:8}{values}{summary['counts'][group]['categories']:>12}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.coco_files", description=__doc__)
    parser.add_argument("truth", type=Path, help="panoptic JSON of the ground truth")
    parser.add_argument("predictions", type=Path, help="panoptic JSON of the predictions")
    parser.add_argument("--truth-pngs", type=Path, help="folder of the truth's PNGs")
    parser.add_argument("--predicted-pngs", type=Path, help="folder of the predictions' PNGs")
    given = parser.parse_args(arguments)
    folders = given.truth_pngs or given.truth.with_suffix(""), given.predicted_pngs or given.predictions.with_suffix("")
    try:
        sys.stdout.write(to_text(score_files(given.truth, given.predictions, *folders)) + "\n")
    except TesseraError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
