"""From centres, offsets and classes to panoptic maps, against loops written from the paper's description."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infra.errors import TesseraError
from preprocessing.geometry import Frame
from preprocessing.panoptic_map import PanopticMap
from preprocessing.synthetic import CATEGORIES
from tests.support.examples import DISK, FIELD, SKY, batch_of, odd, of_all_kinds, scenes
from tests.training.test_assemble import same_maps
from training.methods.panoptic_deeplab.config import DecodeConfig
from training.methods.panoptic_deeplab.decode import (
    decode,
    decode_on_device,
    decode_on_host,
    find_centres,
    heat_picture,
    nearest_centres,
    nearest_centres_on_device,
    offset_picture,
)
from training.parts.assemble import NO_INSTANCE, Assembly, certain
from training.recipes.panoptic_deeplab import debug

ASSEMBLY = Assembly(CATEGORIES)
Outputs = tuple[Tensor, Tensor, Tensor]
Place = tuple[int, int]


def config_of(**options) -> DecodeConfig:
    return DecodeConfig(**{"threshold": 0.25, "window": 3, "min_stuff_area": 0.0, **options})


def slow_peaks(heat_HW: np.ndarray, config: DecodeConfig) -> dict[Place, float]:
    """Over the threshold and the highest of their window, in reading order."""
    reach = config.window // 2
    peaks = {}
    for (y, x), score in np.ndenumerate(heat_HW):
        around = heat_HW[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
        if score > config.threshold and score == around.max():
            peaks[y, x] = score
    return peaks


def slow_centres(heat_HW: np.ndarray, config: DecodeConfig) -> list[Place]:
    """The best of the map's peaks; of peaks side by side with the same score the first one."""
    peaks = slow_peaks(heat_HW, config)
    firsts: list[Place] = []
    seen: set[Place] = set()
    for place in peaks:
        if place not in seen:
            firsts.append(place)
        plateau = [place]
        while plateau:
            y, x = plateau.pop()
            if (y, x) not in seen:
                seen.add((y, x))
                beside = [(y + v, x + u) for v in (-1, 0, 1) for u in (-1, 0, 1)]
                plateau += [at for at in beside if peaks.get(at) == peaks[y, x]]
    best = sorted(firsts, key=lambda place: -peaks[place])[: config.most]
    return sorted(best)


def found_centres(heat_HW: np.ndarray, config: DecodeConfig) -> list[Place]:
    found = find_centres(torch.from_numpy(heat_HW), config)
    assert found.dtype == np.float32
    assert found.shape[1:] == (2,)
    return [(int(y), int(x)) for y, x in found]


sides = st.tuples(st.integers(1, 14), st.integers(1, 14))
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=150, deadline=None)
@given(seeds, sides, st.sampled_from([3, 5, 7, 41]), st.sampled_from([1, 2, 5, 200]), st.floats(0, 1.2))
def test_centres_of_different_scores_are_those_of_the_slow_definition(seed, size, window, most, threshold):
    heat_HW = np.random.default_rng(seed).permutation(size[0] * size[1]).reshape(size).astype(np.float32)
    heat_HW /= size[0] * size[1]
    config = config_of(window=window, most=most, threshold=threshold)
    assert found_centres(heat_HW, config) == slow_centres(heat_HW, config)


@settings(max_examples=150, deadline=None)
@given(seeds, sides, st.sampled_from([3, 5, 41]), st.integers(2, 6), st.sampled_from([1, 3, 10_000]))
def test_every_plateau_has_one_centre_whatever_its_shape(seed, size, window, levels, most):
    """Maps of few scores are full of them; of equal scores the first are the best."""
    heat_HW = (np.random.default_rng(seed).integers(0, levels, size) / (levels - 1)).astype(np.float32)
    config = config_of(window=window, most=most)
    assert found_centres(heat_HW, config) == slow_centres(heat_HW, config)


def plateau(*rows: str) -> np.ndarray:
    """Rows of # and ., with a margin of 2."""
    drawn = np.array([[c == "#" for c in row] for row in rows], np.float32)
    return np.pad(drawn, 2)


def disk(radius: int) -> np.ndarray:
    y, x = np.mgrid[-radius - 2 : radius + 3, -radius - 2 : radius + 3]
    return (y**2 + x**2 <= radius**2).astype(np.float32)


PLATEAUS = {
    "pixel": plateau("#"),
    "row": plateau("#" * 12),
    "column": plateau(*"#" * 12),
    "square": plateau(*["####"] * 4),
    "falling diagonal": np.pad(np.eye(9, dtype=np.float32), 2),
    "rising diagonal": np.pad(np.eye(9, dtype=np.float32)[::-1], 2),
    "diamond": plateau("..#..", ".###.", "#####", ".###.", "..#.."),
    "L": plateau("#...", "#...", "####"),
    "turned L": plateau("####", "#...", "#..."),
    "mirrored, turned L": plateau("####", "...#", "...#"),
    "small disk": disk(2),
    "everything": np.ones((9, 9), np.float32),
    "T, upside down": plateau("..#..", "#####"),
    "mirrored L": plateau("...#", "...#", "####"),
    "disk": disk(3),
    "large disk": disk(7),
    "flat bar, rising": plateau("....####", "####...."),
    "U": plateau("#.#", "###"),
}


@pytest.mark.parametrize("window", [3, 7, 41])
@pytest.mark.parametrize("heat_HW", PLATEAUS.values(), ids=PLATEAUS)
def test_a_plateau_has_one_centre_its_first_pixel(heat_HW: np.ndarray, window: int):
    first = tuple(int(i) for i in np.argwhere(heat_HW)[0])
    assert found_centres(heat_HW, config_of(window=window)) == [first]
    assert slow_centres(heat_HW, config_of(window=window)) == [first]


def test_equal_peaks_apart_from_each_other_both_count_inside_one_window():
    heat_HW = np.zeros((5, 9), np.float32)
    heat_HW[1, 1] = heat_HW[1, 3] = heat_HW[3, 7] = 0.75
    assert found_centres(heat_HW, config_of(window=9)) == [(1, 1), (1, 3), (3, 7)]


@pytest.mark.parametrize(("window", "count"), [(3, 3), (5, 3), (7, 2), (9, 1), (41, 1)])
def test_a_lower_peak_counts_from_half_a_window_away(window: int, count: int):
    heat_HW = np.zeros((1, 12), np.float32)
    heat_HW[0, 0], heat_HW[0, 4], heat_HW[0, 7] = 0.7, 0.8, 0.5
    assert len(found_centres(heat_HW, config_of(window=window))) == count
    assert len(found_centres(heat_HW.T.copy(), config_of(window=window))) == count


def test_a_score_of_the_threshold_is_no_centre():
    heat_HW = np.zeros((3, 9), np.float32)
    heat_HW[1, 1], heat_HW[1, 4], heat_HW[1, 7] = 0.25, np.nextafter(np.float32(0.25), np.float32(1)), 0.1
    assert found_centres(heat_HW, config_of()) == [(1, 4)]
    assert found_centres(heat_HW[:, 6:], config_of(threshold=0.1)) == []


@pytest.mark.parametrize("value", [0.0, -1.0, 0.25, -math.inf])
def test_a_map_without_a_peak_has_no_centre(value: float):
    assert found_centres(np.full((4, 5), value, np.float32), config_of()) == []


def test_the_best_centres_are_kept_in_reading_order():
    heat_HW = np.zeros((7, 7), np.float32)
    heat_HW[::2, ::2] = np.array([[5, 3, 9, 1], [14, 2, 4, 8], [6, 16, 7, 10], [11, 13, 15, 12]])
    kept = {most: found_centres(heat_HW, config_of(most=most)) for most in (1, 3, 5, 16, 17)}
    assert kept[1] == [(4, 2)]
    assert kept[3] == [(2, 0), (4, 2), (6, 4)]
    assert kept[5] == [(2, 0), (4, 2), (6, 2), (6, 4), (6, 6)]
    assert kept[16] == kept[17] == [(y, x) for y in range(0, 7, 2) for x in range(0, 7, 2)]


def slow_nearest(offset_2HW: np.ndarray, thing_HW: np.ndarray, centres: list[Place]) -> np.ndarray:
    found_HW = np.full(thing_HW.shape, NO_INSTANCE)
    for y, x in np.argwhere(thing_HW):
        to = y + float(offset_2HW[0, y, x]), x + float(offset_2HW[1, y, x])
        away = [(to[0] - v) ** 2 + (to[1] - u) ** 2 for v, u in centres]
        found_HW[y, x] = away.index(min(away)) if away else NO_INSTANCE
    return found_HW


def both_nearest(offset_2HW: np.ndarray, thing_HW: np.ndarray, centres: list[Place]) -> np.ndarray:
    centre_K2 = np.array(centres, np.float32).reshape(-1, 2)
    host_HW = nearest_centres(offset_2HW, thing_HW, centre_K2)
    on_device_HW = nearest_centres_on_device(torch.from_numpy(offset_2HW), torch.from_numpy(thing_HW), centre_K2)
    assert np.array_equal(on_device_HW, host_HW)
    assert host_HW.dtype == np.int32
    return host_HW


@settings(max_examples=150, deadline=None)
@given(seeds, sides, st.integers(0, 6), st.sampled_from([1, 2, 8]))
def test_pixels_belong_to_the_nearest_centre_and_the_first_of_equals(seed, size, count, parts):
    """Offsets of few decimals: float32 computes without rounding, and many distances are equal."""
    rng = np.random.default_rng(seed)
    offset_2HW = (rng.integers(-12 * parts, 12 * parts, (2, *size)) / parts).astype(np.float32)
    thing_HW = rng.random(size) < rng.random() * 1.5
    centres = [(int(rng.integers(size[0])), int(rng.integers(size[1]))) for _ in range(count)]
    assert np.array_equal(both_nearest(offset_2HW, thing_HW, centres), slow_nearest(offset_2HW, thing_HW, centres))


@settings(max_examples=100, deadline=None)
@given(seeds, sides, st.integers(0, 40), st.floats(0, 6))
def test_both_paths_find_the_same_centre_of_any_offset(seed, size, count, scale):
    rng = np.random.default_rng(seed)
    offset_2HW = (10**scale * rng.normal(size=(2, *size))).astype(np.float32)
    centres = [(int(rng.integers(2048)), int(rng.integers(2048))) for _ in range(count)]
    found_HW = both_nearest(offset_2HW, np.ones(size, bool), centres)
    assert found_HW.max() < max(count, 1)
    assert (found_HW >= 0).all() == (count > 0)


def slow_decode(outputs: Outputs, config: DecodeConfig) -> list[list[list[tuple]]]:
    """Of the whole grid of each image: (class, which centre) of things, (class,) of stuff, () of void."""
    found = []
    for logits, heat, offset in zip(*(t.float().numpy() for t in outputs), strict=True):
        classes_HW = np.array([[logits[:, y, x].argmax() for x in range(heat.shape[2])] for y in range(heat.shape[1])])
        thing_HW = CATEGORIES.is_thing[classes_HW]
        instances_HW = slow_nearest(offset, thing_HW, slow_centres(heat[0], config))
        votes = {k: Counter(sorted(classes_HW[instances_HW == k].tolist())) for k in np.unique(instances_HW)}
        area = Counter(classes_HW.flatten().tolist())
        names: list[list[tuple]] = [[()] * classes_HW.shape[1] for _ in classes_HW]
        for (y, x), category in np.ndenumerate(classes_HW):
            k = int(instances_HW[y, x])
            if k != NO_INSTANCE:
                names[y][x] = (votes[k].most_common(1)[0][0], k)
            elif not thing_HW[y, x] and area[category] >= config.min_stuff_area * classes_HW.size:
                names[y][x] = (int(category),)
        found.append(names)
    return found


def assert_named(found: PanopticMap, names: list[list[tuple]]) -> None:
    """The same pixels together, with the same class; the table lists what is there."""
    category = {s.id: s.category for s in found.segments}
    named: dict[int, tuple] = {}
    for (y, x), label in np.ndenumerate(found.ids):
        assert (label == 0) == (names[y][x] == ())
        assert named.setdefault(int(label), names[y][x]) == names[y][x]
        assert label == 0 or category[int(label)] == names[y][x][0]
    assert len(set(named.values())) == len(named)
    assert category.keys() == named.keys() - {0}
    assert all(s.is_thing == (len(named[s.id]) == 2) for s in found.segments)


def drawn(kind: str, seed: int, images: int, size: tuple[int, int] = (16, 20)) -> Outputs:
    """Ideal outputs of scenes, noisier and noisier; scores all differ but in the ideal ones."""
    rng = torch.Generator().manual_seed(seed % 2**31)
    examples = [*scenes(images, size, seed % 1000)]
    logits, heat, offset = debug().build(CATEGORIES).ideal(batch_of(*examples))
    amount = {"ideal": 0.0, "noisy": 0.3, "random": 30.0}[kind]
    noise = [amount * torch.randn(t.shape, generator=rng) for t in (logits, heat, offset)]
    return logits + 8 * noise[0], heat + 0.2 * noise[1], offset + 3 * noise[2]


def in_half(outputs: Outputs) -> Outputs:
    logits, heat, offset = (t.bfloat16() for t in outputs)
    return logits, heat, offset


KINDS = pytest.mark.parametrize("kind", ["ideal", "noisy", "random"])


@KINDS
@pytest.mark.parametrize("few", [False, True], ids=["any", "few"])
def test_decoding_is_what_the_paper_describes(kind: str, few: bool):
    outputs = drawn(kind, 3, 8)
    config = config_of(window=7, most=3, min_stuff_area=0.15) if few else config_of()
    assembly = Assembly(CATEGORIES, min_stuff_area=config.min_stuff_area)
    found = decode(*outputs, [(16, 20)] * 8, assembly, config)
    for panoptic, names in zip(found, slow_decode(outputs, config), strict=True):
        assert_named(panoptic, names)
    assert {s.is_thing for panoptic in found for s in panoptic.segments} == {True, False}


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from(["ideal", "noisy", "random"]), st.booleans(), st.booleans(), st.floats(0, 0.3))
def test_both_paths_give_the_same_maps(seed, kind, half, keep_aspect, least):
    outputs = drawn(kind, seed, 3)
    logits, heat, offset = in_half(outputs) if half else outputs
    sizes = [(16, 20), (7, 91), (1, 1)]
    assembly = Assembly(CATEGORIES, keep_aspect, least)
    centres = [find_centres(heat_1HW[0].float(), config_of(most=12)) for heat_1HW in heat]
    arguments = logits, offset.float(), centres, sizes, assembly
    maps = decode_on_host(*arguments)
    assert [panoptic.size for panoptic in maps] == sizes
    assert same_maps(maps, decode_on_device(*arguments))


SIZES = [(16, 20), (1, 1), (1, 50), (50, 1), (5, 91), (160, 20), (33, 17), (3, 4)]


@KINDS
def test_on_a_frame_the_result_is_that_of_its_inner_part_alone(kind: str):
    logits, heat, offset = drawn(kind, 7, len(SIZES))
    framed = Assembly(CATEGORIES, keep_aspect=True, min_stuff_area=0.03)
    config = config_of(min_stuff_area=0.03, window=5)
    inner = [Frame(size=(16, 20), keep_aspect=True).inner(size) for size in SIZES]
    assert len(set(inner)) > 5
    for b, (height, width) in enumerate(inner):
        heat[b, :, height:] = heat[b, :, :, width:] = 50.0  # nothing may be found in the padding
    found = decode(logits, heat, offset, SIZES, framed, config)
    plain = Assembly(CATEGORIES, min_stuff_area=0.03)
    for b, (height, width) in enumerate(inner):
        part: Outputs = tuple(t[b : b + 1, :, :height, :width] for t in (logits, heat, offset))  # type: ignore[assignment]
        assert same_maps(found[b : b + 1], decode(*part, [SIZES[b]], plain, config))


def one_object(class_of: int = DISK, score: float = 0.9) -> Outputs:
    """A box of things in sky, with a centre of that score in the middle."""
    classes_BHW = torch.full((1, 8, 10), SKY)
    classes_BHW[:, 2:7, 3:8] = class_of
    heat = torch.zeros(1, 1, 8, 10)
    heat[0, 0, 4, 5] = score
    return certain(classes_BHW, len(CATEGORIES)), heat, torch.zeros(1, 2, 8, 10)


def test_thing_pixels_without_any_centre_are_void():
    for score, count in ((0.9, 25), (0.2, 0)):
        (found,) = decode(*one_object(score=score), [(8, 10)], ASSEMBLY, config_of())
        assert [s.area for s in found.segments if s.is_thing] == [count][: count > 0]
        assert (found.ids == 0).sum() == 25 - count


def test_a_centre_on_stuff_makes_no_segment():
    (found,) = decode(*one_object(FIELD), [(8, 10)], ASSEMBLY, config_of())
    assert {s.category: s.area for s in found.segments} == {SKY: 55, FIELD: 25}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("output", range(3), ids=["logits", "heat", "offset"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
def test_outputs_that_are_not_finite_are_refused_by_their_place(output: int, value: float, half: bool):
    """In the padding as well: it was computed as all the rest."""
    outputs = in_half(drawn("ideal", 1, 3)) if half else drawn("ideal", 1, 3)
    outputs[output][1, -1, -1, -1] = value
    with pytest.raises(TesseraError, match="image 1 of the batch: the network's output is not finite"):
        decode(*outputs, [(16, 20), (50, 1), (16, 20)], Assembly(CATEGORIES, True), config_of())


@KINDS
def test_bf16_outputs_decode_as_their_values_in_float32(kind: str):
    logits, heat, offset = halves = in_half(drawn(kind, 9, 3))
    sizes = [(16, 20), (30, 20), (5, 5)]
    maps = decode(*halves, sizes, ASSEMBLY, config_of())
    assert same_maps(maps, decode(logits.float(), heat.float(), offset.float(), sizes, ASSEMBLY, config_of()))


def test_ideal_outputs_of_odd_images_decode_to_what_they_hold():
    examples = [*odd((12, 14)).values(), of_all_kinds((12, 14))]
    method = debug().build(CATEGORIES)
    logits, heat, offset = method.ideal(batch_of(*examples))
    found = decode(logits, heat, offset, [(12, 14)] * 6, ASSEMBLY, config_of())
    areas = [sorted(s.area for s in panoptic.segments if s.is_thing) for panoptic in found]
    assert areas == [[], [], [168], [168], [1], sorted(s.area for s in examples[-1].segments if s.is_thing)]


def test_heat_is_black_at_0_and_white_at_1_and_beyond():
    heat_HW = torch.tensor([[-3.0, 0.0, 0.5, 1.0, 7.0]])
    for made in (heat_picture(heat_HW), heat_picture(heat_HW.bfloat16())):
        assert made.dtype == np.uint8
        assert made.shape == (1, 5, 3)
        assert made[0].tolist() == [[v] * 3 for v in (0, 0, 127, 255, 255)]


def test_offsets_are_white_where_there_is_none_and_coloured_by_direction():
    offset_2HW = torch.tensor([[[0.0, 0.0, 0.0, 9.0, 0.0]], [[0.0, 9.0, 4.5, 0.0, -9.0]]])
    for made in (offset_picture(offset_2HW), offset_picture(offset_2HW.bfloat16())):
        assert made.dtype == np.uint8
        assert made.shape == (1, 5, 3)
        assert made[0, 0].tolist() == [255] * 3
        assert made[0, 1].tolist() == [255, 63, 63]  # right is red
        assert made[0, 2].tolist() == [255, 159, 159]  # half as far, half as full
        assert len({*map(tuple, made[0].tolist())}) == 5
        assert (offset_picture(2 * offset_2HW) == made).all()
    assert (offset_picture(0 * offset_2HW) == 255).all()
