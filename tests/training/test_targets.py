import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from infra.errors import TesseraError
from preprocessing.kernels import squared_distance
from preprocessing.panoptic_map import Segment, measured
from preprocessing.sample import instance_groups, semantic_groups
from preprocessing.synthetic import CATEGORIES, STUFF
from tests.support.examples import BOX, DISK, RADIUS, batch_of, example_of, odd, of_all_kinds, scenes
from tests.support.label_maps import squared_distances
from training.batch import VOID as NONE
from training.batch import Example
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.targets import (
    eds_maps,
    eds_weight,
    embed,
    embed_xy,
    encode,
    instance_targets,
    omegas,
    semantic_targets,
)

VOID, SKY, CROWD, FIELD, THING = (np.s_[4, 4], np.s_[4, 28], np.s_[28, 4], np.s_[17, 30], np.s_[24, 24])
"""A pixel of each kind in `of_all_kinds`."""

CONFIGS = {
    "embedding": GeneralistConfig(eds_distance=4.0),
    "embedding, half period": GeneralistConfig(frequencies=2, half_period=True, eds_distance=6.5, eds_min=0.25),
    "embedding, without void": GeneralistConfig(frequencies=5, eds_distance=4.0, void_kept=False),
    "embedding, panoptic": GeneralistConfig(eds_distance=20.0, boundaries="panoptic", eds_min=0.1),
    "direct": GeneralistConfig(encoding="direct", eds_distance=4.0),
    "direct, without EDS": GeneralistConfig(encoding="direct", eds_distance=0.0, eds_min=0.3, void_kept=False),
    "classes": GeneralistConfig(encoding="classes", eds_distance=1.5),
    "classes, few": GeneralistConfig(
        encoding="classes", cells=7, eds_distance=4.0, boundaries="panoptic", void_kept=False
    ),
    "classes, one": GeneralistConfig(encoding="classes", cells=1, eds_min=1.0),
}
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@dataclass(frozen=True)
class Slow:
    """Targets of one example by loops in float64: rows of the segment table, then pixels."""

    codes_NX: np.ndarray
    classes_HW: np.ndarray
    semantic_HW: np.ndarray
    instance_HW: np.ndarray


def slow_share(example: Example, row: int) -> tuple[float, float]:
    """Centroid of a segment's pixels, 0 and 1 at the image's outer edges."""
    ys, xs = np.nonzero(example.labels_HW == row)
    height, width = example.labels_HW.shape
    return (xs.mean() + 0.5) / width, (ys.mean() + 0.5) / height


def slow_code(x: float, y: float, frequencies: int, base: float) -> list[float]:
    half = [
        [function(2**k * base * position) for function in (math.sin, math.cos) for k in range(frequencies)]
        for position in (x, y)
    ]
    return half[0] + half[1]


def slow_row(example: Example, row: int, config: GeneralistConfig) -> list[float]:
    thing = row > 0 and example.segments[row - 1].is_thing and not example.segments[row - 1].is_crowd
    share = slow_share(example, row) if thing else (0.0, 0.0)
    if config.encoding == "direct":
        return [*share, 1.0] if thing else [0.0] * 3
    if config.encoding == "classes":
        # a centroid on the border of two cells may fall to either side of it
        return [share[0] * config.cells, share[1] * config.cells] if thing else [config.cells + 0.5] * 2
    base = math.pi / 2 if config.half_period else math.pi
    if not thing:
        return [0.0] * 4 * config.frequencies
    return slow_code(2 * share[0] - 1, 2 * share[1] - 1, config.frequencies, base)


def slow_weights(groups_HW: np.ndarray, config: GeneralistConfig) -> np.ndarray:
    result = np.ones(groups_HW.shape)
    if config.eds_distance:
        for at, d2 in np.ndenumerate(squared_distances(groups_HW, RADIUS)):
            near = math.exp(-float(d2) / config.eds_distance**2)
            result[at] = config.eds_min + (1 - config.eds_min) * near
    return result


def slow(example: Example, config: GeneralistConfig) -> Slow:
    kinds = [None, *example.segments]
    classes_HW = np.zeros(example.labels_HW.shape, int)
    instances_HW, kept_HW = np.zeros_like(classes_HW), np.ones_like(classes_HW)
    for at, label in np.ndenumerate(example.labels_HW):
        segment = kinds[label]
        classes_HW[at] = NONE if segment is None else segment.category
        instances_HW[at] = label if segment and segment.is_thing else 0
        thing = segment is not None and segment.is_thing and not segment.is_crowd
        crowd = segment is not None and segment.is_crowd
        kept_HW[at] = not crowd if config.void_kept else thing
    panoptic = config.boundaries == "panoptic"
    semantic_HW = slow_weights(example.labels_HW if panoptic else classes_HW, config)
    instance_HW = slow_weights(example.labels_HW if panoptic else instances_HW, config)
    codes = [slow_row(example, row, config) for row in range(len(kinds))]
    return Slow(np.array(codes), classes_HW, semantic_HW * (classes_HW != NONE), instance_HW * kept_HW)


def configs():
    return [GeneralistConfig(frequencies=count, half_period=half) for count in range(1, 6) for half in (False, True)]


def named(config: GeneralistConfig) -> str:
    return f"L{config.frequencies}-{'half' if config.half_period else 'full'}"


@pytest.mark.parametrize("config", configs(), ids=named)
def test_a_code_is_the_formula(config: GeneralistConfig):
    points_N2 = torch.rand(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    base = math.pi / 2 if config.half_period else math.pi
    expected = torch.tensor(
        [slow_code(*point, config.frequencies, base) for point in points_N2.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(embed_xy(points_N2, omegas(config)), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(embed_xy(points_N2.float(), omegas(config)), expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", configs(), ids=named)
def test_every_code_of_a_coordinate_has_the_squared_norm_L(config: GeneralistConfig):
    codes_ND = embed(torch.linspace(-1, 1, 401), omegas(config))
    torch.testing.assert_close(codes_ND.square().sum(-1), torch.full((401,), float(config.frequencies)))


@pytest.mark.parametrize("config", configs(), ids=named)
def test_the_two_borders_have_one_code_unless_the_period_is_halved(config: GeneralistConfig):
    left, right = embed(torch.tensor([-1.0, 1.0], dtype=torch.float64), omegas(config))
    distance = (left - right).norm()
    assert (distance > 1.9) if config.half_period else (distance < 1e-12)


@pytest.mark.parametrize("minimum", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("distance", [0.5, 8.0, 20.0])
def test_the_weight_of_a_distance_is_the_formula(distance: float, minimum: float):
    weights = eds_weight(torch.arange(2500, dtype=torch.int32), distance, minimum)
    expected = [minimum + (1 - minimum) * math.exp(-d2 / distance**2) for d2 in range(2500)]
    torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("minimum", [0.0, 0.25])
def test_distance_0_switches_the_weights_off_and_needs_no_distances(minimum: float):
    config = GeneralistConfig(eds_distance=0.0, eds_min=minimum)
    batch = replace(batch_of(of_all_kinds()), d2_BH2W=None)
    assert all(torch.equal(found, torch.ones(1, 32, 32)) for found in eds_maps(batch, config))


def test_a_batch_without_distances_is_refused_by_its_samples():
    batch = replace(batch_of(of_all_kinds()), d2_BH2W=None)
    with pytest.raises(TesseraError, match="samples 1: EDS needs distances"):
        eds_maps(batch, CONFIGS["embedding"])


@pytest.mark.parametrize("distance", [0.5, 8.0, 20.0])
def test_beyond_the_stated_radius_no_weight_shows_in_8_bits(distance: float):
    config = GeneralistConfig(eds_distance=distance)
    at, before = (torch.tensor([(share * config.distance_radius) ** 2]) for share in (1.0, 0.9))
    assert eds_weight(at, distance, 0) * 255 < 0.5 < eds_weight(before, distance, 0) * 255


def mixed() -> list[Example]:
    return [*scenes(5, (20, 28)), of_all_kinds((20, 28)), *odd((20, 28)).values()]


@all_configs
def test_targets_equal_loops_over_segments_and_pixels(config: GeneralistConfig):
    examples = mixed()
    batch = batch_of(*examples)
    semantic, instance = semantic_targets(batch, config), instance_targets(batch, config)
    for b, example in enumerate(examples):
        expected = slow(example, config)
        assert np.array_equal(semantic.classes_BHW[b].numpy(), expected.classes_HW)
        assert semantic.weight_BHW[b].numpy() == pytest.approx(expected.semantic_HW, abs=1e-6)
        assert instance.weight_BHW[b].numpy() == pytest.approx(expected.instance_HW, abs=1e-6)
        found_NX = instance.codes_BNX[b].numpy()
        if config.encoding == "classes":
            above_NX = expected.codes_NX - found_NX[: len(expected.codes_NX)]
            assert ((above_NX >= -1e-4) & (above_NX < 1 + 1e-4)).all()
        else:
            assert found_NX[: len(expected.codes_NX)] == pytest.approx(expected.codes_NX, abs=1e-5)
        for y, x in np.ndindex(example.labels_HW.shape):
            assert np.array_equal(instance.dense_BXHW[b, :, y, x].numpy(), found_NX[example.labels_HW[y, x]])


@all_configs
def test_targets_have_the_types_that_losses_expect(config: GeneralistConfig):
    batch = batch_of(*mixed())
    semantic, instance = semantic_targets(batch, config), instance_targets(batch, config)
    assert semantic.classes_BHW.dtype == torch.int64
    assert semantic.weight_BHW.dtype == instance.weight_BHW.dtype == torch.float32
    codes = torch.int64 if config.encoding == "classes" else torch.float32
    assert instance.codes_BNX.dtype == instance.dense_BXHW.dtype == codes
    channels = 2 if config.encoding == "classes" else config.instance_channels
    assert instance.dense_BXHW.shape == (len(batch.keys), channels, 20, 28)


def grid_map(numbers: list[int]) -> Example:
    """6 x 8 blocks of 2 x 3 pixels: void, each stuff category once, things side by side, a crowd."""
    stuff = [Segment(0, CATEGORIES.names.index(name), False) for name in STUFF]
    rows = [*stuff, *[Segment(0, category, True) for category in (DISK, DISK, DISK, BOX)]]
    rows.append(Segment(0, DISK, True, is_crowd=True))
    blocks = np.array(numbers).reshape(6, 8)
    present = np.unique(blocks[blocks > 0])
    labels_HW = np.where(blocks > 0, np.searchsorted(present, blocks) + 1, 0).repeat(2, 0).repeat(3, 1)
    return example_of(labels_HW, [rows[i - 1] for i in present])


@given(st.lists(st.integers(0, 8), min_size=48, max_size=48))
def test_the_smaller_of_the_two_distances_is_that_to_any_edge_of_the_panoptic_map(numbers: list[int]):
    example = grid_map(numbers)
    each = np.arange(len(example.segments) + 1, dtype=np.uint16)
    d2_HW = squared_distance(example.labels_HW, each, RADIUS)
    assert np.array_equal(example.d2_H2W.min(axis=1), d2_HW)
    for distance in (0.0, 3.0):
        config = GeneralistConfig(boundaries="panoptic", eds_distance=distance, eds_min=0.2)
        weights = eds_weight(torch.from_numpy(d2_HW.astype(np.int32)), distance or 1.0, 0.2)
        expected = weights if distance else torch.ones_like(weights)
        for found in eds_maps(batch_of(example), config):
            assert torch.equal(found[0], expected)


def test_the_tasks_own_edges_are_fewer_than_the_panoptic_ones():
    """Two disks that touch are one category, and sky and field are both no thing."""
    batch = batch_of(grid_map([4, 5, 1, 2, 0, 0, 1, 1] * 6))
    own, panoptic = (
        eds_maps(batch, GeneralistConfig(boundaries=kind, eds_distance=4.0)) for kind in ("task", "panoptic")
    )
    for mine, theirs in zip(own, panoptic, strict=True):
        assert (theirs >= mine).all()
        assert (theirs > mine).any()
    assert torch.equal(*panoptic)


def instance_of(example: Example, config: GeneralistConfig):
    return instance_targets(batch_of(example), config)


def test_void_stuff_and_crowds_have_the_zero_code():
    embedding_XHW = instance_of(of_all_kinds(), CONFIGS["embedding"]).dense_BXHW[0]
    assert [float(embedding_XHW[:, *at].norm()) for at in (VOID, SKY, CROWD, FIELD)] == [0, 0, 0, 0]
    assert float(embedding_XHW[:, *THING].square().sum()) == pytest.approx(8)


def test_the_direct_encoding_says_where_the_centroid_is_and_that_there_is_one():
    """The thing covers rows and columns 20 to 27 of 32, so its centroid lies at 24 / 32."""
    direct_XHW = instance_of(of_all_kinds(), CONFIGS["direct"]).dense_BXHW[0]
    assert not any(direct_XHW[:, *at].any() for at in (VOID, SKY, CROWD, FIELD))
    assert direct_XHW[:, *THING].tolist() == [0.75, 0.75, 1.0]


def test_the_class_beyond_all_cells_is_void_stuff_and_crowds():
    cells_XHW = instance_of(of_all_kinds(), CONFIGS["classes"]).dense_BXHW[0]
    assert [cells_XHW[:, *at].tolist() for at in (VOID, SKY, CROWD, FIELD)] == [[80, 80]] * 4
    assert cells_XHW[:, *THING].tolist() == [60, 60]


@pytest.mark.parametrize("cells", [1, 2, 80])
def test_centroids_on_the_borders_of_the_image_fall_into_its_first_and_last_cells(cells: int):
    config = GeneralistConfig(encoding="classes", cells=cells)
    corners = torch.tensor([[[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]]])
    found = encode(corners, torch.tensor([[True, True, True, False]]), config)
    assert found[0].tolist() == [[0, 0], [cells - 1, cells - 1], [0, cells - 1], [cells, cells]]


@given(st.floats(-1, 1, width=32), st.floats(-1, 1, width=32), st.integers(1, 200))
def test_a_cells_middle_is_within_half_a_cell_of_the_centroid(x: float, y: float, cells: int):
    config = GeneralistConfig(encoding="classes", cells=cells)
    found = encode(torch.tensor([[[x, y]]]), torch.tensor([[True]]), config)[0, 0]
    for cell, position in zip(found.tolist(), (x, y), strict=True):
        assert abs((2 * cell + 1) / cells - 1 - position) <= 1 / cells + 1e-6


@pytest.mark.parametrize("encoding", ["embedding", "direct", "classes"])
def test_padding_rows_of_the_table_are_no_instances(encoding: str):
    config = GeneralistConfig(encoding=encoding)
    batch = batch_of(of_all_kinds(), *odd((32, 32)).values())
    codes_BNX = instance_targets(batch, config).codes_BNX
    nothing = config.cells if encoding == "classes" else 0
    assert (codes_BNX[~batch.thing_BN] == nothing).all()
    assert (~batch.thing_BN).sum() > len(batch.keys)


def test_the_semantic_task_ignores_void_and_knows_crowds():
    found = semantic_targets(batch_of(of_all_kinds()), CONFIGS["embedding"])
    assert found.classes_BHW[0][VOID] == NONE
    assert found.classes_BHW[0][CROWD] == BOX
    assert not found.weight_BHW[found.classes_BHW == NONE].any()
    assert found.weight_BHW[found.classes_BHW != NONE].all()


@pytest.mark.parametrize("encoding", ["embedding", "direct", "classes"])
def test_the_instance_task_ignores_crowds_and_keeps_void(encoding: str):
    example = of_all_kinds()
    weight_HW = instance_of(example, GeneralistConfig(encoding=encoding, eds_distance=4.0)).weight_BHW[0]
    assert not weight_HW[torch.from_numpy(example.labels_HW == 2)].any()
    near_HW = eds_weight(torch.from_numpy(example.d2_H2W[:, 1]), 4.0, 0)
    void_HW = torch.from_numpy(example.labels_HW == 0)
    assert torch.equal(weight_HW[void_HW], near_HW[void_HW])
    assert weight_HW[void_HW].max() == 1  # beside the crowd


@pytest.mark.parametrize("encoding", ["embedding", "direct", "classes"])
@pytest.mark.parametrize("distance", [0.0, 4.0])
def test_left_out_only_things_that_are_no_crowds_have_a_weight(encoding: str, distance: float):
    example = of_all_kinds()
    config = GeneralistConfig(encoding=encoding, void_kept=False, eds_distance=distance)
    kept, left = (instance_of(example, c) for c in (replace(config, void_kept=True), config))
    thing_HW = torch.from_numpy(example.labels_HW == 4)
    assert torch.equal(left.weight_BHW[0], kept.weight_BHW[0] * thing_HW)
    assert left.weight_BHW[0][thing_HW].all()
    assert torch.equal(left.dense_BXHW, kept.dense_BXHW)


def mirrored_code(dense_BXHW: Tensor, config: GeneralistConfig) -> Tensor:
    """What the mirror makes of codes: u = x changes sign."""
    if config.encoding == "embedding":
        count = config.frequencies
        sign_X = torch.tensor([-1.0] * count + [1.0] * 3 * count)  # sin(-a) = -sin(a), in the half of u
        return dense_BXHW * sign_X[:, None, None]
    u, *rest = dense_BXHW.unbind(1)
    last = config.cells - 1
    turned = (1 - u) * rest[-1] if config.encoding == "direct" else torch.where(u <= last, last - u, u)
    return torch.stack([turned, *rest], 1)


@all_configs
def test_targets_of_a_mirrored_example_are_the_mirrored_targets(config: GeneralistConfig):
    examples = [*scenes(8, (20, 29)), of_all_kinds((20, 29))]
    plain, mirrored = batch_of(*examples), batch_of(*(e.flipped() for e in examples))
    for before, after in zip(
        (semantic_targets(plain, config), instance_targets(plain, config)),
        (semantic_targets(mirrored, config), instance_targets(mirrored, config)),
        strict=True,
    ):
        assert torch.equal(after.weight_BHW, before.weight_BHW.flip(-1))
    classes = [semantic_targets(batch, config).classes_BHW for batch in (plain, mirrored)]
    assert torch.equal(classes[1], classes[0].flip(-1))
    dense, turned = (instance_targets(batch, config).dense_BXHW for batch in (plain, mirrored))
    difference = (turned - mirrored_code(dense.flip(-1), config)).abs()
    # a centroid on the border of two cells falls to one side of it either way
    assert difference.max() <= (1 if config.encoding == "classes" else 1e-5)
    assert difference.float().mean() < 0.05


def test_stored_distances_are_exact_after_mirroring():
    for example in scenes(8, (20, 29)):
        mirrored = example.flipped()
        labels_HW = np.ascontiguousarray(mirrored.labels_HW)
        for groups, stored in (
            (semantic_groups, mirrored.d2_H2W[:, 0]),
            (instance_groups, mirrored.d2_H2W[:, 1]),
        ):
            assert np.array_equal(squared_distance(labels_HW, groups(mirrored.segments), RADIUS), stored)


def test_the_table_of_a_mirrored_example_is_that_of_its_pixels():
    for example in scenes(8, (20, 29)):
        mirrored = example.flipped()
        rows = measured(np.ascontiguousarray(mirrored.labels_HW), example.segments)
        assert [s.centroid for s in mirrored.segments] == [s.centroid and pytest.approx(s.centroid) for s in rows]
        assert [s.box for s in mirrored.segments] == [s.box for s in rows]


def test_mirroring_twice_changes_nothing():
    for example in scenes(4, (20, 29)):
        again = example.flipped().flipped()
        assert np.array_equal(again.image_HW3, example.image_HW3)
        assert [s.centroid and pytest.approx(s.centroid) for s in example.segments] == [
            s.centroid for s in again.segments
        ]
