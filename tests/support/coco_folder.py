"""A data set in COCO's layout that a test may damage at will."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from preprocessing import rgb_ids
from preprocessing.coco import read_index
from preprocessing.source import BadSample, Index, Record, read_sample


@dataclass(frozen=True)
class CocoFolder:
    """Entries are counted from 0 in the order of the annotation JSON."""

    root: Path
    split: str = "train2017"

    @property
    def json(self) -> Path:
        return self.root / "annotations" / f"panoptic_{self.split}.json"

    @property
    def masks(self) -> Path:
        return self.root / "annotations" / f"panoptic_{self.split}"

    @property
    def images(self) -> Path:
        return self.root / self.split

    def image(self, position: int) -> Path:
        return sorted(self.images.glob("*.jpg"))[position]

    def mask(self, position: int) -> Path:
        return sorted(self.masks.glob("*.png"))[position]

    @contextmanager
    def editing(self) -> Iterator[dict]:
        content = json.loads(self.json.read_text())
        yield content
        self.json.write_text(json.dumps(content))

    def rows(self, position: int) -> list[dict]:
        return json.loads(self.json.read_text())["annotations"][position]["segments_info"]

    def ids(self, position: int) -> np.ndarray:
        return rgb_ids.read_png(self.mask(position).read_bytes())

    def write_ids(self, position: int, ids: np.ndarray) -> None:
        self.mask(position).write_bytes(rgb_ids.write_png(ids))

    def redraw(self, position: int, ids: np.ndarray, categories: dict[int, int]) -> None:
        """Another truth for one image; categories gives the dataset id of each segment's category."""
        self.write_ids(position, ids)
        with self.editing() as content:
            rows = [{"id": i, "category_id": c, "iscrowd": 0} for i, c in categories.items()]
            content["annotations"][position]["segments_info"] = rows

    def index(self) -> Index:
        return read_index(self.root, self.split)

    def record(self, position: int) -> Record:
        """As the whole index has it; image ids of a synthetic set start at 1."""
        (record,) = (r for r in self.index().records if r.image_id == position + 1)
        return record

    def sample(self, position: int):
        return read_sample(self.record(position), self.index().labels)

    def reason(self, position: int) -> str:
        """Why this entry is set aside by read_sample; the others must stay readable."""
        index, record = self.index(), self.record(position)
        for other in index.records:
            if other != record:
                read_sample(other, index.labels)
        with pytest.raises(BadSample) as caught:
            read_sample(record, index.labels)
        return str(caught.value)


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
