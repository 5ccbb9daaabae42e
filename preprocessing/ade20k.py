"""ADE20K: the scene parsing challenge's 150 classes, from the challenge's own files or from the full data set.

`tables/ade20k.json` has the facts of each class: name, thing or stuff and colour of the panoptic benchmark
(Mask2Former, register_ade20k_panoptic.py), synonyms (CSAILVision/sceneparsing, objectInfo150.txt), and the
indices that the full data set has for it (mapFromADE.txt there).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preprocessing.files import File
from preprocessing.json_values import whole
from preprocessing.labels import LabelTable
from preprocessing.paired import (
    GRAY8,
    RGB,
    find_folder,
    look_up,
    make_index,
    occurring,
    pair,
    read_png,
    to_map,
    wrong_values,
)
from preprocessing.panoptic_map import PanopticMap, Segment
from preprocessing.source import Defect, Index, Record, read_file, stable_id
from preprocessing.tree import Folder, Tree

_CHALLENGE = ("", "ADEChallengeData2016/")
_FULL = ("", "ADE20K_2016_07_26/", "ADE20K_2021_17_01/")
_SEG = "_seg.png"
_INSTANCES = 256
"""Key of the map = 256 * class + instance: both fit 8 bits, and 0 is void."""
_RED, _GREEN = 10, 256
"""The full data set's class index is red // 10 * 256 + green."""


@cache
def facts() -> tuple[dict[str, Any], ...]:
    """The rows of the table, class 1 first."""
    return tuple(json.loads((resources.files("preprocessing") / "tables/ade20k.json").read_text()))


@cache
def categories() -> LabelTable:
    """The 150 classes; dataset ids 1 to 150, as the challenge's semantic PNGs have them."""
    return LabelTable.from_coco(facts(), "ADE20K's table")


@dataclass(frozen=True)
class ChallengeRecord(Record):
    """An image of ADEChallengeData2016 with its two PNGs."""

    semantic: File
    instance: File

    @property
    def masks(self) -> tuple[File, ...]:
        """The semantic and the instance PNG."""
        return self.semantic, self.instance

    def read_truth(self, labels: LabelTable, defects: list[Defect]) -> PanopticMap | None:
        """The panoptic benchmark's rule: stuff from the semantic PNG, instances from the other one above it.

        Void are pixels of class 0, and those of a thing in the semantic PNG that no instance covers. Segments:
        stuff by class, then things by class and instance.
        """
        semantic_HW = read_png(self, self.semantic, GRAY8, defects)
        rgb_HW3 = read_png(self, self.instance, RGB, defects)
        if semantic_HW is None or rgb_HW3 is None:
            return None
        if semantic_HW.shape != rgb_HW3.shape[:2]:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (rgb_HW3.shape, semantic_HW.shape)]
            defects.append(self.defect(f"the instance PNG is {sizes[0]}, the semantic {sizes[1]}", self.instance))
            return None
        thing_HW, number_HW = rgb_HW3[..., 0], rgb_HW3[..., 1]
        defects += self._strange(semantic_HW, thing_HW, number_HW)
        things = [row["id"] for row in facts() if row["isthing"]]
        class_of_thing_N = np.zeros(256, np.uint8)
        class_of_thing_N[1 : len(things) + 1] = things
        return _merged(self, semantic_HW, look_up(class_of_thing_N, thing_HW), number_HW, labels, defects)

    def _strange(
        self, semantic_HW: NDArray[np.uint8], thing_HW: NDArray[np.uint8], number_HW: NDArray[np.uint8]
    ) -> Iterator[Defect]:
        classes, things = len(facts()), sum(row["isthing"] for row in facts())
        problem = f"class {{}}, expected 0 to {classes}"
        yield from wrong_values(self, semantic_HW, semantic_HW > classes, problem.format, self.semantic)
        wrong_HW = (number_HW > 0) & ((thing_HW == 0) | (thing_HW > things))
        problem = f"instance class {{}}, expected 1 to {things}"
        yield from wrong_values(self, thing_HW, wrong_HW, problem.format, self.instance)
        wrong_HW = (number_HW == 0) & (thing_HW > 0)
        problem = "instance class {} without an instance number, taken for no instance"
        yield from wrong_values(self, thing_HW, wrong_HW, problem.format, self.instance, usable=True)
        numbers_N, classes_N = np.divmod(occurring(_paired(number_HW, thing_HW)), _INSTANCES)
        for number in np.unique(numbers_N[numbers_N > 0]):
            found = classes_N[numbers_N == number].tolist()
            if len(found) > 1:
                problem = f"instance {number} has the classes {found}, expected one"
                yield self.defect(problem, self.instance, int(number))


@dataclass(frozen=True)
class FullRecord(Record):
    """An image of the full data set with its PNG, and the text that names what is in it."""

    mask: File
    text: File | None
    """`<stem>.json` (2021) or `<stem>_atr.txt` (2016)."""

    @property
    def masks(self) -> tuple[File, ...]:
        """The PNG, and the text if there is one."""
        return (self.mask, self.text) if self.text else (self.mask,)

    def read_truth(self, labels: LabelTable, defects: list[Defect]) -> PanopticMap | None:
        """Class index = red // 10 * 256 + green, instance = blue; the challenge says which indices are its 150.

        All other classes are void, and so are pixels of a thing that have no instance. The names in the text
        are a check: an index that has another class' name is a defect (another edition's numbers), an index
        that the text lacks is a usable one.
        """
        rgb_HW3 = read_png(self, self.mask, RGB, defects)
        if rgb_HW3 is None:
            return None
        red_HW = rgb_HW3[..., 0]
        problem = "red is {}, expected a multiple of 10"
        defects += wrong_values(self, red_HW, red_HW % _RED != 0, problem.format, self.mask)
        class_by_index_N = _class_by_index()
        index_HW = _paired(red_HW // _RED, rgb_HW3[..., 1])
        class_HW = look_up(class_by_index_N, index_HW)
        indices = [int(i) for i in occurring(index_HW) if class_by_index_N[i]]
        defects += self._check_names(indices, class_by_index_N, defects)
        thing_of_class_N = np.append(np.uint8(0), np.where(labels.is_thing, np.arange(1, len(labels) + 1), 0))
        thing_HW = look_up(thing_of_class_N.astype(np.uint8), class_HW)
        return _merged(self, class_HW, thing_HW, rgb_HW3[..., 2], labels, defects)

    def _check_names(
        self, indices: list[int], class_by_index_N: NDArray[np.uint8], defects: list[Defect]
    ) -> Iterator[Defect]:
        """What the text says otherwise than the table; `indices`: those of the 150 that the PNG has."""
        data = read_file(self, self.text, defects) if self.text else None
        if data is None or self.text is None:
            return
        try:
            objects = _objects(self.text, data)
        except ValueError as error:
            yield self.defect(f"the objects' names cannot be read ({error})", self.text, usable=True)
            return
        for index, name in sorted({(i, n) for i, n in objects if i}):
            if class_by_index_N[index : index + 1].any() and not _is_named(class_by_index_N[index], name):
                expected = facts()[class_by_index_N[index] - 1]["name"]
                yield self.defect(f"class index {index} is called {name!r}, expected {expected!r}", self.text)
        for index in indices:
            if not any(_is_named(class_by_index_N[index], name) for _, name in objects):
                name = facts()[class_by_index_N[index] - 1]["name"]
                problem = f"it does not list {name!r}, class index {index} of the PNG"
                yield self.defect(problem, self.text, usable=True)


def read_index(root: str | Path, split: str) -> Index:
    """Index ADEChallengeData2016: `images/<split>`, `annotations/<split>`, `annotations_instance/<split>`.

    `root` is that folder or the one around it, where `ADEChallengeData2016.zip` may lie as published; the
    instance PNGs are published apart, as a tar, which must be unpacked. `split` is training or validation. The
    image id is `source.stable_id(<stem>)`. TesseraError for a missing folder and an empty data set; an image
    or a PNG without its mates is rejected.
    """
    tree, parts = Tree(root), ("images", "annotations", "annotations_instance")
    folders = [
        find_folder(tree, [f"{prefix}{part}/{split}" for prefix in _CHALLENGE], "ADEChallengeData2016's layout")
        for part in parts
    ]
    pairs, rejected = pair([*zip(folders, (".jpg", ".png", ".png"), strict=True)], _image_id)
    records = [ChallengeRecord(_image_id(stem), image, None, *masks) for stem, (image, *masks) in pairs.items()]
    return make_index(categories(), records, rejected, folders[0].path)


def read_full_index(root: str | Path, split: str) -> Index:
    """Index the full data set: `<stem>_seg.png` beside `<stem>.jpg`, anywhere below `images/<split>`.

    That is `images/<split>` in the edition of 2016, `images/ADE/<split>` in that of 2021; `root` is the
    edition's folder or the one around it, where its zip may lie. `split` is training or validation.
    `_parts_N.png` and the folders of amodal masks are not read. Image ids and errors as `read_index`.
    """
    names = [f"{prefix}{images}{split}" for prefix in _FULL for images in ("images/", "images/ADE/")]
    folder = find_folder(Tree(root), names, "the full ADE20K's layout")
    pairs, rejected = pair([(folder, ".jpg"), (folder, _SEG)], _image_id)
    records = [_full_record(stem, image, mask, folder) for stem, (image, mask) in pairs.items()]
    return make_index(categories(), records, rejected, folder.path)


def _full_record(stem: str, image: File, mask: File, folder: Folder) -> FullRecord:
    text = folder.files.get(f"{stem}.json") or folder.files.get(f"{stem}_atr.txt")
    return FullRecord(_image_id(stem), image, None, mask, text)


def _image_id(stem: str) -> int:
    return stable_id(PurePosixPath(stem).name)


def _merged(
    record: Record,
    class_HW: NDArray[np.uint8],
    thing_HW: NDArray[np.uint8],
    number_HW: NDArray[np.uint8],
    labels: LabelTable,
    defects: list[Defect],
) -> PanopticMap:
    """Stuff of class_HW below the things of thing_HW; both hold dataset ids, uint8 (H, W). An instance 0 is none."""
    stuff_N = np.zeros(256, np.int32)
    stuff = [c.dataset_id for c in labels.categories if not c.is_thing]
    stuff_N[stuff] = stuff
    keys_HW = look_up(stuff_N, class_HW)
    covered_HW = (thing_HW > 0) & (number_HW > 0)
    keys_HW[covered_HW] = _paired(thing_HW, number_HW)[covered_HW]

    def segment(key: int) -> Segment:
        category = labels.contiguous[key // _INSTANCES or key]
        return Segment(0, category, bool(labels.is_thing[category]))

    return to_map(record, keys_HW, segment, defects)


def _paired(high_HW: NDArray[np.uint8], low_HW: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """256 * high + low."""
    return (high_HW.astype(np.uint16) << 8 | low_HW).astype(np.uint16, copy=False)


@cache
def _class_by_index() -> NDArray[np.uint8]:
    """Class 1 to 150 of each index of the full data set, 0 for those that are none; uint8, all that RG can hold."""
    class_by_index_N = np.zeros((255 // _RED + 1) * _GREEN, np.uint8)
    for row in facts():
        class_by_index_N[row["full"]] = row["id"]
    return class_by_index_N


def _is_named(number: int, name: str) -> bool:
    """Whether one of the synonyms in `name` is one of the class'. The two editions list them in different orders."""
    synonyms = {part.strip().lower() for part in name.split(",")}
    return not synonyms.isdisjoint(facts()[number - 1]["synonyms"])


def _objects(text: File, data: bytes) -> list[tuple[int, str]]:
    """Class index (0 where the text has none) and name of each object. ValueError if it cannot be understood.

    2021: JSON, annotation.object[].name_ndx and .name. 2016: lines of instance # part level # occluded # class
    name # raw name # attributes.
    """
    content = data.decode("utf-8", "replace")  # some descriptions in there are no UTF-8; class names are ASCII
    if text.name.endswith(".json"):
        try:
            found = [(whole(row["name_ndx"]), row["name"]) for row in json.loads(content)["annotation"]["object"]]
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"expected annotation.object[] with name_ndx and name: {error!r}") from error
        objects = [(index, name) for index, name in found if index is not None and isinstance(name, str)]
        if len(objects) < len(found):
            raise ValueError("expected an integer name_ndx and a text as name in each annotation.object[]")
        return objects
    rows = [[column.strip() for column in line.split("#")] for line in content.splitlines() if line.strip()]
    short = next((number for number, row in enumerate(rows, start=1) if len(row) < 4), None)
    if short:
        raise ValueError(f"line {short} has no class name in column 4")
    return [(0, row[3]) for row in rows]
