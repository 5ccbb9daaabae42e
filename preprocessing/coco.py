"""COCO's panoptic layout: an annotation JSON, a folder of RGB-id PNGs, a folder of images; or the published zips."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from infra.errors import TesseraError
from infra.text import quoted
from preprocessing import rgb_ids
from preprocessing.files import File, leads_outside
from preprocessing.json_file import read_json
from preprocessing.json_values import image_key, is_crowd, whole
from preprocessing.kernels import UNKNOWN
from preprocessing.labels import LabelTable
from preprocessing.opening import BROKEN
from preprocessing.paired import find_folder, most_frequent
from preprocessing.panoptic_map import PanopticMap, Segment, tabulate
from preprocessing.source import (
    BadSample,
    Defect,
    Index,
    Record,
    Rejected,
    TooManyBad,
    known_id,
    known_size,
    read_file,
    without_repeats,
)
from preprocessing.tree import Folder, Tree

_PNG = ".png"
"""What the name of a PNG ends with in the annotations; in some exports it is the image's."""
_NONE = -1
"""Category of segments whose own cannot be read."""


@dataclass(frozen=True)
class CocoRecord(Record):
    """A sample in COCO's layout, with its own rows of the annotation JSON."""

    mask: File
    segments_info: tuple[dict[str, Any], ...]

    @property
    def masks(self) -> tuple[File, ...]:
        """The PNG of RGB ids."""
        return (self.mask,)

    def facts(self) -> Any:
        """The rows."""
        return self.segments_info

    def read_truth(self, labels: LabelTable, defects: list[Defect]) -> PanopticMap | None:
        """The map whose id i is the i-th row (1-based); areas and boxes are counted, not believed."""
        rows = self._rows(labels, defects)
        data = read_file(self, self.mask, defects)
        if data is None:
            return None
        try:
            labels_HW, measures = rgb_ids.read_labels(data, np.array([*rows], np.int32))
        except BROKEN as error:
            defects.append(self.defect(f"not a readable panoptic PNG ({error})"))
            return None
        unlisted_HW = labels_HW == UNKNOWN
        if unlisted_HW.any():
            defects += self._unlisted(rgb_ids.read_png(data), unlisted_HW)
            labels_HW[unlisted_HW] = 0
        segments = tabulate([segment for _, segment in rows.values()], *measures)
        defects += self._lies(rows, segments)
        known = [segment for segment in segments if segment.category != _NONE]
        if len(known) < len(segments):
            is_known_N = np.array([False, *(segment.category != _NONE for segment in segments)])
            labels_HW[~is_known_N[labels_HW]] = 0
        if not known:
            defects.append(self.defect("every pixel is void", usable=True))
        return PanopticMap(labels_HW.astype(np.int32), tuple(known))

    def _rows(self, labels: LabelTable, defects: list[Defect]) -> dict[int, tuple[dict[str, Any], Segment]]:
        """By the id in the PNG: the rows whose id can be understood, and their segments."""
        if len(self.segments_info) >= UNKNOWN:
            defects.append(self.defect(f"{len(self.segments_info)} segments in one image; at most {UNKNOWN - 1} fit"))
            return {}
        found: dict[int, tuple[dict[str, Any], Segment]] = {}
        for row in self.segments_info:
            try:
                number = _number(row, "id")
                if number in found:
                    raise BadSample(f"segment {number} is listed more than once")
                if not 1 <= number <= rgb_ids.MAX_ID:
                    raise BadSample(f"segment id {quoted(number)}; expected 1 to {rgb_ids.MAX_ID}")
                found[number] = row, Segment(0, _NONE, False)  # its pixels are its own even if its category is none
                found[number] = row, self._segment(number, row, labels)
            except BadSample as problem:
                defects.append(self.defect(str(problem), segment=whole(row.get("id"))))
        return found

    def _segment(self, number: int, row: dict[str, Any], labels: LabelTable) -> Segment:
        category = labels.contiguous.get(_number(row, "category_id"))
        if category is None:
            raise BadSample(f"segment {number} has the unknown category {quoted(row['category_id'])}")
        crowd = is_crowd(row)
        if crowd is None:
            raise BadSample(f"segment {number} has iscrowd {quoted(row['iscrowd'])}; expected 0 or 1")
        return Segment(0, category, bool(labels.is_thing[category]), crowd)

    def _unlisted(self, ids_HW: NDArray[np.int32], unlisted_HW: NDArray[np.bool_]) -> Iterator[Defect]:
        """Ids that only the PNG has."""
        found, others = most_frequent(ids_HW, unlisted_HW)
        for number, pixels, x, y in found:
            problem = f"segment {number} covers {pixels} px, the first at x={x}, y={y}, but is not in the JSON"
            yield self.defect(problem, segment=number)
        if others:
            yield self.defect(f"{others} more segments are not in the JSON")

    def _lies(self, rows: dict[int, tuple[dict[str, Any], Segment]], segments: list[Segment]) -> Iterator[Defect]:
        """What the JSON's rows say otherwise than the pixels of their segments."""
        stuff = Counter(s.category for s in segments if not s.is_thing)
        for (number, (row, _)), segment in zip(rows.items(), segments, strict=True):
            tell = partial(self.defect, segment=number)
            if segment.area == 0:
                yield tell(f"segment {number} is in the JSON but has no pixel in the PNG")
                continue
            for name, counted in (("area", segment.area), ("bbox", list(segment.box))):
                written = row.get(name)
                if written not in (None, [], counted):  # left open, or as it is
                    yield tell(
                        f"segment {number} has the {name} {quoted(written)} in the JSON, counted {counted}", usable=True
                    )
            if segment.is_thing or segment.category == _NONE:
                continue
            if segment.is_crowd:
                yield tell(f"segment {number} is stuff and a crowd", usable=True)
            if stuff[segment.category] > 1:
                yield tell(f"segment {number} is one of several of its stuff category; COCO has one", usable=True)


def read_index(root: str | Path, split: str) -> Index:
    """Read `root/annotations/panoptic_<split>.json` and pair it with PNGs and images.

    The PNGs lie in `root/annotations/panoptic_<split>` or `root/panoptic_<split>`, the images in `root/<split>` or
    `root/images/<split>`. Each of the three may lie in a zip at the root; the PNGs also in `panoptic_<split>.zip`
    beside the JSON or in the zip that holds the JSON, as COCO publishes them. All of it may lie one folder deeper.

    Raises TesseraError for a missing folder or file, a JSON that is not a panoptic one, and an empty data set. Entries
    that cannot be paired are rejected: an entry without image, an image with two entries or none. PNGs without an entry
    are no samples: they are unused.
    """
    masks = f"panoptic_{split}"
    parts = Parts((f"annotations/{masks}.json",), (f"annotations/{masks}", masks), (split, f"images/{split}"))
    return index_of(*find(Tree(root), parts, "COCO's layout"))


def index_of(annotation_file: File, masks: Folder, images: Folder) -> Index:
    """The index of a panoptic JSON and the folders that its file names lie in. Errors as `read_index`."""
    content = _read_json(annotation_file)
    labels = LabelTable.from_coco(content["categories"], str(annotation_file))
    images_by_id = _by_id(content["images"])
    records: list[Record] = []
    rejected: list[Rejected] = []
    for entry in content["annotations"]:
        try:
            records.append(_record(entry, images_by_id, masks, images))
        except BadSample as problem:
            named = masks.file(entry["file_name"], _PNG) if isinstance(entry.get("file_name"), str) else annotation_file
            rejected.append(Rejected(whole(entry.get("image_id")), str(named), str(problem)))
    records, repeated = without_repeats(records)
    rejected += repeated + list(_without_annotation(content["annotations"], images_by_id, images))
    if not records and content["annotations"]:
        text = f"{annotation_file}: no usable sample ({'; '.join(map(str, rejected[:5]))})"
        raise TooManyBad(text, tuple(rejected))
    if not records:
        raise TesseraError(f"{annotation_file}: the data set is empty, no image has an annotation")
    return Index(labels, tuple(records), tuple(rejected), tuple(_unused(content["annotations"], masks)))


class Parts(NamedTuple):
    """Where a layout has them: the first that is there of several names."""

    json: tuple[str, ...]
    pngs: tuple[str, ...]
    images: tuple[str, ...]


def find(tree: Tree, parts: Parts, layout: str) -> tuple[File, Folder, Folder]:
    """Annotation JSON, PNG folder and image folder. TesseraError naming what is not there."""
    annotation_file = tree.file(*parts.json)
    if annotation_file is None:
        raise tree.missing(*parts.json, expected=layout)
    return annotation_file, find_folder(tree, parts.pngs, layout), find_folder(tree, parts.images, layout)


def _read_json(file: File) -> dict[str, Any]:
    try:
        content = read_json(file)
    except OSError as error:
        raise TesseraError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (RecursionError, ValueError) as error:
        raise TesseraError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise TesseraError(f"{file}: holds a {type(content).__name__}; expected a COCO panoptic JSON")
    missing = {"images", "annotations", "categories"} - set(content)
    if missing:
        raise TesseraError(f"{file}: lacks {sorted(missing)}; expected a COCO panoptic JSON")
    for name in ("images", "annotations", "categories"):
        if not isinstance(content[name], list) or not all(isinstance(entry, dict) for entry in content[name]):
            raise TesseraError(f"{file}: its {name} are no list of objects; expected a COCO panoptic JSON")
    if content["annotations"] and "segments_info" not in content["annotations"][0]:
        raise TesseraError(f"{file}: annotations have no segments_info (is this the detection JSON?)")
    return content


def _by_id(images: Iterable[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    """The JSON's images by their id; those without one by None."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for image in images:
        found.setdefault(image_key(image.get("id")), []).append(image)
    return found


def _record(
    entry: dict[str, Any], images_by_id: dict[Any, list[dict[str, Any]]], masks: Folder, images: Folder
) -> CocoRecord:
    written, rows = entry.get("image_id"), entry.get("segments_info")
    image_id = known_id(written)
    listed = images_by_id.get(image_key(written), [])
    if len(listed) != 1:
        count = f"is listed {len(listed)} times" if listed else "is not"
        raise BadSample(f"image id {quoted(written)} {count} in the JSON's images, expected once")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadSample("segments_info is no list of objects")
    size = known_size(listed[0])
    image, mask = _name(listed[0], "the image's"), _name(entry, "the PNG's")
    return CocoRecord(image_id, images.file(image), size, masks.file(mask, _PNG), tuple(rows))


def _name(entry: dict[str, Any], whose: str) -> str:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name.isprintable() or not name.strip("./"):
        raise BadSample(f"{whose} file_name is {name!r}, expected a path")
    if leads_outside(name):
        raise BadSample(f"{whose} file name {name!r} leads outside the data set")
    return name


def _number(row: dict[str, Any], name: str) -> int:
    value = whole(row.get(name))
    if value is None:
        raise BadSample(f"segment {quoted(row.get('id'))} has no integer {name!r} but {quoted(row.get(name))}")
    return value


def _unused(annotations: Iterable[dict[str, Any]], masks: Folder) -> Iterator[Defect]:
    """PNGs that no annotation mentions, as a JSON for a part of the images leaves them."""
    named = {masks.file(str(entry.get("file_name")), _PNG) for entry in annotations}
    for name in sorted(masks.files):
        is_junk = name.rpartition("/")[2].startswith("._")  # what macOS leaves behind
        if name.endswith(".png") and not is_junk and masks.files[name] not in named:
            yield Defect("the PNG has no entry in the JSON", str(masks.files[name]), usable=True)


def _without_annotation(
    annotations: Iterable[dict[str, Any]], images_by_id: dict[Any, list[dict[str, Any]]], images: Folder
) -> Iterator[Rejected]:
    """Images that the JSON lists and no annotation mentions."""
    annotated = {image_key(entry.get("image_id")) for entry in annotations} - {None}
    if annotated >= images_by_id.keys():
        return
    # an entry of a broken id is rejected itself, its image is no second sample
    stems = {PurePosixPath(str(entry.get("file_name"))).stem for entry in annotations}
    for number, entries in images_by_id.items():
        for entry in entries:
            name = str(entry.get("file_name", number))
            if number not in annotated and PurePosixPath(name).stem not in stems:
                reason = "the image has no annotation in the JSON"
                yield Rejected(whole(number), f"{images.path}/{name}", reason)
