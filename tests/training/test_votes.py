"""What pixels vote for, by the kernel of the CPU and by torch."""

import numpy as np
import pytest
import torch

from training.methods.generalist.config import DecodeConfig, GeneralistConfig
from training.methods.generalist.decode import cast_votes, cast_votes_on_host
from training.methods.generalist.targets import embed, embed_xy, omegas
from training.parts.nearest_codes import FIXED

GRIDS = [1, 2, 3, 5, 80]
SIZE = (12, 20)
every_grid = pytest.mark.parametrize("grid", GRIDS)
both_periods = pytest.mark.parametrize("half", [False, True], ids=["full", "half"])


def on_host(instance_XHW, config):
    votes_2HW, inside_HW = cast_votes_on_host(instance_XHW, config)
    return torch.from_numpy(votes_2HW), torch.from_numpy(inside_HW)


def on_device(instance_XHW, config):
    votes_B2HW, inside_BHW = cast_votes(instance_XHW[None], config)
    return votes_B2HW[0], inside_BHW[0]


both_paths = pytest.mark.parametrize("cast", [on_host, on_device])


def config_of(frequencies: int, half: bool, grid: int) -> GeneralistConfig:
    return GeneralistConfig(frequencies=frequencies, half_period=half, decode=DecodeConfig(grid=grid))


def centres(grid: int) -> torch.Tensor:
    return (2 * torch.arange(grid, dtype=torch.float64) + 1) / grid - 1


def embeddings(config: GeneralistConfig, count: int = 160) -> torch.Tensor:
    """(4 L, 4, count): noise, small noise, codes with noise, and what lies between a code and zero."""
    generator = torch.Generator().manual_seed(0)
    codes_ND = embed_xy(torch.rand(count, 2, generator=generator) * 2 - 1, omegas(config))
    noise = torch.randn(3, *codes_ND.shape, generator=generator)
    shares = torch.rand(count, 1, generator=generator)
    return torch.stack([2 * noise[0], 0.3 * noise[1], codes_ND + 0.3 * noise[2], shares * codes_ND]).permute(2, 0, 1)


def scores_2PG(embedding_EHW: torch.Tensor, config: GeneralistConfig) -> torch.Tensor:
    """float64 dot products with every cell's code, of u and of v."""
    codes_GD = embed(centres(config.decode.grid), omegas(config))
    values_P2D = embedding_EHW.double().flatten(1).T.unflatten(1, (2, -1))
    return torch.stack([values_P2D[:, axis] @ codes_GD.T for axis in range(2)])


@both_paths
@both_periods
@pytest.mark.parametrize("frequencies", [1, 2, 3, 4, 5])
@every_grid
def test_no_code_is_nearer_than_the_chosen_one(grid: int, frequencies: int, half: bool, cast):
    config = config_of(frequencies, half, grid)
    embedding_EHW = embeddings(config)
    votes_2HW, inside_HW = cast(embedding_EHW, config)
    cells_P2 = ((votes_2HW + FIXED // 2) // FIXED).flatten(1).T.long()
    codes_GD = embed(centres(grid), omegas(config))
    y_P2D = embedding_EHW.double().flatten(1).T.unflatten(1, (2, -1))
    d2_2PG = torch.stack([(y_P2D[:, i, None] - codes_GD).square().sum(-1) for i in range(2)])
    d2_PGG = d2_2PG[0][:, :, None] + d2_2PG[1][:, None]  # every pair of cells, though they separate
    zero_P = y_P2D.square().sum((1, 2))
    chosen_P = torch.where(inside_HW.flatten(), d2_PGG[torch.arange(len(zero_P)), *cells_P2.T], zero_P)
    best_P = torch.minimum(d2_PGG.flatten(1).amin(1), zero_P)
    assert float((chosen_P - best_P).max()) <= 1e-5


@both_paths
@both_periods
@every_grid
def test_the_code_of_a_cells_centre_votes_for_the_centre(grid: int, half: bool, cast):
    config = config_of(4, half, grid)
    u_GG, v_GG = torch.meshgrid(centres(grid), centres(grid), indexing="xy")
    embedding = embed_xy(torch.stack([u_GG, v_GG], -1), omegas(config)).permute(2, 0, 1)
    votes_2GG, inside_GG = cast(embedding, config)
    assert inside_GG.all()
    assert votes_2GG.dtype == torch.int32
    middles_G = FIXED * torch.arange(grid, dtype=torch.int32)
    assert torch.equal(votes_2GG, torch.stack(torch.meshgrid(middles_G, middles_G, indexing="xy")))


@both_paths
def test_votes_between_centres_are_placed_between_them(cast):
    config = config_of(4, True, 80)
    exact = torch.rand(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 78 + 0.5
    codes = embed_xy((2 * exact + 1) / 80 - 1, omegas(config)).T[:, None]
    votes, inside = cast(codes, config)
    assert inside.all()
    torch.testing.assert_close(votes[:, 0] / FIXED, exact.T.float(), atol=0.05, rtol=0)


@both_paths
@both_periods
@pytest.mark.parametrize("frequencies", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("grid", [3, 20, 40, 41, 80])
def test_votes_lie_at_the_vertex_of_the_parabola_through_three_scores(grid: int, frequencies: int, half: bool, cast):
    config = config_of(frequencies, half, grid)
    embedding_EHW = embeddings(config)
    votes_2P = cast(embedding_EHW, config)[0].flatten(1)
    checked = 0
    for axis, scores_PG in enumerate(scores_2PG(embedding_EHW, config).numpy()):
        for vote, scores_G in zip(votes_2P[axis].tolist(), scores_PG, strict=True):
            cell = int(scores_G.argmax())
            if scores_G[cell] - np.delete(scores_G, cell).max() < 1e-5:
                continue  # float32 cannot tell these two
            expected = FIXED * cell
            if 0 < cell < grid - 1:
                curve = np.polyfit([-1, 0, 1], scores_G[cell - 1 : cell + 2], 2)
                expected += np.clip(FIXED * -curve[1] / (2 * curve[0]), -FIXED / 2, FIXED / 2 - 1)
            assert abs(vote - expected) <= 0.6  # rounded, from float32
            checked += 1
    assert checked > 300


@both_paths
def test_the_zero_vector_is_outside(cast):
    assert not cast(torch.zeros(16, 3, 4), GeneralistConfig())[1].any()


@both_periods
@pytest.mark.parametrize("grid", [1, 2, 20, 40, 80, 160])
def test_both_paths_cast_the_same_votes_where_float32_can_tell(grid: int, half: bool):
    config = config_of(4, half, grid)
    embedding_EHW = embeddings(config, 1000)
    (one_2HW, in_one_HW), (other_2HW, in_other_HW) = on_host(embedding_EHW, config), on_device(embedding_EHW, config)
    best_2PK = scores_2PG(embedding_EHW, config).topk(min(2, grid), 2).values
    clear_2P = (best_2PK[..., 0] - best_2PK[..., -1] > 1e-5) | (grid == 1)
    assert ((one_2HW - other_2HW).flatten(1).abs() <= 1)[clear_2P].all()
    sure_P = (best_2PK[..., 0].sum(0) - config.frequencies).abs() > 1e-5
    assert torch.equal(in_one_HW.flatten()[sure_P], in_other_HW.flatten()[sure_P])
    assert clear_2P.float().mean() > 0.99
    assert sure_P.float().mean() > 0.99


@both_paths
@pytest.mark.parametrize("grid", [1, 3, 80])
@pytest.mark.parametrize("encoding", ["embedding", "direct", "classes"])
def test_the_largest_numbers_vote_for_cells_of_the_grid(encoding: str, grid: int, cast):
    config = GeneralistConfig(encoding=encoding, decode=DecodeConfig(grid=grid))
    largest = torch.finfo(torch.float32).max
    signs_XHW = (
        2.0 * torch.randint(0, 2, (config.instance_channels, 5, 6), generator=torch.Generator().manual_seed(0)) - 1
    )
    instance_XHW = largest * signs_XHW
    votes_2HW, _ = cast(instance_XHW, config)
    assert votes_2HW.min() >= -FIXED // 2
    assert votes_2HW.max() < FIXED * grid - FIXED // 2


@both_paths
@pytest.mark.parametrize("grid", [1, 20, 80])
def test_direct_outputs_are_the_votes(grid: int, cast):
    config = GeneralistConfig(encoding="direct", decode=DecodeConfig(grid=grid))
    outputs_3HW = torch.rand(3, 9, 11, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    votes_2HW, inside_HW = cast(outputs_3HW, config)
    for y in range(9):
        for x in range(11):
            u, v, is_instance = outputs_3HW[:, y, x].tolist()
            assert inside_HW[y, x] == (is_instance > 0.5)
            for vote, share in zip(votes_2HW[:, y, x].tolist(), (u, v), strict=True):
                exact = FIXED * (min(max(share, 0), 1) * grid - 0.5)
                assert abs(vote - min(exact, FIXED * grid - FIXED / 2 - 1)) <= 0.51


@both_paths
@pytest.mark.parametrize(("cells", "grid"), [(80, 80), (20, 80), (80, 20), (7, 5), (1, 3), (5, 1)])
def test_the_best_classes_of_both_axes_are_the_votes(cells: int, grid: int, cast):
    config = GeneralistConfig(encoding="classes", cells=cells, decode=DecodeConfig(grid=grid))
    logits_KHW = torch.randn(2 * (cells + 1), 9, 11, generator=torch.Generator().manual_seed(0))
    votes_2HW, inside_HW = cast(logits_KHW, config)
    for y in range(9):
        for x in range(11):
            u_K, v_K = logits_KHW[:, y, x].double().split(cells + 1)
            assert inside_HW[y, x] == (max(u_K[:-1]) + max(v_K[:-1]) > u_K[-1] + v_K[-1])
            for vote, axis_K in zip(votes_2HW[:, y, x].tolist(), (u_K, v_K), strict=True):
                share = (int(axis_K[:-1].argmax()) + 0.5) / cells
                assert abs(vote - FIXED * (share * grid - 0.5)) <= 0.5
