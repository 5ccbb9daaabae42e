"""The data of the day: synthetic scenes in COCO's layout, every image with an id of its own."""

import json
from pathlib import Path

from preprocessing.synthetic import SyntheticConfig, write_split

SPLIT = "train2017"
_EXCHANGED = {1: 3, 3: 4, 4: 18, 18: 1, 92: 117, 117: 200, 200: 92}  # of the synthetic things, and of the stuff


def base(folder: Path, train: int, val: int, size: int = 64) -> Path:
    """A set with both splits."""
    config = SyntheticConfig(size=(size, size), seed=1)
    write_split(folder, SPLIT, train, 0, config)
    write_split(folder, "val2017", val, 1_000_000, config)
    return folder


def arrival(folder: Path, first_id: int, count: int, size: int = 64) -> Path:
    """More images, of ids from first_id + 1 on."""
    write_split(folder, SPLIT, count, first_id, SyntheticConfig(size=(size, size), seed=2))
    return folder


def damage(folder: Path, every: int) -> Path:
    """Cut the file of every so many images short, as a broken transfer does."""
    for path in sorted((folder / SPLIT).iterdir())[::every]:
        path.write_bytes(path.read_bytes()[:200])
    return folder


def mislead(folder: Path) -> Path:
    """Exchange categories: files and rows that nobody can call wrong, and that teach wrong things."""
    file = folder / "annotations" / f"panoptic_{SPLIT}.json"
    content = json.loads(file.read_text())
    for row in (row for entry in content["annotations"] for row in entry["segments_info"]):
        row["category_id"] = _EXCHANGED.get(row["category_id"], row["category_id"])
    file.write_text(json.dumps(content))
    return folder
