import io
import json

import numpy as np
import pyarrow
import pytest
from panopticapi.utils import rgb2id
from PIL import Image

from preprocessing.sample import ARRAYS, Sample, decode_image, from_fields, make_sample, to_fields
from tests.support.coco_folder import CocoFolder
from tests.support.label_maps import resized, squared_distances

CAT, SKY = 1, 92  # dataset ids of a thing and of stuff
GRIDS = [None, (48, 48), (20, 20), (33, 61), (96, 128)]


def sample_of(coco: CocoFolder, position: int, grid=None, radius: int = 9) -> Sample:
    return make_sample(coco.record(position), coco.index().labels, grid, radius)


def numbered(count: int) -> np.ndarray:
    """A 48x48 map of the ids 1..count, none of which is lost."""
    return (np.arange(48 * 48, dtype=np.int32) // 7 % count + 1).reshape(48, 48)


@pytest.mark.parametrize("grid", [None, (20, 20)])
def test_a_sample_survives_its_fields(coco: CocoFolder, grid):
    for position in range(12):
        sample = sample_of(coco, position, grid)
        copy = from_fields(to_fields(sample))
        assert (copy.image_id, copy.file_name, copy.image) == (sample.image_id, sample.file_name, sample.image)
        assert copy.segments == sample.segments
        for name in ARRAYS:
            before, after = getattr(sample, name), getattr(copy, name)
            assert before.dtype == after.dtype
            assert np.array_equal(before, after)


@pytest.mark.parametrize(("count", "dtype"), [(255, "uint8"), (256, "uint16"), (300, "uint16")])
def test_labels_take_two_bytes_above_255_segments(coco: CocoFolder, count: int, dtype: str):
    coco.redraw(3, numbered(count), dict.fromkeys(range(1, count + 1), CAT))
    sample = from_fields(to_fields(sample_of(coco, 3)))
    assert sample.labels.dtype == dtype
    assert np.array_equal(sample.labels, numbered(count))
    assert len(sample.segments) == count


def test_fields_can_be_read_without_us(coco: CocoFolder):
    sample = sample_of(coco, 3, (20, 30))
    fields = to_fields(sample)
    assert fields.keys() == {"jpg", "json", "labels.lz4", "d2.lz4"}
    assert Image.open(io.BytesIO(fields["jpg"])).size == (30, 20)
    facts = json.loads(fields["json"])
    for name in ARRAYS:
        declared = facts["arrays"][name]
        raw = pyarrow.input_stream(io.BytesIO(fields[f"{name}.lz4"]), compression="lz4").read()
        assert np.array_equal(np.frombuffer(raw, declared["dtype"]).reshape(declared["shape"]), getattr(sample, name))
    assert facts["arrays"]["d2"] == {"dtype": "<i2", "shape": [20, 2, 30]}
    assert [row["area"] for row in facts["segments"]] == [s.area for s in sample.segments]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("radius", [3, 40])
def test_distances_are_those_of_the_resized_truth(coco: CocoFolder, grid, radius: int):
    labels = coco.index().labels
    for position in range(0, 12, 3):
        ids = resized(rgb2id(np.asarray(Image.open(coco.mask(position)))), grid or (48, 48))
        category, instance = np.zeros(ids.shape, int), np.zeros(ids.shape, int)
        for row in coco.rows(position):
            category[ids == row["id"]] = row["category_id"]
            if labels.is_thing[labels.contiguous[row["category_id"]]]:
                instance[ids == row["id"]] = row["id"]
        sample = sample_of(coco, position, grid, radius)
        assert np.array_equal(sample.d2[:, 0], squared_distances(category, radius))
        assert np.array_equal(sample.d2[:, 1], squared_distances(instance, radius))


@pytest.mark.parametrize("grid", GRIDS)
def test_segments_are_measured_on_the_grid(coco: CocoFolder, grid):
    for position in range(12):
        sample = sample_of(coco, position, grid)
        assert sample.panoptic.size == (grid or (48, 48))
        for segment in sample.segments:
            ys, xs = np.nonzero(sample.labels == segment.id)
            assert segment.area == xs.size > 0
            assert segment.box == (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)
            if segment.is_thing and not segment.is_crowd:
                assert segment.centroid == pytest.approx((xs.mean(), ys.mean()), abs=1e-9)
            else:
                assert segment.centroid is None


def test_a_segment_that_vanishes_on_the_grid_is_dropped_and_ids_stay_dense(coco: CocoFolder):
    ids = np.full((48, 48), 900, np.int32)
    ids[0, 0] = 5  # a 20x20 grid samples rows and columns 1, 3, 6, ...
    ids[20:30, 20:30] = 70
    coco.redraw(3, ids, {5: CAT, 900: SKY, 70: CAT})
    assert [s.area for s in sample_of(coco, 3).segments] == [1, 48 * 48 - 101, 100]
    sample = sample_of(coco, 3, (20, 20))
    assert [s.id for s in sample.segments] == [1, 2]
    assert [s.is_thing for s in sample.segments] == [False, True]
    assert np.array_equal(sample.labels, np.where(resized(ids, (20, 20)) == 900, 1, 2))
    assert [s.area for s in sample.segments] == [(sample.labels == i).sum() for i in (1, 2)]


@pytest.mark.parametrize("grid", [None, (48, 48)])
def test_an_image_on_its_own_grid_keeps_its_bytes(coco: CocoFolder, grid):
    assert sample_of(coco, 3, grid).image == coco.image(3).read_bytes()


def test_an_image_on_another_grid_is_squashed_and_close_to_the_source(coco: CocoFolder):
    sample = sample_of(coco, 3, (24, 96))
    small = decode_image(sample.image)
    wanted = decode_image(coco.image(3).read_bytes(), (24, 96))
    assert small.shape == wanted.shape == (24, 96, 3)
    assert np.abs(small.astype(int) - wanted).mean() < 3


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_an_image_of_another_mode_is_rgb_when_decoded(coco: CocoFolder, mode: str):
    Image.new(mode, (48, 48)).save(coco.image(3))
    for grid in (None, (20, 20)):
        assert decode_image(sample_of(coco, 3, grid).image).shape == (*(grid or (48, 48)), 3)


@pytest.mark.parametrize("ids", [np.zeros((48, 48), np.int32), np.full((48, 48), 8, np.int32)], ids=["void", "stuff"])
def test_an_image_without_boundary_is_far_from_one_everywhere(coco: CocoFolder, ids: np.ndarray):
    coco.redraw(3, ids, {8: SKY} if ids.any() else {})
    sample = from_fields(to_fields(sample_of(coco, 3, (20, 20), 7)))
    assert (sample.d2 == 49).all()
    assert len(sample.segments) == ids.any()
