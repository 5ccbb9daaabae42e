from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example as given_too
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infra.errors import TesseraError
from preprocessing.coco import read_index
from preprocessing.geometry import PADDING, Frame, resize_labels
from preprocessing.panoptic_map import Segment
from preprocessing.sample import framed_image, instance_groups, make_sample, semantic_groups, to_rgb
from tests.support.examples import CROWD, STUFF, THING, example_of, odd, of_all_kinds, scene
from tests.support.label_maps import resized, squared_distances
from training.augment import Crop, cropped, framed, scaled_size
from training.batch import Example, collate
from training.reader import ReaderConfig

COCO_MINI = Path(__file__).resolve().parents[3] / "shared/data/coco_mini"
RADIUS = 6
SMALL = Crop(size=(24, 28), short_side=(12, 48), long_side=60)
READER = ReaderConfig(shuffle=3, crop=SMALL)
SIDES = st.integers(1, 40)
SIZES = st.tuples(SIDES, SIDES)
SHARES = st.tuples(*[st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])] * 3)
"""Where between the least and the most a draw lies: of the short side, of the window's top, of its left."""


@dataclass
class Chosen:
    """A generator whose draws the test has chosen."""

    shares: tuple[float, ...]
    drawn: list[int] = field(default_factory=list)

    def integers(self, low: int, high: int | None = None, *, endpoint: bool) -> int:
        first, last = (0, low) if high is None else (low, high)
        assert endpoint
        assert first <= last
        self.drawn.append(first + round(self.shares[len(self.drawn)] * (last - first)))
        return self.drawn[-1]


def seen(example: Example, crop: Crop, shares: tuple[float, ...], radius: int = RADIUS):
    """A crop, and the draws that made it: short side, top, left."""
    rng = Chosen(shares)
    return cropped(example, crop, rng, radius), rng.drawn


def patches(size: tuple[int, int], count: int, seed: int) -> Example:
    """Segments of all kinds, of one piece or several, and void; some have few pixels, none has no pixel."""
    rng = np.random.default_rng(seed)
    coarse_HW = rng.integers(0, count + 1, [-(-side // 3) for side in size])
    labels_HW = coarse_HW.repeat(3, 0).repeat(3, 1)[: size[0], : size[1]]
    found, labels_HW = np.unique(labels_HW, return_inverse=True)
    rows = [replace([STUFF, CROWD, THING][i % 3], category=i % 4) for i in range(1, len(found) + (found[0] > 0))]
    y_HW1, x_HW1 = (axis[..., None] for axis in np.indices(size))
    waves_HW3 = 128 + 60 * np.sin(y_HW1 / [3, 5, 9]) * np.cos(x_HW1 / [8, 4, 3])  # noise would be clipped on the way
    return example_of(labels_HW + (found[0] > 0), rows, rgb=waves_HW3.astype(np.uint8))


def slow_scaled(image: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    def at(share: Fraction) -> tuple[int, int]:
        return tuple(max(1, floor(side * share + Fraction(1, 2))) for side in image)

    first = at(Fraction(short, min(image)))
    return first if max(first) <= long else at(Fraction(long, max(image)))


def slow_segments(labels_HW: np.ndarray, rows: list[Segment]) -> tuple[Segment, ...]:
    result = []
    for label, row in enumerate(rows, 1):
        ys, xs = np.nonzero(labels_HW == label)
        box = int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1
        centroid = (float(xs.mean()), float(ys.mean())) if row.is_thing and not row.is_crowd else None
        result.append(replace(row, id=label, area=len(xs), box=box, centroid=centroid))
    return tuple(result)


def slow_view(
    example: Example, scaled: tuple[int, int], corner: tuple[int, int], size: tuple[int, int], resize=resized
) -> Example:
    """All of the example resized, then cut, measured and padded."""
    window = tuple(slice(start, start + side) for start, side in zip(corner, size, strict=True))
    image_HW3 = to_rgb(Image.fromarray(example.image_HW3), scaled)[window]
    old_HW = resize(example.labels_HW, scaled)[window]
    names = sorted(set(old_HW.flat) - {0})
    labels_HW = np.zeros(old_HW.shape, int)
    for new, old in enumerate(names, 1):
        labels_HW[old_HW == old] = new
    segments = slow_segments(labels_HW, [example.segments[old - 1] for old in names])
    groups = [group_N[labels_HW] for group_N in (semantic_groups(segments), instance_groups(segments))]
    d2_2HW = [squared_distances(groups_HW, RADIUS) for groups_HW in groups]
    rows, columns = (slice(side) for side in labels_HW.shape)
    whole_HW3, whole_HW = np.full((*size, 3), PADDING, np.uint8), np.zeros(size, int)
    whole_H2W = np.full((size[0], 2, size[1]), RADIUS**2)
    whole_HW3[rows, columns], whole_HW[rows, columns] = image_HW3, labels_HW
    whole_H2W[rows, :, columns] = np.stack(d2_2HW, axis=1)
    return Example(example.key, whole_HW3, whole_HW, whole_H2W, segments)


def off(left: np.ndarray, right: np.ndarray) -> int:
    """The most that two pictures differ by, in grey levels."""
    assert left.shape == right.shape
    return int(np.abs(left.astype(int) - right).max())


def assert_same(found: Example, expected: Example) -> None:
    """The image to two grey levels, one for each pass of Pillow's, centroids to a rounding, all else to the bit."""
    assert found.key == expected.key
    assert found.image_HW3.dtype == np.uint8
    assert off(found.image_HW3, expected.image_HW3) <= 2
    np.testing.assert_array_equal(found.labels_HW, expected.labels_HW)
    np.testing.assert_array_equal(found.d2_H2W, expected.d2_H2W)
    assert found.d2_H2W.dtype == np.int16
    assert [replace(s, centroid=None) for s in found.segments] == [replace(s, centroid=None) for s in expected.segments]
    for mine, its in zip(found.segments, expected.segments, strict=True):
        assert mine.centroid == (its.centroid and pytest.approx(its.centroid, abs=1e-9))


def crop_of(size: tuple[int, int], least: int, more: int, long: int) -> Crop:
    return Crop(size=size, short_side=(least, least + more), long_side=least + more + long)


CROPS = st.builds(crop_of, SIZES, SIDES, st.integers(0, 20), st.integers(0, 60))


@given(SIZES, st.integers(0, 12), st.integers(0, 99), CROPS, SHARES, st.booleans())
@given_too((1, 1), 1, 0, Crop(size=(1, 1), short_side=(1, 1), long_side=1), (0.0,) * 3, False)
@given_too((1, 1), 1, 0, Crop(size=(9, 7), short_side=(1, 30), long_side=30), (1.0,) * 3, True)
@given_too((1, 500), 9, 0, Crop(size=(8, 8), short_side=(1, 64), long_side=128), (1.0,) * 3, False)
@given_too((500, 1), 9, 0, Crop(size=(8, 90), short_side=(2, 2), long_side=2000), (1.0,) * 3, True)
def test_a_crop_is_what_resizing_all_then_cutting_gives(
    size: tuple[int, int], count: int, seed: int, crop: Crop, shares: tuple[float, ...], mirrored: bool
):
    example = patches(size, count, seed)
    example = example.flipped() if mirrored else example
    found, (short, *corner) = seen(example, crop, shares)
    assert crop.short_side[0] <= short <= crop.short_side[1]
    assert_same(found, slow_view(example, slow_scaled(size, short, crop.long_side), tuple(corner), crop.size))


@given(SIZES, st.integers(0, 12), st.integers(0, 99), SIZES, st.booleans())
@given_too((1, 500), 9, 0, (8, 8), True)
@given_too((500, 1), 9, 0, (8, 8), False)
def test_a_framed_example_is_what_evaluation_sees(
    size: tuple[int, int], count: int, seed: int, grid: tuple[int, int], keep_aspect: bool
):
    example, frame = patches(size, count, seed), Frame(size=grid, keep_aspect=keep_aspect)
    found = framed(example, frame, RADIUS)
    assert_same(found, slow_view(example, frame.inner(size), (0, 0), grid))
    np.testing.assert_array_equal(found.image_HW3, framed_image(Image.fromarray(example.image_HW3), frame))


@given(SIZES, st.integers(1, 100), st.integers(0, 100))
def test_the_scaled_image_keeps_its_aspect_within_both_bounds(size: tuple[int, int], short: int, more: int):
    long = short + more
    scaled = scaled_size(size, short, long)
    assert scaled == slow_scaled(size, short, long)
    assert max(scaled) <= long
    assert min(scaled) == short or max(scaled) == long
    assert scaled_size(size[::-1], short, long) == scaled[::-1]


@pytest.mark.parametrize("short", [23, 399, 401, 1300])
def test_no_place_of_a_large_image_is_more_than_a_grey_level_off(short: int):
    """Pillow's box is in float32, and it has two passes: errors must neither grow with the place nor add up."""
    image_HW3 = np.random.default_rng(0).integers(0, 256, (400, 1200, 3), np.uint8)
    whole_HW3 = to_rgb(Image.fromarray(image_HW3), (short, 3 * short))
    example = Example("", image_HW3, np.zeros((400, 1200), np.uint8), None, ())
    for size in [(20, 70), (300, 200), (3, 1000), (500, 2)]:
        crop = Crop(size=size, short_side=(short, short), long_side=3 * short)
        for shares in [(0.0, 0.0, 0.0), (0.0, 0.37, 0.71), (0.0, 1.0, 1.0)]:
            found, (_, y, x) = seen(example, crop, shares, 0)
            expected_HW3 = whole_HW3[y : y + size[0], x : x + size[1]]
            assert off(found.image_HW3[: expected_HW3.shape[0], : expected_HW3.shape[1]], expected_HW3) <= 1


def pixel_each(size: tuple[int, int]) -> Example:
    """Every pixel is a thing whose category is its number."""
    count = size[0] * size[1]
    labels_HW = np.arange(1, count + 1).reshape(size)
    return example_of(labels_HW, [Segment(0, number, True) for number in range(count)])


def test_every_place_of_the_window_is_as_likely_and_no_other_is_seen():
    example, crop = pixel_each((5, 6)), Crop(size=(3, 4), short_side=(5, 5), long_side=6)
    rng, counts = np.random.default_rng(0), np.zeros((3, 3), int)
    for _ in range(900):
        found = cropped(example, crop, rng, 0)
        y, x = divmod(found.segments[0].category, 6)
        assert [s.category for s in found.segments] == [6 * (y + i) + x + j for i in range(3) for j in range(4)]
        counts[y, x] += 1
    assert counts.min() > 65
    assert counts.max() < 140


def test_every_short_side_between_the_bounds_is_as_likely_and_no_other_is_drawn():
    example, crop = example_of(np.ones((10, 20)), [STUFF]), Crop(size=(20, 40), short_side=(7, 11), long_side=20)
    rng, counts = np.random.default_rng(0), dict.fromkeys([(7, 14), (8, 16), (9, 18), (10, 20)], 0)
    for _ in range(500):
        *_, width, height = cropped(example, crop, rng, 0).segments[0].box
        counts[height, width] += 1
    assert 140 < counts.pop((10, 20)) < 260  # of short side 11, too, which the long side does not allow
    assert all(60 < count < 140 for count in counts.values())


def test_a_crop_of_the_images_own_size_is_the_image():
    example = scene(3, (30, 40))
    found, _ = seen(example, Crop(size=(30, 40), short_side=(30, 30), long_side=40), (0.0, 0.0, 0.0), 50)
    assert off(found.image_HW3, example.image_HW3) == 0
    assert_same(found, example)


@pytest.mark.parametrize("name", odd((9, 13)))
@pytest.mark.parametrize("size", [(4, 4), (9, 13), (40, 30)])
def test_odd_images_are_borne(name: str, size: tuple[int, int]):
    example = odd((9, 13))[name]
    for short in (1, 3, 9, 30):
        for share in (0.0, 0.5, 1.0):
            crop = Crop(size=size, short_side=(short, short), long_side=50)
            found, (_, *corner) = seen(example, crop, (share,) * 3)
            assert_same(found, slow_view(example, slow_scaled((9, 13), short, 50), tuple(corner), size))
            assert collate([found]).labels_BHW.shape == (1, *size)


def test_padding_is_void_and_counted_nowhere():
    example, crop = of_all_kinds((32, 48)), Crop(size=(40, 60), short_side=(16, 16), long_side=100)
    found = cropped(example, crop, np.random.default_rng(0), RADIUS)
    for outside in (np.s_[16:], np.s_[:, 24:]):
        assert (found.image_HW3[outside] == PADDING).all()
        assert not found.labels_HW[outside].any()
        assert (collate([found]).classes_BHW[0][outside] == -1).all()
    assert sum(s.area for s in found.segments) == (found.labels_HW > 0).sum()
    assert max(s.box[0] + s.box[2] for s in found.segments) == 24


def test_neither_the_border_of_the_image_nor_that_of_the_crop_is_an_edge():
    example = example_of(np.ones((20, 20)), [THING])
    for size in [(8, 8), (40, 40)]:
        found, _ = seen(example, Crop(size=size, short_side=(20, 20), long_side=20), (0.0, 0.5, 0.5))
        assert (found.d2_H2W == RADIUS**2).all()


def test_without_a_radius_there_are_no_distances():
    example = scene(0)
    assert cropped(example, SMALL, np.random.default_rng(0), 0).d2_H2W is None
    assert framed(example, Frame(size=(20, 50)), 0).d2_H2W is None
    assert framed(replace(example, d2_H2W=None), Frame(size=(20, 50)), 3).d2_H2W.max() <= 9


def test_over_255_segments_keep_their_labels():
    example = pixel_each((20, 30))
    wide, _ = seen(example, Crop(size=(40, 60), short_side=(40, 40), long_side=60), (0.0,) * 3)
    assert len(wide.segments) == 600
    assert {s.area for s in wide.segments} == {4}
    assert collate([wide]).labels_BHW.max() == 600
    half, (_, *corner) = seen(example, Crop(size=(10, 10), short_side=(10, 10), long_side=15), (0.0, 0.0, 1.0))
    assert_same(half, slow_view(example, (10, 15), tuple(corner), (10, 10)))
    assert [s.id for s in half.segments] == list(range(1, 101))


@pytest.mark.parametrize(
    ("size", "short", "long"), [((0, 4), (4, 4), 8), ((4, 4), (0, 4), 8), ((4, 4), (5, 4), 8), ((4, 4), (4, 9), 8)]
)
def test_a_crop_that_cannot_be_is_refused(size: tuple[int, int], short: tuple[int, int], long: int):
    with pytest.raises(TesseraError, match="crop"):
        Crop(size=size, short_side=short, long_side=long)


@pytest.fixture(scope="module")
def coco() -> list[Example]:
    if not COCO_MINI.exists():
        pytest.skip(f"needs {COCO_MINI}")
    index = read_index(COCO_MINI, "val2017")
    return [Example.of("", make_sample(record, index.labels, None, 0)) for record in index.records[:4]]


@pytest.mark.parametrize(("short", "shares"), [(64, (0, 0)), (333, (0.2, 0.9)), (640, (0.5, 0.5)), (1280, (1, 0.4))])
def test_crops_of_coco_are_what_resizing_all_then_cutting_gives(
    coco: list[Example], short: int, shares: tuple[float, float]
):
    crop = Crop(size=(640, 640), short_side=(short, short), long_side=2048)
    for example in coco:
        found, (_, *corner) = seen(example, crop, (0.0, *shares))
        scaled = scaled_size(example.labels_HW.shape, short, 2048)
        assert_same(found, slow_view(example, scaled, tuple(corner), (640, 640), resize_labels))


@pytest.mark.parametrize("frame", [Frame(size=(420, 420)), Frame(size=(512, 640), keep_aspect=True)], ids=str)
def test_framed_examples_of_coco_are_what_evaluation_sees(coco: list[Example], frame: Frame):
    for example in coco:
        found = framed(example, frame, RADIUS)
        assert_same(found, slow_view(example, frame.inner(example.labels_HW.shape), (0, 0), frame.size, resize_labels))
