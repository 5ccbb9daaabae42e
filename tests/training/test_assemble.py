"""From instances and classes of pixels to panoptic maps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import TesseraError
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap, measured
from preprocessing.synthetic import CATEGORIES
from tests.support.examples import BOX, DISK, FIELD, SKY, table
from training.parts.assemble import NO_INSTANCE, Assembly, assemble, assemble_on_device, best_classes


def same_maps(ones: list[PanopticMap], others: list[PanopticMap]) -> bool:
    pairs = zip(ones, others, strict=True)
    return all(np.array_equal(one.ids, other.ids) and one.segments == other.segments for one, other in pairs)


def put_together(instances, classes, size=None, **options) -> PanopticMap:
    instances_HW, classes_HW = np.array(instances, np.int32), np.array(classes, np.int32)
    return assemble(instances_HW, classes_HW, size or instances_HW.shape, Assembly(CATEGORIES, **options))


def test_an_instance_has_its_most_frequent_thing_class():
    found = put_together([[0, 0, 0, 0, 0, 0]], [[SKY, SKY, SKY, BOX, BOX, DISK]])
    assert [(s.category, s.is_thing, s.area) for s in found.segments] == [(BOX, True, 6)]


def test_pixels_are_void_where_the_heads_disagree():
    """An instance of stuff pixels only, and thing pixels outside of all instances."""
    found = put_together([[0, 0, -1, -1], [1, 1, -1, -1]], [[SKY, SKY, BOX, FIELD], [BOX, SKY, DISK, FIELD]])
    categories = {s.id: s.category for s in found.segments}
    named = [[categories.get(i) for i in row] for row in found.ids]
    assert named == [[None, None, None, FIELD], [BOX, BOX, None, FIELD]]


@pytest.mark.parametrize(("least", "kept"), [(2 / 12, {SKY, FIELD}), (3 / 12, {FIELD}), (11 / 12, set())])
def test_small_stuff_is_void_and_not_listed(least: float, kept: set[int]):
    found = put_together(np.full((1, 12), -1), [[SKY] * 2 + [FIELD] * 10], min_stuff_area=least)
    assert {s.category for s in found.segments} == kept
    assert (found.ids == 0).sum() == sum({SKY: 2, FIELD: 10}[c] for c in {SKY, FIELD} - kept)


def test_small_things_are_no_matter_of_the_stuff_limit():
    found = put_together([[0, *[-1] * 11]], [[BOX, *[SKY] * 11]], min_stuff_area=0.5)
    assert {s.category for s in found.segments} == {BOX, SKY}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 15), st.integers(1, 15)),
    st.floats(0, 0.5),
)
def test_the_table_says_what_the_pixels_say(seed, size, wanted, least):
    rng = np.random.default_rng(seed)
    names = np.arange(-1, rng.integers(0, 5))
    instances_HW = np.unique(rng.choice(names, size), return_inverse=True)[1].reshape(size) - 1
    found = put_together(instances_HW, rng.integers(0, len(CATEGORIES), size), wanted, min_stuff_area=least)
    assert found.size == wanted
    assert {s.id for s in found.segments} == {*np.unique(found.ids)} - {0}
    dense_HW = np.zeros(wanted, np.uint16)
    for i, segment in enumerate(found.segments, start=1):
        dense_HW[found.ids == segment.id] = i
    assert [replace(s, id=f.id) for s, f in zip(measured(dense_HW, found.segments), found.segments, strict=True)] == [
        *found.segments
    ]
    stuff = [s.category for s in found.segments if not s.is_thing]
    assert len(stuff) == len(set(stuff))
    assert all(CATEGORIES.is_thing[s.category] == s.is_thing for s in found.segments)


def reference_map(instances_HW, classes_HW, labels: LabelTable) -> list[list[tuple]]:
    """By pixel: the instance and its category, the stuff category, or void."""
    result = [[()] * instances_HW.shape[1] for _ in instances_HW]
    for y, x in np.ndindex(instances_HW.shape):
        members = classes_HW[instances_HW == instances_HW[y, x]].tolist()
        things = [c for c in members if labels.is_thing[c]]
        if instances_HW[y, x] != NO_INSTANCE and things:
            result[y][x] = ("thing", instances_HW[y, x], max(sorted(set(things)), key=things.count))
        elif instances_HW[y, x] == NO_INSTANCE and not labels.is_thing[classes_HW[y, x]]:
            result[y][x] = ("stuff", classes_HW[y, x])
    return result


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_pixels_are_their_instances_or_else_their_stuff(seed, size):
    rng = np.random.default_rng(seed)
    instances_HW = np.unique(rng.integers(-1, 4, size), return_inverse=True)[1].reshape(size) - 1
    classes_HW = rng.integers(0, len(CATEGORIES), size)
    found = put_together(instances_HW, classes_HW)
    category = {s.id: s.category for s in found.segments}
    expected = reference_map(instances_HW, classes_HW, CATEGORIES)
    names: dict[int, tuple] = {}
    for y, x in np.ndindex(size):
        name, label = expected[y][x], int(found.ids[y, x])
        assert (label == 0) == (name == ())
        assert names.setdefault(label, name) == name
        assert label == 0 or category[label] == name[-1]
    assert len(set(names.values())) == len(names)


def test_more_segments_than_int16_has_room_for():
    labels, things = table(2, 1), np.arange(200 * 200, dtype=np.int32).reshape(200, 200)
    one = assemble(things, np.zeros((200, 200), np.int32), (200, 200), Assembly(labels))
    tensors = torch.from_numpy(things)[None], torch.zeros(1, 200, 200, dtype=torch.int64)
    assert len(one.segments) == 40_000
    assert same_maps([one], assemble_on_device(*tensors, [(200, 200)], Assembly(labels)))


def test_more_segments_than_uint16_has_room_for_are_refused():
    things = np.arange(256 * 257, dtype=np.int32).reshape(256, 257)
    with pytest.raises(TesseraError, match="65792 segments"):
        assemble(things, np.zeros(things.shape, np.int32), things.shape, Assembly(table(1, 1)))


@pytest.mark.parametrize("shape", [(3, 1, 1), (5, 40, 60), (2, 64, 64)])
def test_the_best_class_is_the_first_of_the_largest(shape: tuple[int, int, int]):
    logits_CHW = np.random.default_rng(0).integers(0, 3, shape).astype(np.float32)
    assert np.array_equal(best_classes(logits_CHW), logits_CHW.argmax(0))
