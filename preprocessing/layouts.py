"""Kinds of annotations that can be read. A data set is where it is and its kind; nothing is registered."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from infra.errors import TesseraError
from infra.store import open_store
from preprocessing import ade20k, bdd100k, cityscapes, coco, instances, mapillary
from preprocessing.json_file import without_collector
from preprocessing.source import Index, Origin

LAYOUTS: dict[str, Callable[[str | Path, str], Index]] = {
    "coco": coco.read_index,
    "cityscapes": cityscapes.read_index,
    "cityscapes-panoptic": cityscapes.read_panoptic_index,
    "ade20k": ade20k.read_index,
    "ade20k-full": ade20k.read_full_index,
    "mapillary-v1.2": mapillary.read_v1_index,
    "mapillary-v2.0": mapillary.read_v2_index,
    "bdd100k": bdd100k.read_index,
    "bdd100k-coco": bdd100k.read_coco_index,
    "instances": instances.read_index,
}
"""Name -> how a split of a folder (or of a URL of a store) is indexed; the docstrings say what it expects to find."""


def known(layout: str) -> str:
    """The layout's name; TesseraError listing all if there is none of that name."""
    if layout not in LAYOUTS:
        raise TesseraError(f"layout {layout!r}: there is none, there are {', '.join(LAYOUTS)}")
    return layout


def read_index(root: str | Path, split: str, layout: str = "coco") -> Index:
    """Index one split of the data set at `root`, a folder or s3://bucket/prefix.

    TesseraError for an unknown layout and as the layout raises it.
    """
    with without_collector():
        found = LAYOUTS[known(layout)](root, split)
    return replace(found, origin=Origin(open_store(str(root)).url, split, layout))
