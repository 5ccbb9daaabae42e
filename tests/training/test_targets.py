import math

import numpy as np
import pytest
import torch

from preprocessing.kernels import squared_distance
from preprocessing.panoptic_map import measured
from preprocessing.sample import instance_groups, semantic_groups
from tests.support.examples import RADIUS, batch_of, of_all_kinds, scenes
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.targets import IGNORE, Targets, eds_weight, embed, embed_xy, make_targets, omegas

CONFIG = GeneralistConfig(eds_distance=4.0)
VOID, STUFF, CROWD, THING = (np.s_[4, 4], np.s_[4, 28], np.s_[28, 4], np.s_[24, 24])
"""A pixel of each kind in `of_all_kinds`."""


def slow_code(x: float, y: float, frequencies: int, base: float) -> list[float]:
    half = [
        [function(2**k * base * position) for function in (math.sin, math.cos) for k in range(frequencies)]
        for position in (x, y)
    ]
    return half[0] + half[1]


def configs():
    return [GeneralistConfig(frequencies=count, half_period=half) for count in range(1, 6) for half in (False, True)]


def named(config: GeneralistConfig) -> str:
    return f"L{config.frequencies}-{'half' if config.half_period else 'full'}"


def targets(*examples, config: GeneralistConfig = CONFIG) -> Targets:
    return make_targets(batch_of(*examples), config)


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
def test_distance_0_switches_the_weights_off(minimum: float):
    weights = eds_weight(torch.arange(9, dtype=torch.int32), 0, minimum)
    assert torch.equal(weights, torch.ones(9))


def test_beyond_the_stated_radius_no_weight_shows_in_8_bits():
    radius = torch.tensor([CONFIG.eds_radius**2])
    assert eds_weight(radius, CONFIG.eds_distance, 0) * 255 < 0.5


def test_dense_targets_equal_a_loop_over_pixels():
    examples = scenes(6, (20, 28))
    found = targets(*examples)
    for b, example in enumerate(examples):
        height, width = example.labels_HW.shape
        for y, x in np.ndindex(height, width):
            label = int(example.labels_HW[y, x])
            segment = example.segments[label - 1] if label else None
            code = np.zeros(16)
            if segment and segment.centroid:
                u, v = ((2 * c + 1) / n - 1 for c, n in zip(segment.centroid, (width, height), strict=True))
                code = np.array(slow_code(u, v, 4, math.pi))
            near = [math.exp(-float(m[y, x]) / 16) for m in (example.semantic_d2_HW, example.instance_d2_HW)]
            assert found.classes_BHW[b, y, x] == (segment.category if segment else IGNORE)
            assert found.embedding_BEHW[b, :, y, x].numpy() == pytest.approx(code, abs=1e-5)
            assert float(found.semantic_weight_BHW[b, y, x]) == pytest.approx(near[0] * bool(segment), abs=1e-6)
            weight = 0 if segment and segment.is_crowd else near[1]
            assert float(found.instance_weight_BHW[b, y, x]) == pytest.approx(weight, abs=1e-6)


def test_void_stuff_and_crowds_have_the_zero_code():
    embedding_EHW = targets(of_all_kinds()).embedding_BEHW[0]
    assert [float(embedding_EHW[:, *at].norm()) for at in (VOID, STUFF, CROWD)] == [0, 0, 0]
    assert float(embedding_EHW[:, *THING].square().sum()) == pytest.approx(8)


def test_the_semantic_task_ignores_void_and_knows_crowds():
    found = targets(of_all_kinds())
    assert found.classes_BHW[0][VOID] == IGNORE
    assert found.classes_BHW[0][CROWD] != IGNORE
    assert not found.semantic_weight_BHW[found.classes_BHW == IGNORE].any()
    assert found.semantic_weight_BHW[found.classes_BHW != IGNORE].all()


def test_the_instance_task_ignores_crowds_and_keeps_void():
    example = of_all_kinds()
    weight_HW = targets(example).instance_weight_BHW[0]
    assert not weight_HW[torch.from_numpy(example.labels_HW == 2)].any()
    near_HW = eds_weight(torch.from_numpy(example.instance_d2_HW.astype(np.int32)), 4.0, 0)
    void_HW = torch.from_numpy(example.labels_HW == 0)
    assert torch.equal(weight_HW[void_HW], near_HW[void_HW])
    assert weight_HW[void_HW].max() == 1  # beside the crowd


def test_targets_of_a_mirrored_example_are_the_mirrored_targets():
    examples = [*scenes(8, (20, 29)), of_all_kinds((20, 29))]
    plain, mirrored = targets(*examples), targets(*(e.flipped() for e in examples))
    for name in ("classes_BHW", "semantic_weight_BHW", "instance_weight_BHW"):
        assert torch.equal(getattr(mirrored, name), getattr(plain, name).flip(-1))
    sign_E = torch.tensor([-1.0] * 4 + [1.0] * 12)  # sin(-a) = -sin(a), in the half of u
    expected = plain.embedding_BEHW.flip(-1) * sign_E[:, None, None]
    torch.testing.assert_close(mirrored.embedding_BEHW, expected, atol=1e-5, rtol=0)


def test_stored_distances_are_exact_after_mirroring():
    for example in scenes(8, (20, 29)):
        mirrored = example.flipped()
        labels_HW = np.ascontiguousarray(mirrored.labels_HW)
        for groups, stored in (
            (semantic_groups, mirrored.semantic_d2_HW),
            (instance_groups, mirrored.instance_d2_HW),
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
