"""BDD100K's panoptic bitmasks, and what its own converter makes of them.

A bitmask is an RGBA PNG: red is the category, green has four bits (truncated 8, occluded 4, crowd 2, ignored 1), and
256 * blue + alpha is the instance (doc.bdd100k.com/format.html).
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from preprocessing.coco import Parts, find, index_of
from preprocessing.files import File
from preprocessing.labels import Category, LabelTable
from preprocessing.paired import RGBA, find_folder, make_index, pair, read_png, to_map, wrong_values
from preprocessing.panoptic_map import PanopticMap, Segment
from preprocessing.source import Defect, Index, Record, stable_id
from preprocessing.tree import Tree

_LAYOUT = "BDD100K's layout"
# bdd100k/label/label.py of bdd100k/bdd100k, ids 1 to 40; 0 is unlabeled, which is void
_STUFF = (
    ("dynamic", (111, 74, 0)),
    ("ego vehicle", (0, 0, 0)),
    ("ground", (81, 0, 81)),
    ("static", (0, 0, 0)),
    ("parking", (250, 170, 160)),
    ("rail track", (230, 150, 140)),
    ("road", (128, 64, 128)),
    ("sidewalk", (244, 35, 232)),
    ("bridge", (150, 100, 100)),
    ("building", (70, 70, 70)),
    ("fence", (190, 153, 153)),
    ("garage", (180, 100, 180)),
    ("guard rail", (180, 165, 180)),
    ("tunnel", (150, 120, 90)),
    ("wall", (102, 102, 156)),
    ("banner", (250, 170, 100)),
    ("billboard", (220, 220, 250)),
    ("lane divider", (255, 165, 0)),
    ("parking sign", (220, 20, 60)),
    ("pole", (153, 153, 153)),
    ("polegroup", (153, 153, 153)),
    ("street light", (220, 220, 100)),
    ("traffic cone", (255, 70, 0)),
    ("traffic device", (220, 220, 220)),
    ("traffic light", (250, 170, 30)),
    ("traffic sign", (220, 220, 0)),
    ("traffic sign frame", (250, 170, 250)),
    ("terrain", (152, 251, 152)),
    ("vegetation", (107, 142, 35)),
    ("sky", (70, 130, 180)),
)
_THINGS = (
    ("person", (220, 20, 60)),
    ("rider", (255, 0, 0)),
    ("bicycle", (119, 11, 32)),
    ("bus", (0, 60, 100)),
    ("car", (0, 0, 142)),
    ("caravan", (0, 0, 90)),
    ("motorcycle", (0, 0, 230)),
    ("trailer", (0, 0, 110)),
    ("train", (0, 80, 100)),
    ("truck", (0, 0, 70)),
)
CATEGORIES = LabelTable(
    tuple(
        Category(number, name, number > len(_STUFF), color)
        for number, (name, color) in enumerate((*_STUFF, *_THINGS), start=1)
    )
)
_CROWD_OR_IGNORED = 3
_CROWD, _INSTANCES = 64, 128
"""Key of the map = category + 64 if it is a crowd + 128 * instance."""


@dataclass(frozen=True)
class BitmaskRecord(Record):
    """An image and its bitmask."""

    mask: File

    @property
    def masks(self) -> tuple[File, ...]:
        """The bitmask."""
        return (self.mask,)

    def read_truth(self, labels: LabelTable, defects: list[Defect]) -> PanopticMap | None:
        """Things by category and instance, stuff by category, unlabeled is void, as to_coco_panseg of bdd100k has it.

        A thing that is a crowd or to be ignored is a crowd. A category above 40 is a defect.
        """
        rgba_HW4 = read_png(self, self.mask, RGBA, defects)
        if rgba_HW4 is None:
            return None
        category_HW, bits_HW, high_HW, low_HW = np.moveaxis(rgba_HW4, -1, 0)
        wrong_HW = category_HW > len(labels)
        problem = f"category {{}}, expected 0 to {len(labels)}"
        defects += wrong_values(self, category_HW, wrong_HW, problem.format, self.mask)
        keys_HW = high_HW.astype(np.int32)
        keys_HW *= 256
        keys_HW += low_HW
        keys_HW *= _INSTANCES
        keys_HW[bits_HW & _CROWD_OR_IGNORED > 0] += _CROWD
        keys_HW[category_HW <= len(_STUFF)] = 0  # stuff has neither instances nor crowds
        keys_HW += category_HW
        keys_HW[wrong_HW] = 0
        return to_map(self, keys_HW, lambda key: _segment(key, labels), defects)


def _segment(key: int, labels: LabelTable) -> Segment:
    category = labels.contiguous[key % _CROWD]
    is_thing = bool(labels.is_thing[category])
    return Segment(0, category, is_thing, bool(key & _CROWD))


def read_index(root: str | Path, split: str) -> Index:
    """Pair `root/labels/pan_seg/bitmasks/<split>/<stem>.png` with `root/images/10k/<split>/<stem>.jpg`.

    Both may lie in BDD100K's zips at the root, or one folder deeper, in `bdd100k`. `split` is train or val. The image
    id is `source.stable_id(<stem>)`. TesseraError for a missing folder and an empty data set; an image without bitmask
    and a bitmask without image are rejected.
    """
    tree = Tree(root)
    masks = find_folder(tree, [f"labels/pan_seg/bitmasks/{split}"], _LAYOUT)
    images = find_folder(tree, [f"images/10k/{split}"], _LAYOUT)
    pairs, rejected = pair([(images, ".jpg"), (masks, ".png")], _image_id)
    records = [BitmaskRecord(_image_id(stem), image, None, mask) for stem, (image, mask) in pairs.items()]
    return make_index(CATEGORIES, records, rejected, masks.path)


def read_coco_index(root: str | Path, split: str) -> Index:
    """Index what `bdd100k.label.to_coco_panseg` wrote where BDD100K's own models look for it.

    `jsons/pan_seg_<split>_cocofmt.json` (or `labels/jsons/...`), PNGs `jsons/pan_seg/masks/<split>`, images as
    `read_index`. Errors as `coco.read_index`.
    """
    jsons = ("jsons", "labels/jsons")
    parts = Parts(
        tuple(f"{folder}/pan_seg_{split}_cocofmt.json" for folder in jsons),
        (*(f"{folder}/pan_seg/masks/{split}" for folder in jsons), f"labels/pan_seg/masks/{split}"),
        (f"images/10k/{split}",),
    )
    return index_of(*find(Tree(root), parts, _LAYOUT))


def _image_id(stem: str) -> int:
    return stable_id(PurePosixPath(stem).name)
