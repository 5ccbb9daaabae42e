import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from preprocessing.geometry import resize_labels
from preprocessing.kernels import MAX_RADIUS, UNKNOWN, measure, relabel, squared_distance
from preprocessing.panoptic_map import Segment
from preprocessing.rgb_ids import read_labels
from preprocessing.sample import instance_groups, semantic_groups
from tests.support.label_maps import squared_distances

RNG = np.random.default_rng(0)
MASKS = Path(__file__).resolve().parents[3] / "shared/data/coco_mini/annotations/panoptic_val2017"


def tiles(segments: int, size: tuple[int, int]) -> np.ndarray:
    """Rectangles with the labels 1..segments in random order."""
    columns = next(c for c in range(int(segments**0.5), 0, -1) if segments % c == 0)
    labels = RNG.permutation(np.arange(1, segments + 1, dtype=np.uint16)).reshape(-1, columns)
    return resize_labels(labels, size)


def lone_pixel(size: tuple[int, int], at: tuple[int, int]) -> np.ndarray:
    labels = np.zeros(size, np.uint16)
    labels[at] = 1
    return labels


MAPS = {
    "noise": RNG.integers(0, 3, (41, 67)).astype(np.uint16),
    "blobs": resize_labels(RNG.integers(0, 5, (4, 6)).astype(np.uint16), (97, 131)),
    "large": resize_labels(RNG.integers(0, 2, (2, 2)).astype(np.uint16), (300, 420)),
    "checkerboard": (np.indices((20, 31)).sum(0) % 2).astype(np.uint16),
    "lone pixel": lone_pixel((250, 260), (3, 250)),
    "lone corner": lone_pixel((30, 20), (29, 0)),
    "one pixel": np.ones((1, 1), np.uint16),
    "one row": np.repeat(np.array([[0, 2, 1, 1]], np.uint16), [3, 1, 60, 150], axis=1),
    "one column": np.repeat(np.array([[2], [0], [1]], np.uint16), [1, 2, 240], axis=0),
    "all void": np.zeros((19, 23), np.uint16),
    "all one segment": np.ones((19, 23), np.uint16),
    "255 segments": tiles(255, (160, 150)),
    "1000 segments": tiles(1000, (200, 170)),
}


@pytest.mark.parametrize("radius", [1, 2, 3, 8, 50, 180, MAX_RADIUS])
@pytest.mark.parametrize("name", MAPS)
def test_squared_distances_are_scipys_to_the_last_integer(name: str, radius: int):
    labels = MAPS[name]
    groups = np.arange(labels.max() + 1, dtype=np.uint16)
    result = squared_distance(labels, groups, radius)
    assert result.dtype == np.uint16
    assert np.array_equal(result, squared_distances(labels, radius))


@settings(max_examples=200, deadline=None)
@given(
    arrays(np.uint16, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 4)),
    arrays(np.uint16, 5, elements=st.sampled_from([0, 1, 2, 65535])),
    st.integers(1, 14),
)
def test_squared_distances_of_any_map_and_grouping(labels: np.ndarray, groups: np.ndarray, radius: int):
    assert np.array_equal(squared_distance(labels, groups, radius), squared_distances(groups[labels], radius))


@pytest.mark.skipif(not MASKS.is_dir(), reason=f"{MASKS} is not there")
@pytest.mark.parametrize("groups_of", [semantic_groups, instance_groups])
def test_squared_distances_of_real_maps(groups_of: Callable[[tuple[Segment, ...]], np.ndarray]):
    content = json.loads(MASKS.with_suffix(".json").read_text())
    things = {c["id"] for c in content["categories"] if c["isthing"]}
    for row in content["annotations"][:12]:
        rows = row["segments_info"]
        segments = [Segment(i, s["category_id"], s["category_id"] in things) for i, s in enumerate(rows, start=1)]
        ids = np.array([s["id"] for s in rows], np.int32)
        labels, _ = read_labels((MASKS / row["file_name"]).read_bytes(), ids)
        groups = groups_of(tuple(segments))
        for radius in (8, 50, MAX_RADIUS):
            assert np.array_equal(squared_distance(labels, groups, radius), squared_distances(groups[labels], radius))


@settings(max_examples=30, deadline=None)
@given(
    arrays(np.uint16, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=st.integers(0, 3)),
    st.tuples(st.integers(5, 70), st.integers(5, 400)),
    st.integers(1, MAX_RADIUS),
)
def test_squared_distances_across_tiles(coarse: np.ndarray, size: tuple[int, int], radius: int):
    labels, groups = resize_labels(coarse, size), np.arange(4, dtype=np.uint16)
    assert np.array_equal(squared_distance(labels, groups, radius), squared_distances(labels, radius))


def test_the_image_border_is_no_boundary():
    assert (squared_distance(np.ones((9, 9), np.uint16), np.array([0, 1], np.uint16), 5) == 25).all()
    left_half = np.repeat(np.array([[1, 0]], np.uint16), 5, axis=1).repeat(3, axis=0)
    row = [16, 9, 4, 1, 0, 0, 1, 4, 9, 16]
    assert squared_distance(left_half, np.array([0, 1], np.uint16), 9).tolist() == [row] * 3


CAT, SKY, ROAD = 3, 0, 1
SEGMENTS = (
    Segment(1, CAT, True),
    Segment(2, CAT, True),
    Segment(3, SKY, False),
    Segment(4, ROAD, False),
    Segment(5, CAT, True, is_crowd=True),
)


def has_border(groups: np.ndarray, left: int, right: int) -> bool:
    labels = np.array([[left, left, right, right]], np.uint16)
    return not squared_distance(labels, groups, 2).all()


@pytest.mark.parametrize(
    ("left", "right", "semantic", "instance"),
    [
        (1, 2, False, True),
        (1, 5, False, True),
        (1, 3, True, True),
        (3, 4, True, False),
        (3, 0, True, False),
        (1, 0, True, True),
        (1, 1, False, False),
    ],
    ids=["two cats", "cat, crowd", "cat, sky", "sky, road", "sky, void", "cat, void", "same cat"],
)
def test_each_task_has_its_own_borders(left: int, right: int, semantic: bool, instance: bool):
    assert has_border(semantic_groups(SEGMENTS), left, right) == semantic
    assert has_border(instance_groups(SEGMENTS), left, right) == instance


@pytest.mark.parametrize("name", MAPS)
def test_areas_boxes_and_centroids_are_those_of_the_pixels(name: str):
    labels = MAPS[name]
    segments = int(labels.max()) + 1  # the last one has no pixel
    area, box, centroid = measure(labels, segments)
    for label in range(segments + 1):
        ys, xs = np.nonzero(labels == label)
        assert area[label] == xs.size
        if xs.size:
            low = xs.min(), ys.min()
            assert tuple(box[label]) == (*low, xs.max() - low[0] + 1, ys.max() - low[1] + 1)
            assert centroid[label] == pytest.approx((xs.mean(), ys.mean()), abs=1e-9)
        else:
            assert not box[label].any()
            assert np.isnan(centroid[label]).all()


RAW_IDS = np.array([7, 2**24 - 1, 1, 2**16, 255, 256], np.int32)  # in JSON order


@pytest.mark.parametrize("first", range(7))
def test_relabel_gives_each_id_its_place_in_the_table(first: int):
    order = np.argsort(RAW_IDS)
    place = RNG.integers(0, 7, (30, 40))
    place[0, 0] = first
    raw = np.append(0, RAW_IDS)[place].astype(np.int32)
    dense = relabel(raw, RAW_IDS[order], (order + 1).astype(np.uint16))
    assert dense.dtype == np.uint16
    assert np.array_equal(dense, place)


def test_relabel_marks_what_is_not_in_the_table():
    raw = np.array([[5, 5, 7, 0, 2**24 - 2, 2**24 - 1], [8, 7, 7, 1, 0, 2]], np.int32)
    dense = relabel(raw, np.array([7, 2**24 - 1], np.int32), np.array([2, 1], np.uint16))
    u = UNKNOWN
    assert dense.tolist() == [[u, u, 2, 0, u, 1], [u, 2, 2, u, 0, u]]


def test_relabel_with_an_empty_table_knows_void_alone():
    raw = np.array([[0, 3], [0, 0]], np.int32)
    assert relabel(raw, np.empty(0, np.int32), np.empty(0, np.uint16)).tolist() == [[0, UNKNOWN], [0, 0]]
