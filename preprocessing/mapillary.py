"""Mapillary Vistas as it is published: `training` and `validation`, unpacked or in its zip."""

from pathlib import Path

from preprocessing.coco import Parts, find, index_of
from preprocessing.source import Index
from preprocessing.tree import Tree


def read_v2_index(root: str | Path, split: str) -> Index:
    """Index the 124 classes of version 2.0: `<split>/v2.0/panoptic` with `panoptic_2020.json`, `<split>/images`.

    `split` is training or validation. JSON and PNGs are COCO's; images have names for ids. Errors as `coco.read_index`.
    """
    return _read(root, split, (f"{split}/v2.0/panoptic",), "panoptic_2020.json")


def read_v1_index(root: str | Path, split: str) -> Index:
    """Index the 65 classes of version 1.2: `<split>/v1.2/panoptic`, or `<split>/panoptic` as it first was published.

    The JSON there is `panoptic_2018.json`. Else as `read_v2_index`.
    """
    return _read(root, split, (f"{split}/v1.2/panoptic", f"{split}/panoptic"), "panoptic_2018.json")


def _read(root: str | Path, split: str, folders: tuple[str, ...], json: str) -> Index:
    parts = Parts(tuple(f"{folder}/{json}" for folder in folders), folders, (f"{split}/images",))
    return index_of(*find(Tree(root), parts, "Mapillary Vistas' layout"))
