"""From votes to panoptic maps, on the host and on the device."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import TesseraError
from preprocessing.synthetic import CATEGORIES
from tests.support.examples import BOX, SKY
from tests.training.test_assemble import same_maps
from tests.training.test_votes import SIZE, config_of, on_host
from training.methods.generalist import decode as decoding
from training.methods.generalist.config import DecodeConfig, GeneralistConfig
from training.methods.generalist.decode import (
    cast_votes,
    cast_votes_on_host,
    cells_of,
    centroid_picture,
    decode,
    decode_on_device,
    decode_on_host,
    group_votes,
    sum_cells,
    sum_cells_on_device,
)
from training.methods.generalist.targets import embed_xy, omegas
from training.parts.assemble import NO_INSTANCE, Assembly
from training.parts.nearest_codes import FIXED

ASSEMBLY = Assembly(CATEGORIES)


def votes_for(*regions: tuple[np.ndarray, tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Votes and mask in which each region votes for its place x, y in cells."""
    votes_2HW, inside_HW = np.zeros((2, *SIZE), np.int32), np.zeros(SIZE, bool)
    for mask_HW, place in regions:
        votes_2HW[:, mask_HW], inside_HW[mask_HW] = np.round(np.multiply(place, FIXED))[:, None], True
    return votes_2HW, inside_HW


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
    votes_2HW, inside_HW = votes_for((body, centroid_cell(body, 40)))
    votes_2HW += np.random.default_rng(seed).integers(-2 * FIXED, 2 * FIXED, votes_2HW.shape, np.int32)
    found_HW = group_votes(votes_2HW, inside_HW, config)
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
    votes_2HW = rng.integers(-FIXED // 2, FIXED * grid - FIXED // 2, (2, *size), np.int32)
    inside_HW = rng.random(size) < rng.random()
    config = DecodeConfig(grid=grid, reach=reach, split=split, min_area=min_area)
    found_HW = group_votes(votes_2HW, inside_HW, config)
    labelled_HW = found_HW != NO_INSTANCE
    assert found_HW.dtype == np.int32
    assert not (labelled_HW & ~inside_HW).any()
    names, areas = np.unique(found_HW[labelled_HW], return_counts=True)
    assert names.tolist() == list(range(len(names)))
    assert (areas >= min_area * inside_HW.size).all()
    if min_area == 0:
        assert np.array_equal(labelled_HW, inside_HW)
    np.random.seed(seed % 1000)  # no global state may matter
    assert np.array_equal(group_votes(votes_2HW.copy(), inside_HW.copy(), config), found_HW)


def logits_of(classes_BHW: torch.Tensor, categories: int = len(CATEGORIES)) -> torch.Tensor:
    return torch.nn.functional.one_hot(classes_BHW, categories).permute(0, 3, 1, 2).float()


def drawn(kind: str, images: int, grid: int) -> tuple[torch.Tensor, torch.Tensor, GeneralistConfig]:
    """Logits and embeddings of a batch 24 x 30, of which codes lie in the middle of cells."""
    config = config_of(4, True, grid)
    generator = torch.Generator().manual_seed(images)
    logits_BCHW = torch.randn(images, len(CATEGORIES), 24, 30, generator=generator)
    quarters_BHW = torch.arange(24)[:, None] // 12 * 2 + torch.arange(30) // 15 + torch.zeros(images, 1, 1).long()
    cells_BN2 = torch.randint(0, grid, (images, 4, 2), generator=generator)
    codes_BNE = embed_xy((2 * cells_BN2.double() + 1) / grid - 1, omegas(config)).float()
    codes_BNE[:, 0] = 0
    embedding_BHWE = torch.stack(
        [codes_NE[quarters_HW] for codes_NE, quarters_HW in zip(codes_BNE, quarters_BHW, strict=True)]
    )
    noise_BHWE = torch.randn(embedding_BHWE.shape, generator=generator)
    if kind == "one pixel":
        embedding_BHWE[:, 1:], embedding_BHWE[:, :, :-1] = 0, 0
    embedding_BHWE *= kind in ("ideal", "one pixel", "noisy")
    embedding_BHWE += {"noisy": 0.3, "random": 1.0}.get(kind, 0.0) * noise_BHWE
    return logits_BCHW, embedding_BHWE.permute(0, 3, 1, 2), config


def sizes_of(images: int) -> list[tuple[int, int]]:
    return [[(24, 30), (48, 60), (7, 91), (1, 1)][b % 4] for b in range(images)]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("grid", [1, 2, 20, 40, 80, 160])
@pytest.mark.parametrize("kind", ["ideal", "zero", "one pixel"])
def test_both_paths_give_the_same_maps(kind: str, grid: int, images: int, half: bool):
    """Whole, on codes in the middle of cells: no vote lies where float32 could round it either way."""
    logits_BCHW, embedding_BEHW, config = drawn(kind, images, grid)
    if half:
        logits_BCHW, embedding_BEHW = logits_BCHW.bfloat16(), embedding_BEHW.bfloat16()
    arguments = logits_BCHW, embedding_BEHW, sizes_of(images), ASSEMBLY, config
    ones = decode(*arguments)
    assert [one.size for one in ones] == sizes_of(images)
    assert same_maps(ones, decode_on_device(*arguments))


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("grid", [1, 2, 20, 40, 80, 160])
@pytest.mark.parametrize("kind", ["noisy", "random"])
def test_both_paths_give_the_same_maps_of_the_same_votes(kind: str, grid: int, images: int, monkeypatch):
    """All that comes after the votes, which may differ by 1 where they lie between two integers."""
    logits_BCHW, embedding_BEHW, config = drawn(kind, images, grid)
    config = replace(config, decode=replace(config.decode, min_area=0.002))
    votes = [on_host(embedding_EHW, config) for embedding_EHW in embedding_BEHW]
    monkeypatch.setattr(decoding, "cast_votes", lambda *_: [torch.stack(parts) for parts in zip(*votes, strict=True)])
    assembly = Assembly(CATEGORIES, min_stuff_area=0.05)
    arguments = logits_BCHW, embedding_BEHW, sizes_of(images), assembly, config
    assert same_maps(decode_on_host(*arguments), decode_on_device(*arguments))


@pytest.mark.parametrize("grid", [1, 7, 80])
def test_sums_of_cells_are_exact_on_both_paths(grid: int):
    rng = np.random.default_rng(0)
    votes_B2HW = rng.integers(-FIXED // 2, FIXED * grid - FIXED // 2, (3, 2, 9, 14), np.int32)
    inside_BHW = rng.random((3, 9, 14)) < [[[0.0]], [[0.5]], [[1.0]]]
    expected_BG6 = np.zeros((3, grid * grid, 6), np.int64)
    for b, y, x in np.argwhere(inside_BHW):
        u, v = (int(vote) for vote in votes_B2HW[b, :, y, x])
        cell = int(np.floor(v / FIXED + 0.5)) * grid + int(np.floor(u / FIXED + 0.5))
        expected_BG6[b, cell] += [1, u, v, u * u + v * v, x, y]
    for b in range(3):
        assert np.array_equal(sum_cells(votes_B2HW[b], inside_BHW[b], grid), expected_BG6[b])
    votes, inside = torch.from_numpy(votes_B2HW), torch.from_numpy(inside_BHW)
    assert np.array_equal(sum_cells_on_device(votes, inside, cells_of(votes, grid), grid), expected_BG6)


def test_the_torch_path_is_the_same_in_pieces(monkeypatch):
    _, embedding_BEHW, config = drawn("random", 3, 80)
    whole = cast_votes(embedding_BEHW, config)
    monkeypatch.setattr("training.methods.generalist.decode._CHUNK_BYTES", 80 * 4 * 3 * 100)
    pieces = cast_votes(embedding_BEHW, config)
    assert ((whole[0] - pieces[0]).abs() <= 1).all()
    assert torch.equal(whole[1], pieces[1])


def test_the_votes_need_float32_whatever_is_switched_on():
    """Autocast and reduced precision around the decoding change nothing, and are as they were afterwards."""
    _, embedding_BEHW, config = drawn("random", 1, 80)
    plain = cast_votes(embedding_BEHW, config)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            within = cast_votes(embedding_BEHW, config)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(one, other) for one, other in zip(plain, within, strict=True))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_outputs_that_are_not_finite_are_refused_by_their_place(which: int, value: float):
    *outputs, config = drawn("ideal", 5, 20)
    outputs[which][3, -1, 2, 5] = value
    with pytest.raises(TesseraError, match="decode: image 3 of the batch: the network's output is not finite"):
        decode(*outputs, [(24, 30)] * 5, ASSEMBLY, config)


def test_no_image_is_no_map():
    config = GeneralistConfig()
    assert decode(torch.zeros(0, 5, 8, 8), torch.zeros(0, 16, 8, 8), [], ASSEMBLY, config) == []


@pytest.mark.parametrize("encoding", ["embedding", "direct", "classes"])
def test_without_void_in_training_the_semantic_head_says_where_instances_are(encoding: str):
    config = GeneralistConfig(encoding=encoding, cells=8, void_kept=False, decode=DecodeConfig(min_area=0))
    instance_BXHW = torch.randn(2, config.instance_channels, 6, 8, generator=torch.Generator().manual_seed(0))
    classes_BHW = torch.full((2, 6, 8), SKY)
    classes_BHW[1, 2:4] = BOX
    for path in (decode_on_host, decode_on_device):
        empty, found = path(logits_of(classes_BHW), instance_BXHW, [(6, 8)] * 2, ASSEMBLY, config)
        assert [s.category for s in empty.segments] == [SKY]
        assert np.array_equal(np.isin(found.ids, [s.id for s in found.segments if s.is_thing]), classes_BHW[1] == BOX)


@pytest.mark.parametrize("encoding", ["embedding", "direct", "classes"])
def test_the_picture_of_centroids_is_black_outside(encoding: str):
    config = GeneralistConfig(encoding=encoding)
    instance_XHW = torch.randn(config.instance_channels, 6, 8, generator=torch.Generator().manual_seed(0))
    votes_2HW, inside_HW = cast_votes_on_host(instance_XHW, config)
    picture_HW3 = centroid_picture(instance_XHW, config)
    assert picture_HW3.dtype == np.uint8
    assert np.array_equal(picture_HW3.any(-1), inside_HW)
    share_2HW = (votes_2HW / FIXED + 0.5) / config.decode.grid
    assert np.allclose(picture_HW3[..., :2], np.moveaxis(255 * share_2HW * inside_HW, 0, -1), atol=1)
