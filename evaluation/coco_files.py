"""`python -m evaluation.coco_files TRUTH.json PREDICTIONS.json`: PQ of files in COCO's panoptic format.

What the COCO panoptic API computes, from the same files, with areas counted from the pixels. PNGs lie in a folder of
the JSON's name without its ending, or where --truth-pngs and --predicted-pngs say.
"""

import argparse
import json
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.pq import PQStats, ious, joint_labels, match, summarise, tally
from infra.errors import TesseraError
from preprocessing import rgb_ids
from preprocessing.files import File, leads_outside
from preprocessing.kernels import UNKNOWN
from preprocessing.labels import LabelTable
from preprocessing.opening import BROKEN


@dataclass(frozen=True)
class Entry:
    """One entry of `annotations`."""

    png: Path
    ids_N: NDArray[np.int32]
    category_N: NDArray[np.int64]
    """Contiguous ids."""
    crowd_N: NDArray[np.bool_]


def score_files(truth: Path, predictions: Path, truth_pngs: Path, predicted_pngs: Path) -> dict[str, Any]:
    """As pq.summarise, over all images of the truth's JSON.

    Raises TesseraError, naming file and image, for an image without prediction or with two, a PNG that cannot be
    read or has another size, an unknown category, a malformed entry, and a predicted id that is only in the PNG or
    only in the JSON.
    """
    true, predicted = _read(truth), _read(predictions)
    if not isinstance(true.get("categories") or [], list):
        raise TesseraError(f"{truth}: categories are no list")
    labels = LabelTable.from_coco(true.get("categories") or [], str(truth))
    entries = _by_image(true["annotations"], truth, truth_pngs, labels)
    by_image = _by_image(predicted["annotations"], predictions, predicted_pngs, labels)
    total = PQStats.zero(len(labels))
    for image_id, entry in entries.items():
        if image_id not in by_image:
            raise TesseraError(f"{predictions}: no prediction for image {image_id}")
        total += score_image(entry, by_image[image_id], len(labels))
    return summarise(total, labels)


def score_image(truth: Entry, prediction: Entry, categories: int) -> PQStats:
    """Statistics of one image. Raises TesseraError as `score_files` does."""
    truth_HW, _ = _read_png(truth)
    predicted_HW, area_M = _read_png(prediction)
    if truth_HW.shape != predicted_HW.shape:
        sizes = (f"{shape[1]}x{shape[0]}" for shape in (predicted_HW.shape, truth_HW.shape))
        raise TesseraError(f"{prediction.png}: {' px, the truth is '.join(sizes)}")
    if int(area_M.sum()) != predicted_HW.size:
        ids = np.unique(rgb_ids.read_png(File(str(prediction.png)).read())[predicted_HW == UNKNOWN])
        covered = f"{(predicted_HW == UNKNOWN).sum()} px have ids that are not in the JSON"
        raise TesseraError(f"{prediction.png}: {covered}: {', '.join(map(str, ids[:5]))}")
    empty = prediction.ids_N[area_M[1:] == 0]
    if empty.size:
        raise TesseraError(f"{prediction.png}: segment {empty[0]} of the JSON has no pixel in it")
    counts = joint_labels(truth_HW, predicted_HW, truth.ids_N.size, prediction.ids_N.size)
    found = match(counts, ious(counts), truth.category_N, prediction.category_N, truth.crowd_N)
    return tally(found, truth.category_N, prediction.category_N, categories)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(File(str(path)).read())
    except (OSError, RecursionError, ValueError) as error:
        raise TesseraError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise TesseraError(f"{path}: expected a COCO panoptic JSON with annotations")
    return content


def _by_image(annotations: list[Any], path: Path, pngs: Path, labels: LabelTable) -> dict[int | str, Entry]:
    found: dict[int | str, Entry] = {}
    for place, annotation in enumerate(annotations):
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(image_id, int | str):
            raise TesseraError(f"{path}: entry {place} of annotations has the image_id {image_id!r}")
        if image_id in found:
            raise TesseraError(f"{path}: image {image_id} has more than one entry in annotations")
        found[image_id] = read_entry(annotation, path, pngs, labels)
    return found


def read_entry(annotation: dict[str, Any], path: Path, pngs: Path, labels: LabelTable) -> Entry:
    """An entry of the JSON at `path`. Raises TesseraError naming file, image or segment, and what was expected."""
    name, rows = annotation.get("file_name"), annotation.get("segments_info")
    if not isinstance(name, str) or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        expected = "expected a file_name and segments_info, a list of objects"
        raise TesseraError(f"{path}: image {annotation.get('image_id')}: {expected}")
    if leads_outside(name):
        raise TesseraError(f"{path}: image {annotation.get('image_id')}: {name!r} leads outside of {pngs}")
    png, ids, categories = pngs / name, [row.get("id") for row in rows], [row.get("category_id") for row in rows]
    for number, category, crowd in zip(ids, categories, (row.get("iscrowd", 0) for row in rows), strict=True):
        if not isinstance(number, int) or not 0 < number <= rgb_ids.MAX_ID:
            raise TesseraError(f"{png}: the JSON has a segment with the id {number!r}, expected 1 to {rgb_ids.MAX_ID}")
        if not isinstance(category, Hashable) or category not in labels.contiguous:
            raise TesseraError(f"{png}: the category {category!r} is not in the truth's JSON")
        if crowd not in (0, 1):
            raise TesseraError(f"{png}: segment {number} has iscrowd {crowd!r} in the JSON, expected 0 or 1")
    if len(set(ids)) < len(ids):
        raise TesseraError(f"{png}: the JSON lists a segment of it more than once")
    return Entry(
        png,
        np.array(ids, np.int32),
        np.array([labels.contiguous[category] for category in categories], np.int64),
        np.array([bool(row.get("iscrowd", 0)) for row in rows], bool),
    )


def _read_png(entry: Entry) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    try:
        labels_HW, (area_N, *_) = rgb_ids.read_labels(File(str(entry.png)).read(), entry.ids_N)
    except BROKEN as error:
        raise TesseraError(f"{entry.png}: not a readable panoptic PNG ({error})") from error
    return labels_HW, area_N


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
