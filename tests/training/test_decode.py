"""Nearest codes against brute force, and votes against hand-made cases."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from preprocessing.synthetic import CATEGORIES
from training.methods.generalist.config import DecodeConfig, GeneralistConfig
from training.methods.generalist.decode import NO_INSTANCE, assemble, group_votes, nearest_codes
from training.methods.generalist.targets import embed_xy, omegas


@pytest.mark.parametrize("grid", [1, 2, 5, 23])
@pytest.mark.parametrize(("frequencies", "half_period"), [(1, False), (3, True), (4, False)])
def test_the_chosen_code_is_as_near_as_the_best_of_all(grid, frequencies, half_period):
    config = GeneralistConfig(frequencies=frequencies, half_period=half_period, decode=DecodeConfig(grid=grid))
    generator = torch.Generator().manual_seed(grid)
    embedding = torch.randn(4 * frequencies, 20, 30, generator=generator) * 1.2
    votes, inside = nearest_codes(embedding, config)
    centres = (2 * torch.arange(grid, dtype=torch.float64) + 1) / grid - 1
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    codes = embed_xy(torch.stack([u, v], -1), omegas(config)).flatten(0, 1)
    d2 = torch.cdist(embedding.flatten(1).T.double(), codes).square()
    zero = embedding.flatten(1).T.double().square().sum(1)
    cells = votes.flatten(0, 1).round().long().clamp(0, grid - 1)
    chosen = d2.gather(1, (cells[:, 1] * grid + cells[:, 0])[:, None])[:, 0]
    inside = inside.flatten()
    best = d2.min(1).values
    assert (chosen[inside] - best[inside]).max() < 1e-3 if inside.any() else True
    assert ((zero - best)[inside] > -1e-4).all()
    assert ((best - zero)[~inside] > -1e-4).all()


def votes_for(shape, things, scale):
    """Votes and mask of things given as (mask, x, y) in pixels."""
    votes, inside = np.zeros((*shape, 2), np.float32), np.zeros(shape, bool)
    for mask, x, y in things:
        votes[mask] = (x + 0.5) * scale - 0.5, (y + 0.5) * scale - 0.5
        inside |= mask
    return votes, inside


def box(shape, x0, y0, x1, y1):
    mask = np.zeros(shape, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_neighbours_whose_centroids_lie_in_adjacent_cells_stay_apart():
    shape, config = (40, 40), DecodeConfig(grid=20, reach=6)
    left, right = box(shape, 10, 5, 12, 35), box(shape, 12, 5, 14, 35)  # two books on a shelf
    instances = group_votes(*votes_for(shape, [(left, 10.5, 19.5), (right, 12.5, 19.5)], 0.5), config)
    assert len(set(instances[left]) | set(instances[right])) == 2
    assert len(set(instances[left])) == len(set(instances[right])) == 1


def test_scattered_votes_of_one_object_stay_together():
    shape, config = (40, 40), DecodeConfig(grid=20, reach=6)
    disk = np.hypot(*np.mgrid[-20:20, -20:20]) < 12
    votes, inside = votes_for(shape, [(disk, 19.5, 19.5)], 0.5)
    votes += np.random.default_rng(0).normal(0, 0.8, votes.shape).astype(np.float32)
    instances = group_votes(votes, inside, replace(config, min_area=0.01))
    assert set(instances[disk]) <= {0, NO_INSTANCE}
    assert (instances[disk] == 0).mean() > 0.95


def test_no_votes_are_no_instances():
    instances = group_votes(np.zeros((8, 9, 2), np.float32), np.zeros((8, 9), bool), DecodeConfig())
    assert (instances == NO_INSTANCE).all()


@pytest.mark.parametrize("seed", range(20))
def test_instances_are_numbered_without_gaps_and_only_where_pixels_voted(seed):
    rng = np.random.default_rng(seed)
    inside = rng.random((17, 23)) < rng.random()
    votes = rng.uniform(-1, 11, (17, 23, 2)).astype(np.float32)
    config = DecodeConfig(grid=10, reach=rng.uniform(0, 5), min_area=rng.choice([0, 0.02]))
    instances = group_votes(votes, inside, config)
    named = set(instances.ravel()) - {NO_INSTANCE}
    assert named == set(range(len(named)))
    assert (instances[~inside] == NO_INSTANCE).all()
    assert np.array_equal(instances, group_votes(votes, inside, config))


def test_an_instance_gets_its_most_frequent_thing_class_and_disagreement_is_void():
    disk, ring, sky = (CATEGORIES.names.index(name) for name in ("disk", "ring", "sky"))
    instances = np.full((4, 6), NO_INSTANCE, np.int32)
    instances[:2, :3], instances[2:, :3] = 0, 1
    classes = np.full((4, 6), sky)
    classes[:2, :2], classes[0, 2] = ring, disk  # 4 ring, 1 disk, 1 sky
    classes[3, 5] = disk  # thing outside of all instances
    panoptic = assemble(instances, classes, (4, 6), CATEGORIES, DecodeConfig())
    assert {(s.category, s.area) for s in panoptic.segments} == {(ring, 6), (sky, 11)}
    assert (panoptic.ids[2:, :3] == 0).all()  # an instance of stuff only
    assert panoptic.ids[3, 5] == 0


def test_small_stuff_becomes_void():
    sky, field = (CATEGORIES.names.index(name) for name in ("sky", "field"))
    classes = np.full((10, 10), sky)
    classes[0, :3] = field
    nothing = np.full((10, 10), NO_INSTANCE, np.int32)
    panoptic = assemble(nothing, classes, (10, 10), CATEGORIES, DecodeConfig(min_stuff_area=0.05))
    assert [s.category for s in panoptic.segments] == [sky]
    assert (panoptic.ids[0, :3] == 0).all()
