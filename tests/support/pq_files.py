"""A truth and a prediction on disk in COCO's panoptic layout, to be scored."""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from panopticapi.evaluation import pq_compute_single_core

from evaluation.coco_files import score_files
from preprocessing import rgb_ids


@dataclass(frozen=True)
class Files:
    """Both sides in COCO's layout in one folder: truth.json, truth/1.png and so on."""

    root: Path

    def json(self, side):
        return self.root / f"{side}.json"

    def png(self, side, image):
        return self.root / side / f"{image}.png"

    @property
    def arguments(self):
        return self.json("truth"), self.json("prediction"), self.root / "truth", self.root / "prediction"

    def score(self):
        return score_files(*self.arguments)

    @contextmanager
    def editing(self, side):
        content = json.loads(self.json(side).read_text())
        yield content
        self.json(side).write_text(json.dumps(content))

    def panopticapi(self):
        """Its statistics object and the categories, from the same files."""
        true, predicted = (json.loads(self.json(side).read_text()) for side in ("truth", "prediction"))
        by_image = {entry["image_id"]: entry for entry in predicted["annotations"]}
        pairs = [(entry, by_image[entry["image_id"]]) for entry in true["annotations"]]
        categories = {c["id"]: c for c in true["categories"]}
        return pq_compute_single_core(0, pairs, *self.arguments[2:], categories), categories


def write_files(root, pairs, categories):
    """pairs: (ids, rows) of truth and of prediction; areas are counted."""
    for side, maps in zip(("truth", "prediction"), zip(*pairs, strict=True), strict=True):
        (root / side).mkdir(parents=True)
        annotations, images = [], []
        for image, (ids, rows) in enumerate(maps, start=1):
            (root / side / f"{image}.png").write_bytes(rgb_ids.write_png(ids))
            area = dict(zip(*(values.tolist() for values in np.unique(ids, return_counts=True)), strict=True))
            info = [{"iscrowd": 0, **row, "area": area.get(row["id"], 0), "bbox": [0, 0, 1, 1]} for row in rows]
            annotations.append({"image_id": image, "file_name": f"{image}.png", "segments_info": info})
            height, width = ids.shape
            images.append({"id": image, "file_name": f"{image}.jpg", "height": height, "width": width})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{side}.json").write_text(json.dumps(content))
    return Files(root)
