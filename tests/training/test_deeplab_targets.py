"""Targets of Panoptic-DeepLab, against loops over pixels in float64."""

import math
from dataclasses import dataclass, fields, replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.panoptic_map import Segment
from tests.support.examples import (
    BOX,
    CROWD,
    DISK,
    STUFF,
    THING,
    batch_of,
    example_of,
    odd,
    of_all_kinds,
    same_batches,
    scenes,
    whole,
)
from training.batch import VOID, Example, collate
from training.methods.panoptic_deeplab.config import PanopticDeeplabConfig
from training.methods.panoptic_deeplab.targets import Targets, centroids, targets, with_crowds

CONFIG = PanopticDeeplabConfig(sigma=2.0, small_area=40)
CONFIGS = {
    "small": CONFIG,
    "the paper's": PanopticDeeplabConfig(),
    "sharp": PanopticDeeplabConfig(sigma=0.3, small_area=0),
    "another weight": PanopticDeeplabConfig(sigma=5.5, small_area=25, small_weight=0.25),
}
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
MIXED = [*scenes(6, (24, 20)), of_all_kinds((24, 20)), *odd((24, 20)).values()]
ODD = [(size, name) for size in ((1, 1), (1, 7), (7, 1), (9, 12)) for name in odd(size)]


@dataclass(frozen=True)
class Slow:
    """Targets of one example. A centroid halfway between pixels may have its peak at either: heat has two bounds."""

    classes: np.ndarray
    class_weight: np.ndarray
    low: np.ndarray
    high: np.ndarray
    heat_weight: np.ndarray
    offset: np.ndarray
    offset_weight: np.ndarray


def own_pixels(example: Example, row: int) -> list[tuple[int, int]]:
    return [at for at, label in np.ndenumerate(example.labels_HW) if label == row]


def true_things(example: Example) -> dict[int, tuple[float, float]]:
    """Centroids, y and x, of what is a thing and no crowd."""
    found = {}
    for row, segment in enumerate(example.segments, 1):
        if segment.is_thing and not segment.is_crowd:
            pixels = own_pixels(example, row)
            found[row] = (sum(y for y, _ in pixels) / len(pixels), sum(x for _, x in pixels) / len(pixels))
    return found


def nearest(value: float) -> set[int]:
    """The integers that are nearest, both of a tie."""
    return {math.floor(value + 0.5 - 1e-4), math.floor(value + 0.5 + 1e-4)}


def slow(example: Example, config: PanopticDeeplabConfig) -> Slow:
    size = example.labels_HW.shape
    things = true_things(example)
    peaks = [list(product(nearest(y), nearest(x))) for y, x in things.values()]
    made = Slow(*(np.zeros(shape) for shape in (size, size, size, size, size, (2, *size), size)))
    for (y, x), label in np.ndenumerate(example.labels_HW):
        segment = example.segments[label - 1] if label else None
        made.classes[y, x] = VOID if segment is None else segment.category
        made.class_weight[y, x] = segment is not None
        if label in things and len(own_pixels(example, label)) < config.small_area:
            made.class_weight[y, x] = config.small_weight
        for places in peaks:
            values = [math.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * config.sigma**2)) for v, u in places]
            made.low[y, x] = max(made.low[y, x], min(values))
            made.high[y, x] = max(made.high[y, x], *values)
        made.heat_weight[y, x] = segment is not None and not segment.is_crowd
        if label in things:
            made.offset[:, y, x] = things[label][0] - y, things[label][1] - x
            made.offset_weight[y, x] = 1
    return made


def assert_equal_slow(found: Targets, b: int, expected: Slow) -> None:
    assert np.array_equal(found.classes_BHW[b], expected.classes)
    assert np.array_equal(found.class_weight_BHW[b], expected.class_weight)
    assert np.array_equal(found.heat_weight_BHW[b], expected.heat_weight)
    assert np.array_equal(found.offset_weight_BHW[b], expected.offset_weight)
    np.testing.assert_allclose(found.offset_B2HW[b], expected.offset, atol=1e-5)
    heat_HW = found.heat_BHW[b].numpy()
    assert (heat_HW >= expected.low - 1e-6).all()
    assert (heat_HW <= expected.high + 1e-6).all()


def test_the_mixed_examples_have_everything_that_targets_tell_apart():
    segments = [s for e in MIXED for s in e.segments]
    areas = [s.area for s in segments if s.centroid is not None]
    assert min(areas) < 25 < 40 <= max(areas)
    assert any(s.is_crowd for s in segments)
    assert any(not s.is_thing for s in segments)
    assert any((e.labels_HW == 0).any() for e in MIXED)
    assert any(np.array_equal(slow(e, CONFIG).low, slow(e, CONFIG).high) and true_things(e) for e in MIXED)


@all_configs
def test_targets_equal_their_slow_definitions(config: PanopticDeeplabConfig):
    found = targets(batch_of(*MIXED), config)
    for b, example in enumerate(MIXED):
        assert_equal_slow(found, b, slow(example, config))


@pytest.mark.parametrize(("size", "name"), ODD, ids=str)
def test_targets_of_odd_images_equal_their_slow_definitions(size: tuple[int, int], name: str):
    example = odd(size)[name]
    found = targets(batch_of(example), CONFIG)
    assert_equal_slow(found, 0, slow(example, CONFIG))


def test_targets_have_the_types_that_are_told():
    found = targets(batch_of(*MIXED), CONFIG)
    types = {f.name: getattr(found, f.name).dtype for f in fields(found)}
    assert types.pop("classes_BHW") == torch.int64
    assert set(types.values()) == {torch.float32}
    assert found.offset_B2HW.shape == (len(MIXED), 2, 24, 20)


def one_row() -> Example:
    """A thing in the table alone."""
    segment = Segment(1, DISK, True, area=1, centroid=(0.0, 0.0))
    return Example("1", np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.uint8), None, (segment,))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2048), st.integers(1, 2048), st.floats(0, 1), st.floats(0, 1))
def test_centroids_come_back_in_pixels(height: int, width: int, down: float, right: float):
    y, x = down * (height - 1), right * (width - 1)
    batch = collate([one_row()])
    share = torch.tensor([[[0.0, 0.0], [(2 * x + 1) / width - 1, (2 * y + 1) / height - 1]]])
    batch = replace(batch, labels_BHW=torch.zeros(1, height, width, dtype=torch.uint8), centroid_BN2=share)
    found = centroids(batch)[0, 1].tolist()
    assert found == pytest.approx([y, x], abs=2e-4)


@pytest.mark.parametrize("side", [1, 2, 96, 641, 2048])
def test_a_centroid_on_a_pixel_has_its_peak_there(side: int):
    """Whatever float32 makes of it on the way through -1 to 1."""
    places = range(0, side, max(1, side // 200))
    segments = tuple(Segment(i + 1, DISK, True, area=1, centroid=(float(x), 0.0)) for i, x in enumerate(places))
    example = Example("1", np.zeros((1, side, 3), np.uint8), np.zeros((1, side), np.uint16), None, segments)
    heat_HW = targets(collate([example]), replace(CONFIG, sigma=0.2)).heat_BHW[0]
    assert (heat_HW[0] == 1).nonzero()[:, 0].tolist() == list(places)


def test_every_thing_has_a_peak_of_exactly_1_at_a_pixel_nearest_to_its_centroid():
    count = 0
    for b, example in enumerate(MIXED):
        heat_HW = targets(batch_of(*MIXED), CONFIG).heat_BHW[b]
        for y, x in true_things(example).values():
            assert any(heat_HW[place] == 1 for place in product(nearest(y), nearest(x)))
            count += 1
        allowed = {place for y, x in true_things(example).values() for place in product(nearest(y), nearest(x))}
        assert {tuple(place) for place in (heat_HW == 1).nonzero().tolist()} <= allowed
    assert count > 15


def test_a_ring_is_sent_to_its_middle_where_it_has_no_pixel():
    labels_HW = np.ones((9, 11), int)
    labels_HW[2:7, 3:8] = 2
    labels_HW[3:6, 4:7] = 1
    found = targets(batch_of(example_of(labels_HW, [STUFF, THING])), CONFIG)
    assert found.heat_BHW[0, 4, 5] == 1
    assert found.offset_weight_BHW[0, 4, 5] == 0
    assert found.offset_B2HW[0, :, 2, 3].tolist() == pytest.approx([2, 2], abs=1e-5)
    assert not found.offset_B2HW[0, :, 4, 5].any()


def test_where_gaussians_meet_the_larger_counts():
    labels_HW = np.ones((5, 9), int)
    labels_HW[2, 2], labels_HW[2, 6] = 2, 3
    row = targets(batch_of(example_of(labels_HW, [STUFF, THING, THING])), CONFIG).heat_BHW[0, 2].tolist()
    assert row == pytest.approx([math.exp(-(d**2) / 8) for d in (2, 1, 0, 1, 2, 1, 0, 1, 2)])


@pytest.mark.parametrize("segment", [None, STUFF, CROWD], ids=["void", "stuff", "crowd"])
def test_what_has_no_centroid_has_no_peak_though_the_table_is_padded(segment: Segment | None):
    """Padding rows have a centroid of 0, the middle of the image."""
    bare = whole(segment, (24, 20))
    for examples in ([bare], [bare, MIXED[0]]):
        found = targets(batch_of(*examples), CONFIG)
        assert not found.heat_BHW[0].any()
        assert not found.offset_B2HW[0].any()
        assert not found.offset_weight_BHW[0].any()
        assert bool(found.heat_weight_BHW[0].any()) == (segment == STUFF)
        assert bool(found.class_weight_BHW[0].any()) == (segment is not None)


def test_a_thing_of_exactly_the_small_area_weighs_as_any():
    labels_HW = np.ones((8, 8), int)
    labels_HW[1:3, 1:5] = 2
    batch = batch_of(example_of(labels_HW, [STUFF, THING]))
    weights = [targets(batch, replace(CONFIG, small_area=area)).class_weight_BHW[0] for area in (8, 9)]
    assert [weight[1, 1].item() for weight in weights] == [1, 3]
    assert [weight[0, 0].item() for weight in weights] == [1, 1]


def test_a_small_crowd_weighs_as_any():
    labels_HW = np.ones((8, 8), int)
    labels_HW[1:3, 1:5] = 2
    found = targets(batch_of(example_of(labels_HW, [STUFF, CROWD])), CONFIG)
    assert (found.class_weight_BHW == 1).all()
    assert np.array_equal(found.heat_weight_BHW[0] == 0, labels_HW == 2)


def test_targets_of_a_batch_are_those_of_its_examples_to_the_bit():
    together = targets(batch_of(*MIXED), CONFIG)
    assert len({len(e.segments) for e in MIXED}) > 3
    for b, example in enumerate(MIXED):
        alone = targets(batch_of(example), CONFIG)
        for f in fields(alone):
            assert torch.equal(getattr(alone, f.name)[0], getattr(together, f.name)[b]), f.name


def test_targets_of_more_segments_than_uint8_has_room_for():
    labels_HW = np.arange(1, 401).reshape(20, 20)
    segments = [Segment(0, BOX if i % 3 else DISK, i % 2 == 0) for i in range(400)]
    batch = batch_of(example_of(labels_HW, segments))
    found = targets(batch, replace(CONFIG, sigma=0.2))
    assert batch.labels_BHW.dtype == torch.int32
    assert np.array_equal(found.heat_BHW[0] == 1, (labels_HW - 1) % 2 == 0)
    assert found.offset_B2HW.abs().max() < 1e-5


def mirrored(found: Targets) -> Targets:
    """Left to right, with the sign of x changed."""
    flipped = {f.name: getattr(found, f.name).flip(-1) for f in fields(found)}
    flipped["offset_B2HW"] = flipped["offset_B2HW"] * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    return Targets(**flipped)


def test_mirrored_examples_have_mirrored_targets():
    """But for the heat of a centroid halfway between two columns, whose peak is at one of both."""
    with_heat = 0
    for example in MIXED:
        expected = mirrored(targets(batch_of(example), CONFIG))
        found = targets(batch_of(example.flipped()), CONFIG)
        tied = [x for _, x in true_things(example).values() if len(nearest(x)) > 1]
        with_heat += not tied and len(true_things(example)) > 0
        for f in fields(found):
            if f.name != "heat_BHW" or not tied:
                torch.testing.assert_close(getattr(found, f.name), getattr(expected, f.name), atol=1e-5, rtol=0)
        assert_equal_slow(found, 0, slow(example.flipped(), CONFIG))
    assert with_heat >= 2


def test_with_crowds_targets_are_those_of_crowds_as_things():
    crowded = [e for e in (*scenes(30, (24, 20)), of_all_kinds((24, 20))) if any(s.is_crowd for s in e.segments)]
    assert len(crowded) > 2
    as_things = [
        example_of(e.labels_HW, [replace(s, is_crowd=False) for s in e.segments], e.key, e.image_HW3) for e in crowded
    ]
    found = targets(with_crowds(batch_of(*crowded)), CONFIG)
    for b, example in enumerate(as_things):
        assert_equal_slow(found, b, slow(example, CONFIG))


def test_with_crowds_changes_crowds_alone():
    batch = batch_of(*(e for e in MIXED if not any(s.is_crowd for s in e.segments)))
    assert batch.thing_BN.any()
    assert same_batches(with_crowds(batch), batch)
    batch = batch_of(*MIXED)
    kept = ~batch.crowd_BN
    assert torch.equal(with_crowds(batch).centroid_BN2[kept], batch.centroid_BN2[kept])
    assert torch.equal(with_crowds(batch).thing_BN, batch.thing_BN | batch.crowd_BN)
    assert batch.crowd_BN.any()


def test_a_crowd_of_a_whole_large_image_is_sent_to_its_middle():
    """Sums of half a million numbers in float32."""
    found = centroids(with_crowds(batch_of(whole(CROWD, (512, 1024)))))
    assert found[0, 1].tolist() == pytest.approx([255.5, 511.5], abs=0.01)
