"""What predict has written, as others read it."""

import json
from pathlib import Path

import numpy as np
from panopticapi.evaluation import pq_compute_single_core
from panopticapi.utils import rgb2id
from PIL import Image


def check_listing(output: Path, name: str = "predictions") -> dict:
    """The JSON, once every id is in the PNG and the other way round, and the panoptic API agrees."""
    listing = json.loads((output / f"{name}.json").read_text())
    categories = {c["id"]: c for c in listing["categories"]}
    for image, entry in zip(listing["images"], listing["annotations"], strict=True):
        assert entry["image_id"] == image["id"]
        with Image.open(output / name / entry["file_name"]) as png:
            assert (png.mode, png.size) == ("RGB", (image["width"], image["height"]))
            ids_HW = rgb2id(np.asarray(png))
        found, counts = np.unique(ids_HW[ids_HW > 0], return_counts=True)
        areas = {segment["id"]: segment["area"] for segment in entry["segments_info"]}
        assert dict(zip(found.tolist(), counts.tolist(), strict=True)) == areas
    pairs = [(entry, entry) for entry in listing["annotations"]]
    stat = pq_compute_single_core(0, pairs, str(output / name), str(output / name), categories)
    segments = sum(len(entry["segments_info"]) for entry in listing["annotations"])
    assert sum(stat[i].tp for i in categories) == segments
    assert not sum(stat[i].fp + stat[i].fn for i in categories)
    return listing
