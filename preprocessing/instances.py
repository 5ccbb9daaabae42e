"""Instance masks over a semantic map: how both are merged, and COCO's detection JSON with semantic PNGs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from infra.errors import TesseraError
from infra.text import quoted
from preprocessing import rle
from preprocessing.files import File, leads_outside
from preprocessing.geometry import Size
from preprocessing.json_file import read_json
from preprocessing.json_values import image_key, is_crowd, whole
from preprocessing.kernels import UNKNOWN, paint_runs
from preprocessing.labels import LabelTable
from preprocessing.paired import GRAY, find_folder, look_up, make_index, occurring, read_png, wrong_values
from preprocessing.panoptic_map import PanopticMap, Segment, measured
from preprocessing.source import BadSample, Defect, Index, Record, Rejected, known_id, known_size
from preprocessing.tree import Folder, Tree

_LAYOUT = "a detection JSON with semantic PNGs"
_VOID = 255
"""Void in semantic PNGs, unless a category has this id; so is 0, always."""
_VALUES = 1 << 16
"""Of 16-bit gray."""
_MOST_PIXELS = 1 << 33
"""Of all masks of an image together: overlapping ones are painted over one another, which takes its time."""


class Instance(NamedTuple):
    """One mask."""

    category: int
    """The data set's own id, of a thing."""
    mask_HW: NDArray[np.bool_]
    is_crowd: bool = False


class Outlined(NamedTuple):
    """The same, its mask as run lengths: many of them do not fill the memory."""

    category: int
    runs: rle.Runs
    is_crowd: bool


def from_instances_and_semantics(
    semantic_HW: NDArray[np.integer[Any]], instances: Sequence[tuple[int, NDArray[np.bool_], bool]], labels: LabelTable
) -> PanopticMap:
    """Make a panoptic map of overlapping instance masks and a semantic map.

    semantic_HW: integers (H, W), the data set's own category ids, 0 = void, 255 = void if no category has that
    id. instances: (category, mask_HW, is_crowd) each, category being the data set's own id of a thing and
    mask_HW bool (H, W). No array is changed.

    Instances lie over semantics. Among instances, crowds lie below all others; of two crowds, and of two others,
    the one with the larger mask lies below; of equally large ones the later one lies on top. Semantic pixels of
    a thing that no instance covers are void. What is left without a pixel has no segment. Ids are 1..N: instances
    in the order given, then stuff in the order of `labels`; areas, boxes and centroids are counted.

    Raises TesseraError for an array of another shape or dtype, a category that `labels` lacks, and an
    instance of stuff.
    """
    if semantic_HW.ndim != 2 or not np.issubdtype(semantic_HW.dtype, np.integer):
        raise TesseraError(f"semantics: expected integers (H, W), got {semantic_HW.dtype} {semantic_HW.shape}")
    checked = [_checked(Instance(*instance), semantic_HW, number, labels) for number, instance in enumerate(instances)]
    ids = [int(i) for i in np.unique(semantic_HW)]
    unknown = [i for i in ids if i not in labels.contiguous and i not in (0, _VOID)]
    if unknown:
        raise TesseraError(f"semantics: categories {unknown[:5]} are not in the table")
    label_N = np.array([labels.contiguous.get(i, -1) + 1 if i else 0 for i in ids], np.int32)
    try:
        return _without_empty(*_painted(label_N[np.searchsorted(ids, semantic_HW)], checked, labels))
    except BadSample as problem:
        raise TesseraError(str(problem)) from problem


def _checked(instance: Instance, semantic_HW: NDArray[np.integer[Any]], number: int, labels: LabelTable) -> Outlined:
    mask_HW = instance.mask_HW
    if mask_HW.shape != semantic_HW.shape or mask_HW.dtype != np.bool_:
        expected = f"bool {semantic_HW.shape} as the semantics have it"
        raise TesseraError(f"instance {number}: expected {expected}, got {mask_HW.dtype} {mask_HW.shape}")
    try:
        _thing(instance.category, labels)
    except BadSample as problem:
        raise TesseraError(f"instance {number}: {problem}") from problem
    return Outlined(instance.category, rle.encode(mask_HW), bool(instance.is_crowd))


def _thing(category: Any, labels: LabelTable) -> int:
    """Contiguous id of a thing's dataset id. Raises BadSample if it is none."""
    number = whole(category.item() if isinstance(category, np.integer) else category)
    contiguous = None if number is None else labels.contiguous.get(number)
    if contiguous is None:
        raise BadSample(f"the category {quoted(category)} is unknown")
    if not labels.is_thing[contiguous]:
        raise BadSample(f"the category {category} ({labels.names[contiguous]}) is stuff, expected a thing")
    return contiguous


def _painted(
    semantic_HW: NDArray[np.int32], instances: Sequence[Outlined], labels: LabelTable
) -> tuple[NDArray[np.uint16], list[Segment]]:
    """Labels and measured segments, instances first; those that are covered have the area 0.

    semantic_HW: contiguous id + 1, 0 = void. Raises BadSample for more instances than labels.
    """
    stuff = [int(c) - 1 for c in occurring(semantic_HW) if c and not labels.is_thing[c - 1]]
    if len(instances) + len(stuff) >= UNKNOWN:
        raise BadSample(f"{len(instances)} instances in one image; at most {UNKNOWN - 1 - len(stuff)} fit")
    label_N = np.zeros(len(labels) + 1, np.uint16)
    label_N[np.array(stuff, int) + 1] = len(instances) + 1 + np.arange(len(stuff))
    labels_HW = look_up(label_N, semantic_HW)
    areas = [rle.area(instance.runs) for instance in instances]
    if sum(areas) > _MOST_PIXELS:
        raise BadSample(f"{len(areas)} masks cover {sum(areas)} pixels of one image, at most {_MOST_PIXELS} are read")
    for i in sorted(range(len(instances)), key=lambda i: (not instances[i].is_crowd, -areas[i], i)):
        paint_runs(labels_HW, instances[i].runs, i + 1)
    segments = [Segment(0, labels.contiguous[i.category], True, i.is_crowd) for i in instances]
    segments += [Segment(0, category, False) for category in stuff]
    return labels_HW, measured(labels_HW, segments)


def _without_empty(labels_HW: NDArray[np.uint16], segments: Sequence[Segment]) -> PanopticMap:
    kept = [segment for segment in segments if segment.area]
    renumber_N = np.zeros(len(segments) + 1, np.int32)
    renumber_N[[segment.id for segment in kept]] = np.arange(1, len(kept) + 1)
    return PanopticMap(look_up(renumber_N, labels_HW), tuple(replace(s, id=i) for i, s in enumerate(kept, start=1)))


@dataclass(frozen=True)
class InstancesRecord(Record):
    """An image with its semantic PNG and its own rows of the detection JSON."""

    semantic: File
    annotations: str
    """The rows, as JSON: a fraction of what their objects would take."""

    @property
    def masks(self) -> tuple[File, ...]:
        """The semantic PNG."""
        return (self.semantic,)

    def facts(self) -> Any:
        """The rows."""
        return self.annotations

    def read_truth(self, labels: LabelTable, defects: list[Defect]) -> PanopticMap | None:
        """Both merged as `from_instances_and_semantics` says; what is left without a pixel is a usable defect."""
        semantic_HW = self._semantics(labels, defects)
        if semantic_HW is None:
            return None
        try:
            rows, instances = self._instances((semantic_HW.shape[0], semantic_HW.shape[1]), labels, defects)
            labels_HW, segments = _painted(semantic_HW, instances, labels)
        except BadSample as problem:
            defects.append(self.defect(str(problem)))
            return None
        names = [f"annotation {quoted(row.get('id'))}" for row in rows]
        names += [f"stuff {labels.names[segment.category]!r}" for segment in segments[len(rows) :]]
        for name, segment in zip(names, segments, strict=True):
            if segment.area == 0:
                defects.append(self.defect(f"{name} has no pixel, or none that others leave it", usable=True))
        if not any(segment.area for segment in segments):
            defects.append(self.defect("every pixel is void", usable=True))
        return _without_empty(labels_HW, segments)

    def _semantics(self, labels: LabelTable, defects: list[Defect]) -> NDArray[np.int32] | None:
        """Contiguous id + 1 of each pixel, 0 for void and for categories that there are not."""
        ids_HW = read_png(self, self.semantic, GRAY, defects)
        if ids_HW is None:
            return None
        height, width = ids_HW.shape
        if (height, width) != self.size and self.size:
            says = f"the JSON says {self.size[1]}x{self.size[0]}"
            defects.append(self.defect(f"the semantic PNG is {width}x{height}, {says}"))
            return None
        label_N = np.zeros(_VALUES, np.int32)
        for dataset_id, contiguous in labels.contiguous.items():
            if 0 < dataset_id < _VALUES:
                label_N[dataset_id] = contiguous + 1
        semantic_HW = look_up(label_N, ids_HW)
        unknown_HW = (semantic_HW == 0) & (ids_HW != 0) & (ids_HW != _VOID)
        defects += wrong_values(self, ids_HW, unknown_HW, "the category {} is unknown".format, self.semantic)
        return semantic_HW

    def _instances(
        self, size: Size, labels: LabelTable, defects: list[Defect]
    ) -> tuple[list[dict[str, Any]], list[Outlined]]:
        """Rows and masks of the annotations that can be understood."""
        rows, instances = [], []
        for row in json.loads(self.annotations):
            try:
                instances.append(_instance(row, size, labels))
            except (BadSample, ValueError) as problem:
                told = f"annotation {quoted(row.get('id'))}: {problem}"
                defects.append(self.defect(told, segment=whole(row.get("id"))))
                continue
            rows.append(row)
        return rows, instances


def _instance(row: dict[str, Any], size: Size, labels: LabelTable) -> Outlined:
    category, crowd = _thing(row.get("category_id"), labels), is_crowd(row)
    if crowd is None:
        raise BadSample(f"iscrowd is {quoted(row['iscrowd'])}, expected 0 or 1")
    return Outlined(labels.categories[category].dataset_id, rle.runs_of(row.get("segmentation"), size), crowd)


def read_index(root: str | Path, split: str) -> Index:
    """Read `root/annotations/instances_<split>.json`, semantic PNGs and images, from folders or zips at the root.

    `annotations/semantic_<split>/<stem>.png`: 8-bit or 16-bit gray, a pixel is a category id of the JSON; 0 is
    void, and so is 255 if no category has that id. `<split>/`: the images, as the JSON names them.

    Which categories are things must be told, since a guess from the instances of one split may differ from
    another's: `annotations/categories.json`, a list of categories as COCO's panoptic JSONs have it (or an object
    with such a list as `categories`), or else `isthing` in every category of the JSON. Raises TesseraError if
    neither is there, if both disagree, for a category 0, a missing folder or file, a JSON that is not a detection
    one, and an empty data set. Entries that cannot be paired are rejected.
    """
    tree = Tree(root)
    name = f"annotations/instances_{split}.json"
    file = tree.file(name)
    if file is None:
        raise tree.missing(name, expected=_LAYOUT)
    semantics = find_folder(tree, [f"annotations/semantic_{split}"], _LAYOUT)
    images = find_folder(tree, [split], _LAYOUT)
    content = _read_json(file)
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in _PARTS):
        raise TesseraError(f"{file}: expected a COCO detection JSON with the lists {', '.join(_PARTS)}")
    labels = _labels(tree.file("annotations/categories.json"), content["categories"], file)
    rows, rejected = _rows_by_image(content, file)
    records: list[Record] = []
    for entry in content["images"]:
        try:
            records.append(_record(entry, rows, semantics, images))
        except BadSample as problem:
            rejected.append(Rejected(None, str(file), str(problem)))
    named = {record.masks[0] for record in records}
    strays = [semantics.files[name] for name in sorted(semantics.files) if name.endswith(".png")]
    rejected += [
        Rejected(None, str(stray), "the PNG has no image in the JSON") for stray in strays if stray not in named
    ]
    return make_index(labels, records, rejected, str(file))


_PARTS = ("images", "annotations", "categories")


def _read_json(file: File) -> Any:
    try:
        return read_json(file)
    except (OSError, RecursionError, ValueError) as error:
        raise TesseraError(f"{file}: not valid JSON ({error})") from error


def _labels(table: File | None, own: list[Any], file: File) -> LabelTable:
    read = _read_json(table) if table else own
    told = _entries(read.get("categories") if isinstance(read, dict) else read, table or file)
    if table is None and any("isthing" not in category for category in _entries(own, file)):
        expected = f"annotations/categories.json with the categories as COCO's panoptic JSONs have them, beside {file}"
        raise TesseraError(f"{file}: its categories do not say which are things (isthing); expected {expected}")
    labels = LabelTable.from_coco(told, str(table or file))
    if 0 in labels.contiguous:
        raise TesseraError(
            f"{table or file}: a category has the id 0, which is void in semantic PNGs; expected 1 and more"
        )
    entry_by_id = {category["id"]: category for category in labels.to_coco()}
    for category in _entries(own, file):
        known = entry_by_id.get(whole(category.get("id")))
        if known is None or any(category.get(key, known[key]) != known[key] for key in ("name", "isthing")):
            raise TesseraError(f"{file}: the category {category} is not the {known} of {table or file}")
    return labels


def _entries(categories: Any, file: File) -> list[dict[str, Any]]:
    if not isinstance(categories, list) or not all(
        isinstance(c, dict) and whole(c.get("id")) is not None for c in categories
    ):
        raise TesseraError(f"{file}: expected categories as a list of objects with integer ids")
    return categories


def _rows_by_image(content: dict[str, Any], file: File) -> tuple[dict[int | str, list[dict[str, Any]]], list[Rejected]]:
    """Annotations by image id, and those that have no image."""
    keys = [image_key(image.get("id")) for image in content["images"] if isinstance(image, dict)]
    rows: dict[int | str, list[dict[str, Any]]] = {key: [] for key in keys if key is not None}
    rejected = []
    for number, row in enumerate(content["annotations"]):
        owner = image_key(row.get("image_id")) if isinstance(row, dict) else None
        if owner in rows:
            rows[owner].append(row)
        else:
            named = quoted(row.get("id")) if isinstance(row, dict) else number
            written = quoted(row.get("image_id")) if isinstance(row, dict) else quoted(row)
            reason = f"annotation {named} has the image {written}, which is not in the JSON's images"
            rejected.append(Rejected(None, str(file), reason))
    return rows, rejected


def _record(
    entry: Any, rows: Mapping[int | str, list[dict[str, Any]]], semantics: Folder, images: Folder
) -> InstancesRecord:
    if not isinstance(entry, dict):
        raise BadSample(f"an image is {quoted(entry)}, expected an object")
    key, name = image_key(entry.get("id")), entry.get("file_name")
    image_id = known_id(entry.get("id"))
    assert key is not None
    size = known_size(entry)
    if not isinstance(name, str) or not name.isprintable():
        raise BadSample(f"image {quoted(key)} has the file_name {quoted(name)}, expected a path")
    path = PurePosixPath(name)
    if leads_outside(name) or not path.name:
        raise BadSample(f"image {quoted(key)}: the file name {quoted(name)} leads outside the data set")
    mask = semantics.file(path.with_suffix(".png").as_posix())
    return InstancesRecord(image_id, images.file(name), size, mask, json.dumps(rows[key]))
