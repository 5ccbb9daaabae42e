from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.panoptic_map import PanopticMap, measured
from preprocessing.synthetic import CATEGORIES
from tests.support.examples import BOX, DISK, FIELD, SKY
from training.methods.generalist.config import DecodeConfig, GeneralistConfig
from training.methods.generalist.decode import NO_INSTANCE, assemble, group_votes, nearest_codes
from training.methods.generalist.targets import embed, embed_xy, omegas

GRIDS = [1, 2, 3, 5, 80]
SIZE = (12, 20)


def config_of(frequencies: int, half: bool, grid: int) -> GeneralistConfig:
    return GeneralistConfig(frequencies=frequencies, half_period=half, decode=DecodeConfig(grid=grid))


def centres(grid: int) -> torch.Tensor:
    return (2 * torch.arange(grid, dtype=torch.float64) + 1) / grid - 1


def embeddings(config: GeneralistConfig, count: int = 64) -> torch.Tensor:
    """(4 L, 4, count): noise, small noise, codes with noise, and what lies between a code and zero."""
    generator = torch.Generator().manual_seed(0)
    codes_ND = embed_xy(torch.rand(count, 2, generator=generator) * 2 - 1, omegas(config))
    noise = torch.randn(3, *codes_ND.shape, generator=generator)
    shares = torch.rand(count, 1, generator=generator)
    return torch.stack([2 * noise[0], 0.3 * noise[1], codes_ND + 0.3 * noise[2], shares * codes_ND]).permute(2, 0, 1)


@pytest.mark.parametrize("half", [False, True], ids=["full", "half"])
@pytest.mark.parametrize("frequencies", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("grid", GRIDS)
def test_no_code_is_nearer_than_the_chosen_one(grid: int, frequencies: int, half: bool):
    config = config_of(frequencies, half, grid)
    embedding_EHW = embeddings(config)
    votes_HW2, inside_HW = nearest_codes(embedding_EHW, config)
    cells_P2 = votes_HW2.flatten(0, 1).round().long().clamp(0, grid - 1)  # as group_votes reads them
    codes_GD = embed(centres(grid), omegas(config))
    y_P2D = embedding_EHW.double().flatten(1).T.unflatten(1, (2, -1))
    d2_2PG = torch.stack([(y_P2D[:, i, None] - codes_GD).square().sum(-1) for i in range(2)])
    d2_PGG = d2_2PG[0][:, :, None] + d2_2PG[1][:, None]  # every pair of cells, though they separate
    zero_P = y_P2D.square().sum((1, 2))
    chosen_P = torch.where(inside_HW.flatten(), d2_PGG[torch.arange(len(zero_P)), *cells_P2.T], zero_P)
    best_P = torch.minimum(d2_PGG.flatten(1).amin(1), zero_P)
    assert float((chosen_P - best_P).max()) <= 1e-5


@pytest.mark.parametrize("half", [False, True], ids=["full", "half"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_code_of_a_cells_centre_votes_for_the_centre(grid: int, half: bool):
    config = config_of(4, half, grid)
    u_GG, v_GG = torch.meshgrid(centres(grid), centres(grid), indexing="xy")
    embedding = embed_xy(torch.stack([u_GG, v_GG], -1), omegas(config)).permute(2, 0, 1)
    votes_GG2, inside_GG = nearest_codes(embedding, config)
    cells = torch.arange(grid).float()
    assert inside_GG.all()
    torch.testing.assert_close(votes_GG2[..., 0], cells.expand(grid, grid), atol=0.01, rtol=0)
    torch.testing.assert_close(votes_GG2[..., 1], cells[:, None].expand(grid, grid), atol=0.01, rtol=0)


def test_votes_between_centres_are_placed_between_them():
    config = config_of(4, True, 80)
    exact = torch.rand(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 78 + 0.5
    codes = embed_xy((2 * exact + 1) / 80 - 1, omegas(config)).T[:, None]
    votes, inside = nearest_codes(codes, config)
    assert inside.all()
    torch.testing.assert_close(votes[0], exact.float(), atol=0.05, rtol=0)


def test_any_scale_of_the_zero_vector_is_outside():
    config = GeneralistConfig()
    assert not nearest_codes(torch.zeros(16, 3, 4), config)[1].any()


def votes_for(*regions: tuple[np.ndarray, tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Votes and mask in which each region votes for its cell x, y."""
    votes_HW2, inside_HW = np.zeros((*SIZE, 2), np.float32), np.zeros(SIZE, bool)
    for mask_HW, cell in regions:
        votes_HW2[mask_HW], inside_HW[mask_HW] = cell, True
    return votes_HW2, inside_HW


def mask(ys: slice, xs: slice) -> np.ndarray:
    mask_HW = np.zeros(SIZE, bool)
    mask_HW[ys, xs] = True
    return mask_HW


def centroid_cell(mask_HW: np.ndarray, grid: int) -> tuple[float, float]:
    ys, xs = np.nonzero(mask_HW)
    return (xs.mean() + 0.5) * grid / SIZE[1] - 0.5, (ys.mean() + 0.5) * grid / SIZE[0] - 0.5


@pytest.mark.parametrize("reach", [0.5, 1.5, 2.5, 6.0])
def test_instances_with_centroids_in_adjacent_cells_stay_apart(reach: float):
    config = DecodeConfig(grid=20, reach=reach)
    left, right = mask(np.s_[2:10], np.s_[9:10]), mask(np.s_[2:10], np.s_[10:11])
    (x, y), (beside, _) = centroid_cell(left, 20), centroid_cell(right, 20)
    assert round(beside) - round(x) == 1
    found_HW = group_votes(*votes_for((left, (x, y)), (right, (beside, y))), config)
    assert len({*found_HW[left]}) == len({*found_HW[right]}) == 1
    assert {*found_HW[left]} != {*found_HW[right]}


@pytest.mark.parametrize("seed", range(5))
def test_an_object_whose_votes_scatter_within_reach_stays_one(seed: int):
    config = DecodeConfig(grid=40, reach=6.0)
    body = mask(np.s_[2:10], np.s_[4:16])
    votes_HW2, inside_HW = votes_for((body, centroid_cell(body, 40)))
    votes_HW2 += np.random.default_rng(seed).uniform(-2, 2, votes_HW2.shape).astype(np.float32)
    found_HW = group_votes(votes_HW2, inside_HW, config)
    assert np.array_equal(found_HW, np.where(body, 0, NO_INSTANCE))


def test_far_groups_of_votes_are_two_instances():
    top, bottom = mask(np.s_[0:4], np.s_[0:6]), mask(np.s_[8:12], np.s_[12:20])
    found_HW = group_votes(*votes_for((top, (1.0, 2.0)), (bottom, (30.0, 35.0))), DecodeConfig(grid=40))
    assert np.array_equal(found_HW, np.where(bottom, 0, np.where(top, 1, NO_INSTANCE)))


def test_without_votes_there_is_no_instance():
    assert (group_votes(*votes_for(), DecodeConfig()) == NO_INSTANCE).all()


def test_an_instance_under_the_least_area_is_given_back():
    big, small = mask(np.s_[0:5], np.s_[0:5]), mask(np.s_[8:10], np.s_[12:14])
    votes = votes_for((small, (30.0, 35.0)), (big, (1.0, 2.0)))
    for least, kept in ((4, 2), (5, 1), (26, 0)):
        found_HW = group_votes(*votes, DecodeConfig(grid=40, min_area=least / 240))
        assert found_HW.max() + 1 == kept


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 12),
    st.floats(0, 15),
    st.floats(0, 1),
    st.floats(0, 0.3),
)
def test_instances_are_numbered_regions_of_the_mask(seed, size, grid, reach, split, min_area):
    rng = np.random.default_rng(seed)
    votes_HW2 = rng.uniform(-1, grid, (*size, 2)).astype(np.float32)
    inside_HW = rng.random(size) < rng.random()
    config = DecodeConfig(grid=grid, reach=reach, split=split, min_area=min_area)
    found_HW = group_votes(votes_HW2, inside_HW, config)
    labelled_HW = found_HW != NO_INSTANCE
    assert found_HW.dtype == np.int32
    assert not (labelled_HW & ~inside_HW).any()
    names, areas = np.unique(found_HW[labelled_HW], return_counts=True)
    assert names.tolist() == list(range(len(names)))
    assert (areas >= min_area * inside_HW.size).all()
    if min_area == 0:
        assert np.array_equal(labelled_HW, inside_HW)
    np.random.seed(seed % 1000)  # no global state may matter
    assert np.array_equal(group_votes(votes_HW2.copy(), inside_HW.copy(), config), found_HW)


def put_together(instances, classes, size=None, **options) -> PanopticMap:
    instances_HW, classes_HW = np.array(instances, np.int32), np.array(classes, np.int64)
    return assemble(instances_HW, classes_HW, size or instances_HW.shape, CATEGORIES, DecodeConfig(**options))


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
