"""Any data set in COCO's panoptic layout, so that other tools can read it."""

import json
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from infra.errors import TesseraError
from preprocessing import rgb_ids
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap
from preprocessing.source import BadSample, Index, Rejected, read_sample


def write_coco(index: Index, folder: str | Path, split: str) -> tuple[Rejected, ...]:
    """Write `folder/annotations/panoptic_<split>.json`, its PNGs and `folder/<split>/` with the images' own bytes.

    Files are named by image id; segments keep the ids 1..N of their panoptic map. Samples that cannot be used
    are left out, and returned with the reason.

    The split is there whole or not at all: it is made beside `folder` and moved in at the end, the JSON last.
    Other splits in `folder` stay. Raises TesseraError if any part of the split is already there, or if no
    sample can be used.
    """
    folder = Path(folder).resolve()
    parts = [split, f"annotations/panoptic_{split}", f"annotations/panoptic_{split}.json"]
    if Path(split).name != split:
        raise TesseraError(f"split {split!r}: expected a name without folders")
    if folder.exists() and not folder.is_dir():
        raise TesseraError(f"{folder}: is a file, expected a folder or nothing")
    there = [str(folder / part) for part in parts if (folder / part).exists()]
    if there:
        raise TesseraError(f"{there[0]}: already there; nothing was written")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.part-") as making:
        made = Path(making) / "set"
        rejected = _write(index, made, split)
        _move(made, folder, parts)
    return rejected


def _write(index: Index, root: Path, split: str) -> tuple[Rejected, ...]:
    images, masks = root / split, root / "annotations" / f"panoptic_{split}"
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    listed, annotations, rejected = [], [], []
    for record in index.records:
        try:
            data, truth = read_sample(record, index.labels)
        except BadSample as problem:
            rejected.append(Rejected(record.image_id, str(record.masks[0]), str(problem)))
            continue
        stem, suffix = f"{record.image_id:012d}", PurePosixPath(record.image.name).suffix
        (images / f"{stem}{suffix}").write_bytes(data)
        (masks / f"{stem}.png").write_bytes(rgb_ids.write_png(truth.ids))
        height, width = truth.size
        listed.append({"id": record.image_id, "file_name": f"{stem}{suffix}", "height": height, "width": width})
        rows = segments_info(truth, index.labels)
        annotations.append({"image_id": record.image_id, "file_name": f"{stem}.png", "segments_info": rows})
    if not annotations:
        raise TesseraError(f"{split}: no usable sample ({'; '.join(map(str, rejected[:5])) or 'the index is empty'})")
    content = {"images": listed, "annotations": annotations, "categories": index.labels.to_coco()}
    (masks.parent / f"{masks.name}.json").write_text(json.dumps(content))
    return tuple(rejected)


def segments_info(truth: PanopticMap, labels: LabelTable) -> list[dict[str, Any]]:
    """The rows of COCO's panoptic JSON: the data set's own category ids, plain ints, areas and boxes as counted."""
    return [
        {
            "id": int(segment.id),
            "category_id": labels.categories[segment.category].dataset_id,
            "area": int(segment.area),
            "bbox": [int(value) for value in segment.box],
            "iscrowd": int(segment.is_crowd),
        }
        for segment in truth.segments
    ]


def _move(made: Path, folder: Path, parts: list[str]) -> None:
    """Into place: at once if `folder` is new, else part by part, and back if that cannot be finished."""
    if not folder.exists():
        made.rename(folder)
        return
    moved: list[Path] = []
    try:
        for part in parts:
            target = folder / part
            target.parent.mkdir(exist_ok=True)
            (made / part).rename(target)
            moved.append(target)
    except BaseException:
        for target in moved:
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        raise
