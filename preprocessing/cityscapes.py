"""Cityscapes as it is published: `leftImg8bit` and `gtFine`, unpacked or in their zips."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preprocessing.coco import Parts, find, index_of
from preprocessing.files import File
from preprocessing.labels import Category, LabelTable
from preprocessing.paired import GRAY, find_folder, look_up, make_index, pair, read_png, to_map, wrong_values
from preprocessing.panoptic_map import PanopticMap, Segment
from preprocessing.source import Defect, Index, Record, stable_id
from preprocessing.tree import Tree


class Label(NamedTuple):
    """One row of the data set's own table."""

    id: int
    name: str
    is_evaluated: bool
    has_instances: bool
    color: tuple[int, int, int]


# cityscapesscripts/helpers/labels.py of mcordts/cityscapesScripts; its license plate has the id -1, see LICENSE_PLATE
LABELS = (
    Label(0, "unlabeled", False, False, (0, 0, 0)),
    Label(1, "ego vehicle", False, False, (0, 0, 0)),
    Label(2, "rectification border", False, False, (0, 0, 0)),
    Label(3, "out of roi", False, False, (0, 0, 0)),
    Label(4, "static", False, False, (0, 0, 0)),
    Label(5, "dynamic", False, False, (111, 74, 0)),
    Label(6, "ground", False, False, (81, 0, 81)),
    Label(7, "road", True, False, (128, 64, 128)),
    Label(8, "sidewalk", True, False, (244, 35, 232)),
    Label(9, "parking", False, False, (250, 170, 160)),
    Label(10, "rail track", False, False, (230, 150, 140)),
    Label(11, "building", True, False, (70, 70, 70)),
    Label(12, "wall", True, False, (102, 102, 156)),
    Label(13, "fence", True, False, (190, 153, 153)),
    Label(14, "guard rail", False, False, (180, 165, 180)),
    Label(15, "bridge", False, False, (150, 100, 100)),
    Label(16, "tunnel", False, False, (150, 120, 90)),
    Label(17, "pole", True, False, (153, 153, 153)),
    Label(18, "polegroup", False, False, (153, 153, 153)),
    Label(19, "traffic light", True, False, (250, 170, 30)),
    Label(20, "traffic sign", True, False, (220, 220, 0)),
    Label(21, "vegetation", True, False, (107, 142, 35)),
    Label(22, "terrain", True, False, (152, 251, 152)),
    Label(23, "sky", True, False, (70, 130, 180)),
    Label(24, "person", True, True, (220, 20, 60)),
    Label(25, "rider", True, True, (255, 0, 0)),
    Label(26, "car", True, True, (0, 0, 142)),
    Label(27, "truck", True, True, (0, 0, 70)),
    Label(28, "bus", True, True, (0, 60, 100)),
    Label(29, "caravan", False, True, (0, 0, 90)),
    Label(30, "trailer", False, True, (0, 0, 110)),
    Label(31, "train", True, True, (0, 80, 100)),
    Label(32, "motorcycle", True, True, (0, 0, 230)),
    Label(33, "bicycle", True, True, (119, 11, 32)),
)
LICENSE_PLATE = 0xFFFF
"""What -1 becomes in 16 bits."""

CATEGORIES = LabelTable(
    tuple(Category(label.id, label.name, label.has_instances, label.color) for label in LABELS if label.is_evaluated)
)
_LAYOUT = "Cityscapes' layout"
_LABEL_BY_ID = {label.id: label for label in LABELS}
_MASK, _IMAGE = "_gtFine_instanceIds.png", "_leftImg8bit.png"
_INSTANCES = 1000
"""From here on an id is label * 1000 + instance."""


@dataclass(frozen=True)
class CityscapesRecord(Record):
    """An image and its PNG of instance ids."""

    mask: File

    @property
    def masks(self) -> tuple[File, ...]:
        """The PNG of instance ids."""
        return (self.mask,)

    def read_truth(self, labels: LabelTable, defects: list[Defect]) -> PanopticMap | None:
        """Things by instance, stuff by label, the rest void; segments in ascending order of their ids in the PNG.

        An id below 1000 of a thing stands for a group that nobody took apart: a crowd. An instance of stuff
        belongs to its stuff, and is a usable defect; an id of no label is a defect.
        """
        ids_HW = read_png(self, self.mask, GRAY, defects)
        if ids_HW is None:
            return None
        of_id = _facts_by_id()
        wrong_HW = look_up(of_id.is_unknown_N, ids_HW)
        problem = "id {} belongs to none of Cityscapes' labels"
        defects += wrong_values(self, ids_HW, wrong_HW, problem.format, self.mask)
        wrong_HW = look_up(of_id.numbers_stuff_N, ids_HW)
        problem = "id {} numbers an instance of stuff"
        defects += wrong_values(self, ids_HW, wrong_HW, problem.format, self.mask, usable=True)
        return to_map(self, look_up(of_id.key_N, ids_HW), lambda key: _segment(key, labels), defects)


def read_index(root: str | Path, split: str) -> Index:
    """Pair `root/gtFine/<split>/<city>/<stem>_gtFine_instanceIds.png` with its image below `root/leftImg8bit/<split>`.

    Both folders may lie in zips at the root, as Cityscapes publishes them. The image id is
    `source.stable_id(<stem>)`. Raises TesseraError for a missing folder and an empty data set; a PNG without
    image and an image without PNG are rejected.
    """
    tree = Tree(root)
    masks = find_folder(tree, [f"gtFine/{split}"], _LAYOUT)
    images = find_folder(tree, [f"leftImg8bit/{split}"], _LAYOUT)
    pairs, rejected = pair([(masks, _MASK), (images, _IMAGE)], _image_id)
    records = [CityscapesRecord(_image_id(stem), image, None, mask) for stem, (mask, image) in pairs.items()]
    return make_index(CATEGORIES, records, rejected, masks.path)


def read_panoptic_index(root: str | Path, split: str) -> Index:
    """Index what Cityscapes' `createPanopticImgs.py` writes: a COCO panoptic JSON and PNGs of it.

    `root/gtFine/cityscapes_panoptic_<split>.json` (or `..._trainId.json`), PNGs in the folder of that name, images
    below `root/leftImg8bit/<split>`, in their cities' folders. The JSON names those `<stem>_gtFine_leftImg8bit.png`, of
    which there are none, and no city. The image ids are those of `read_index`. Errors as `coco.read_index`.
    """
    stems = tuple(f"gtFine/cityscapes_panoptic_{split}{kind}" for kind in ("", "_trainId"))
    parts = Parts(tuple(f"{stem}.json" for stem in stems), stems, (f"leftImg8bit/{split}",))
    annotation_file, masks, images = find(Tree(root), parts, _LAYOUT)
    as_written = {PurePosixPath(name).name.replace(_IMAGE, f"_gtFine{_IMAGE}"): f for name, f in images.files.items()}
    return index_of(annotation_file, masks, replace(images, files=images.files | as_written))


def _image_id(stem: str) -> int:
    return stable_id(Path(stem).name)


class _Facts(NamedTuple):
    """Of each id that 16 bits hold, (65536,)."""

    key_N: NDArray[np.int32]
    """The id itself for things, the label for stuff, 0 for void."""
    is_unknown_N: NDArray[np.bool_]
    numbers_stuff_N: NDArray[np.bool_]


@cache
def _facts_by_id() -> _Facts:
    ids_N = np.arange(LICENSE_PLATE + 1)
    label_N = np.where(ids_N >= _INSTANCES, ids_N // _INSTANCES, ids_N)
    label_N[LICENSE_PLATE] = 0
    is_unknown_N = label_N >= len(LABELS)
    known_N = np.where(is_unknown_N, 0, label_N)
    is_kept_N = np.array([label.is_evaluated for label in LABELS])[known_N]
    is_thing_N = np.array([label.has_instances for label in LABELS])[known_N]
    key_N = np.where(is_kept_N, np.where(is_thing_N, ids_N, label_N), 0).astype(np.int32)
    return _Facts(key_N, is_unknown_N, is_kept_N & ~is_thing_N & (ids_N >= _INSTANCES))


def _segment(key: int, labels: LabelTable) -> Segment:
    label = _LABEL_BY_ID[key // _INSTANCES or key]
    is_crowd = label.has_instances and key < _INSTANCES
    return Segment(0, labels.contiguous[label.id], label.has_instances, is_crowd)
