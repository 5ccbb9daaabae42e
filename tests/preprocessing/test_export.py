import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from panopticapi.utils import rgb2id
from PIL import Image

from infra.errors import TesseraError
from preprocessing import coco
from preprocessing.export import write_coco
from preprocessing.files import File
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment, measured
from preprocessing.source import Defect, Index, Record, read_sample

LABELS = LabelTable.from_coco(
    [
        {"id": 5, "name": "cat", "isthing": 1, "color": [1, 2, 3]},
        {"id": 90, "name": "sky", "isthing": 0, "color": [4, 5, 6]},
    ]
)


@dataclass(frozen=True)
class Drawn(Record):
    """A sample whose truth is in the record: pixels are segment ids, odd ones cats, even ones sky."""

    ids: tuple[tuple[int, ...], ...] = ()

    @property
    def masks(self) -> tuple[File, ...]:
        return (self.image,)

    def read_truth(self, labels: LabelTable, defects: list[Defect]) -> PanopticMap | None:
        ids_HW = np.array(self.ids, np.uint16)
        segments = measured(ids_HW, [Segment(0, i % 2, i % 2 == 0, i == 2) for i in range(ids_HW.max())])
        return PanopticMap(ids_HW.astype(np.int32), tuple(segments))


def drawn(folder: Path, image_id: int, ids: np.ndarray, suffix: str = ".jpg") -> Drawn:
    folder.mkdir(exist_ok=True)
    path = folder / f"picture of {image_id}{suffix}"
    Image.new("RGB", ids.shape[::-1], (image_id % 256, 7, 7)).save(path)
    return Drawn(image_id, File(str(path)), None, tuple(map(tuple, ids.tolist())))


@pytest.fixture
def index(tmp_path: Path) -> Index:
    ids = np.array([[0, 1, 1, 2], [3, 3, 2, 2]])
    pictures = tmp_path / "pictures"
    return Index(LABELS, (drawn(pictures, 17, ids), drawn(pictures, 10**12 - 1, ids.T, ".png")), ())


def same(written: Index, source: Index) -> None:
    assert written.labels == source.labels
    assert written.rejected == ()
    assert [r.image_id for r in written.records] == [r.image_id for r in source.records]
    for one, other in zip(written.records, source.records, strict=True):
        assert one.examine(written.labels).defects == ()
        (data, truth), (expected_data, expected) = (
            read_sample(one, written.labels),
            read_sample(other, source.labels),
        )
        assert data == expected_data
        assert truth.segments == expected.segments
        assert np.array_equal(truth.ids, expected.ids)


def test_what_is_written_is_read_back_the_same(index: Index, tmp_path: Path):
    assert write_coco(index, tmp_path / "out", "val") == ()
    same(coco.read_index(tmp_path / "out", "val"), index)


maps = hnp.arrays(
    np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6), elements=st.integers(0, 4)
)


@given(maps)
def test_any_map_is_read_back_the_same(tmp_path_factory: pytest.TempPathFactory, ids: np.ndarray):
    _, dense = np.unique(np.append(ids.ravel(), 0), return_inverse=True)
    ids, folder = dense[:-1].reshape(ids.shape), tmp_path_factory.mktemp("any")
    source = Index(LABELS, (drawn(folder / "pictures", 3, ids),), ())
    write_coco(source, folder / "out", "val")
    index = coco.read_index(folder / "out", "val")
    truth, expected = (read_sample(i.records[0], i.labels)[1] for i in (index, source))
    assert np.array_equal(truth.ids, expected.ids)
    assert [(s.id, s.area, s.box) for s in truth.segments] == [(s.id, s.area, s.box) for s in expected.segments]


def test_panopticapi_finds_the_areas_and_boxes_in_the_json(index: Index, tmp_path: Path):
    write_coco(index, tmp_path / "out", "val")
    content = json.loads((tmp_path / "out/annotations/panoptic_val.json").read_text())
    for annotation in content["annotations"]:
        ids = rgb2id(np.asarray(Image.open(tmp_path / "out/annotations/panoptic_val" / annotation["file_name"])))
        assert set(np.unique(ids)) - {0} == {row["id"] for row in annotation["segments_info"]}
        for row in annotation["segments_info"]:
            ys, xs = np.nonzero(ids == row["id"])
            box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
            assert (row["area"], row["bbox"]) == (len(ys), box)
            assert {type(value) for value in [*row["bbox"], *row.values()] if value is not row["bbox"]} == {int}


def test_images_keep_their_bytes_and_get_their_ids_name(index: Index, tmp_path: Path):
    write_coco(index, tmp_path / "out", "val")
    names = sorted(path.name for path in (tmp_path / "out/val").iterdir())
    assert names == ["000000000017.jpg", "999999999999.png"]
    source = Path(index.records[0].image.path)
    assert (tmp_path / "out/val/000000000017.jpg").read_bytes() == source.read_bytes()


def test_a_second_split_joins_the_first(index: Index, tmp_path: Path):
    for split in ("train", "val"):
        write_coco(index, tmp_path / "out", split)
    for split in ("train", "val"):
        same(coco.read_index(tmp_path / "out", split), index)


def test_a_split_that_is_there_is_not_written_over(index: Index, tmp_path: Path):
    write_coco(index, tmp_path / "out", "val")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(TesseraError, match=r"out/val: already there; nothing was written"):
        write_coco(replace(index, records=index.records[:1]), tmp_path / "out", "val")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_sample_that_cannot_be_used_is_left_out_and_told(index: Index, tmp_path: Path):
    Path(index.records[0].image.path).write_bytes(b"<html>")
    (rejected,) = write_coco(index, tmp_path / "out", "val")
    assert rejected.image_id == 17
    assert "not a readable image" in rejected.reason
    assert [r.image_id for r in coco.read_index(tmp_path / "out", "val").records] == [10**12 - 1]


def test_a_set_without_a_usable_sample_leaves_nothing(index: Index, tmp_path: Path):
    Path(index.records[0].image.path).unlink()
    with pytest.raises(TesseraError, match="val: no usable sample"):
        write_coco(replace(index, records=index.records[:1]), tmp_path / "out", "val")
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("broken", range(1, 4))
def test_an_interruption_leaves_nothing(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, broken: int
):
    if existing:
        write_coco(index, tmp_path / "out", "train")
    before = sorted(p for p in tmp_path.rglob("*") if p.name != "annotations")
    rename, calls = Path.rename, []

    def interrupted(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == (broken if existing else 1):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_coco(index, tmp_path / "out", "val")
    assert sorted(p for p in tmp_path.rglob("*") if p.name != "annotations") == before


def test_a_split_with_folders_in_its_name_is_refused(index: Index, tmp_path: Path):
    with pytest.raises(TesseraError, match="expected a name without folders"):
        write_coco(index, tmp_path / "out", "../val")


def test_a_file_in_the_place_of_the_folder_is_named(index: Index, tmp_path: Path):
    (tmp_path / "out").touch()
    with pytest.raises(TesseraError, match="out: is a file"):
        write_coco(index, tmp_path / "out", "val")
