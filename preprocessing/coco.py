"""COCO's panoptic layout: an annotation JSON, a folder of RGB-id PNGs, a folder of images."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infra.errors import TesseraError
from preprocessing import rgb_ids
from preprocessing.kernels import UNKNOWN, relabel
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment, measured


class BadSample(Exception):
    """A sample that cannot be used; its text is the reason kept in the manifest."""


@dataclass(frozen=True)
class Rejected:
    """A sample set aside."""

    sample: str
    reason: str


@dataclass(frozen=True)
class CocoRecord:
    """What one task needs to read one sample: paths and the sample's own rows of the annotation JSON."""

    image_id: int
    image_path: str
    png_path: str
    size: tuple[int, int]
    """Height, width, as the JSON says."""
    segments_info: tuple[dict[str, Any], ...]

    def fingerprint(self) -> str:
        """Hash of the sample's rows and of its files' names and sizes: changes when the sample does.

        File sizes stand for their contents: reading every byte of a full COCO to find out that nothing
        changed would cost as much as computing the targets.
        """
        sizes = [_file_size(path) for path in (self.image_path, self.png_path)]
        names = [Path(path).name for path in (self.image_path, self.png_path)]
        facts = [self.image_id, names, sizes, self.size, self.segments_info]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class CocoIndex:
    """One split of a data set, read once by the driver."""

    labels: LabelTable
    records: tuple[CocoRecord, ...]
    rejected: tuple[Rejected, ...]


def read_index(root: str | Path, split: str) -> CocoIndex:
    """Read `root/annotations/panoptic_<split>.json` and pair it with `root/<split>/` images and PNGs.

    Raises TesseraError for a missing folder or file, a JSON that is not a panoptic one, and an empty data
    set. Entries that cannot be paired (a PNG without JSON entry, an entry without image) are rejected.
    """
    annotation_file, masks, images = check_layout(root, split)
    content = _read_json(annotation_file)
    labels = LabelTable.from_coco(content["categories"], str(annotation_file))
    image_by_id = {entry.get("id"): entry for entry in content["images"]}
    if len(image_by_id) < len(content["images"]):
        counts = Counter(entry.get("id") for entry in content["images"])
        raise TesseraError(
            f"{annotation_file}: image ids {[i for i, n in counts.items() if n > 1][:5]} are listed twice"
        )
    records, rejected = [], []
    for entry in content["annotations"]:
        try:
            records.append(_record(entry, image_by_id, masks, images))
        except BadSample as problem:
            rejected.append(Rejected(str(entry.get("file_name", entry.get("image_id"))), str(problem)))
    rejected += _unpaired(content["annotations"], image_by_id, masks)
    if not records and content["annotations"]:
        shown = "; ".join(f"{r.sample}: {r.reason}" for r in rejected[:5])
        raise TesseraError(f"{annotation_file}: no usable sample ({shown})")
    if not records:
        raise TesseraError(f"{annotation_file}: the data set is empty, no image has an annotation")
    return CocoIndex(labels, tuple(records), tuple(rejected))


def check_layout(root: str | Path, split: str) -> tuple[Path, Path, Path]:
    """Annotation JSON, PNG folder and image folder of a split. TesseraError naming what is not there."""
    folder = Path(root)
    masks = folder / "annotations" / f"panoptic_{split}"
    paths = masks.with_name(f"{masks.name}.json"), masks, folder / split
    for path in (folder, *paths):
        if not (path.is_file() if path == paths[0] else path.is_dir()):
            raise TesseraError(f"{path}: not found (expected COCO's layout under {folder})")
    return paths


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise TesseraError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise TesseraError(f"{path}: holds a {type(content).__name__}; expected a COCO panoptic JSON")
    missing = {"images", "annotations", "categories"} - set(content)
    if missing:
        raise TesseraError(f"{path}: lacks {sorted(missing)}; expected a COCO panoptic JSON")
    if content["annotations"] and "segments_info" not in content["annotations"][0]:
        raise TesseraError(f"{path}: annotations have no segments_info (is this the detection JSON?)")
    return content


def _record(entry: dict[str, Any], image_by_id: dict[int, dict[str, Any]], masks: Path, images: Path) -> CocoRecord:
    image_id, rows = _whole(entry, "image_id"), entry.get("segments_info")
    image = image_by_id.get(image_id)
    if image is None:
        raise BadSample(f"image id {image_id} is not in the JSON's images")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadSample("segments_info is no list of objects")
    return CocoRecord(
        image_id,
        str(images / _name(image)),
        str(masks / _name(entry)),
        (_whole(image, "height"), _whole(image, "width")),
        tuple(rows),
    )


def _whole(entry: dict[str, Any], field: str) -> int:
    value = entry.get(field)
    if not isinstance(value, int):
        raise BadSample(f"{field} is {value!r}, expected an integer")
    return value


def _name(entry: dict[str, Any]) -> str:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name.isprintable():
        raise BadSample(f"file_name is {name!r}, expected a path")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadSample(f"file name {name!r} leads outside the data set")
    return name


def _unpaired(
    annotations: Iterable[dict[str, Any]], image_by_id: dict[int, dict[str, Any]], masks: Path
) -> list[Rejected]:
    """PNGs and images that no annotation mentions, and images annotated twice."""
    annotated = Counter(i for entry in annotations if isinstance(i := entry.get("image_id"), int))
    named = {str(entry.get("file_name")) for entry in annotations}
    orphans = sorted(path.name for path in masks.iterdir() if path.suffix == ".png" and path.name not in named)
    lone = [str(entry.get("file_name", key)) for key, entry in image_by_id.items() if key not in annotated]
    twice = [str(key) for key, count in annotated.items() if count > 1]
    if twice:
        raise TesseraError(f"{masks}.json: image ids {twice[:5]} have more than one annotation")
    return [Rejected(name, "the PNG has no entry in the JSON") for name in orphans] + [
        Rejected(name, "the image has no annotation in the JSON") for name in lone
    ]


def read_sample(record: CocoRecord, labels: LabelTable) -> tuple[bytes, PanopticMap]:
    """The image file's bytes, checked to decode, and the panoptic map with dense ids 1..N in JSON order.

    Raises BadSample when a file is missing, truncated or of another size, when PNG and JSON disagree about
    an id, and when a category is unknown.
    """
    image = _read_file(record.image_path)
    with _decoded(image, record.image_path) as picture:
        image_size = (picture.height, picture.width)
    raw_HW = _read_ids(record.png_path)
    for what, size in (("image", image_size), ("PNG", raw_HW.shape)):
        if size != record.size:
            raise BadSample(f"the {what} is {size[1]}x{size[0]}, the JSON says {record.size[1]}x{record.size[0]}")
    return image, panoptic_map(raw_HW, record.segments_info, labels)


def panoptic_map(raw_HW: NDArray[np.int32], segments_info: Iterable[dict[str, Any]], labels: LabelTable) -> PanopticMap:
    """Pair a map of raw ids with its rows of the JSON.

    raw_HW: int32 (H, W), 0 = void. Returns a map whose id i is the i-th row (1-based), areas counted.
    Raises BadSample naming the id: repeated, zero, in only one of the two, or of an unknown category.
    """
    rows = list(segments_info)
    wide = np.array([_field(row, "id") for row in rows], object)
    _refuse_bad_ids(wide)
    ids = wide.astype(np.int32)
    order = np.argsort(ids)
    dense_HW = relabel(raw_HW, ids[order], (order + 1).astype(np.uint16))
    unlisted = raw_HW[dense_HW == UNKNOWN]
    if unlisted.size:
        raise BadSample(f"segment {unlisted[0]} covers {(unlisted == unlisted[0]).sum()} px but is not in the JSON")
    segments = measured(dense_HW, [_segment(row, labels) for row in rows])
    for row, segment in zip(rows, segments, strict=True):
        if segment.area == 0:
            raise BadSample(f"segment {row['id']} is in the JSON but has no pixel in the PNG")
    return PanopticMap(dense_HW.astype(np.int32), tuple(segments))


def _segment(row: dict[str, Any], labels: LabelTable) -> Segment:
    category = labels.contiguous.get(_field(row, "category_id"))
    if category is None:
        raise BadSample(f"segment {row['id']} has the unknown category {row['category_id']}")
    return Segment(0, category, bool(labels.is_thing[category]), bool(row.get("iscrowd", 0)))


def _refuse_bad_ids(ids_N: NDArray[np.int32]) -> None:
    if ids_N.size >= UNKNOWN:
        raise BadSample(f"{ids_N.size} segments in one image; at most {UNKNOWN - 1} fit")
    values, counts = np.unique(ids_N, return_counts=True)
    if (counts > 1).any():
        raise BadSample(f"segment {values[counts > 1][0]} is listed more than once")
    if values.size and (values[0] <= 0 or values[-1] > rgb_ids.MAX_ID):
        raise BadSample(f"segment ids run from {values[0]} to {values[-1]}; expected 1 to {rgb_ids.MAX_ID}")


def _field(row: dict[str, Any], name: str) -> int:
    try:
        return int(row[name])
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise BadSample(f"segment {row.get('id')} has no integer {name!r}") from error


def _read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadSample(f"{path}: cannot be read ({error.strerror})") from error


def _decoded(data: bytes, path: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
        # Pillow fills what an interrupted download left as zeros with grey; some cameras write after the end
        if picture.format == "JPEG" and b"\xff\xd9" not in data.rstrip(b"\0")[-4096:]:
            raise OSError("the JPEG has no end marker")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(f"{path}: not a readable image ({error})") from error
    return picture


def _read_ids(path: str) -> NDArray[np.int32]:
    try:
        return rgb_ids.read_png(_read_file(path))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(f"{path}: not a readable panoptic PNG ({error})") from error


def _file_size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1  # missing: the shard task rejects the sample with its reason
