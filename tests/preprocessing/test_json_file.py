"""An annotation JSON may be as large as memory allows, however it is made; what would take more is refused by name."""

import gc
import json
import tracemalloc
from pathlib import Path

import pytest

from infra import opening
from infra.errors import TesseraError
from preprocessing import json_file
from preprocessing.coco import read_index as read_coco
from preprocessing.files import File
from preprocessing.json_file import read_json
from preprocessing.layouts import read_index
from tests.support.coco_folder import CocoFolder

ROW = '{"id": 3226956, "category_id": 18, "iscrowd": 0, "bbox": [413, 158, 53, 138], "area": 2840}'
SHAPES = [ROW, "[]", "{}", "[[]]", '{"a":{}}', '""', '"ab"', "1e9", "12345678901", "null", '"\\u00e9\\u4e2d"']


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch):
    """Sets how much memory there seems to be."""
    return lambda number: monkeypatch.setattr(json_file, "memory_left", lambda: number)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_of_json_takes_more_than_it_is_refused_by(tmp_path: Path, left, shape: str):
    path = tmp_path / "a.json"
    path.write_text(f"[{','.join([shape] * 20_000)}]")
    tracemalloc.start()
    try:
        held = read_json(File(str(path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(held) == 20_000
    left(peak)
    with pytest.raises(OSError, match=r"bytes would take .* GB of memory, .* GB are left|at most \d+ are read"):
        read_json(File(str(path)))


def test_an_annotation_json_is_bounded_by_memory_alone(coco: CocoFolder, left, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(opening, "MOST", 1000)  # what any other file may have at most
    assert coco.json.stat().st_size > 1000
    assert len(read_coco(coco.root, coco.split).records) == 12
    left(2 * coco.json.stat().st_size)
    with pytest.raises(TesseraError, match=r"panoptic_train2017\.json: cannot be read \("):
        read_coco(coco.root, coco.split)


def test_the_collector_works_again_afterwards(coco: CocoFolder, tmp_path: Path):
    read_index(coco.root, coco.split)
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(json.JSONDecodeError):
        read_json(File(str(tmp_path / "a.json")))
    assert gc.isenabled()
