"""From embeddings and classes to panoptic maps: nearest grid codes, votes, a majority of classes.

G: nearest neighbour on an 80 x 80 grid of candidate centroids, non-maximum suppression, majority vote of the semantic
head inside each instance, stuff from the semantic head. How votes become instances is ours. Two paths do the same,
to the bit once votes are cast: Numba on the CPU, image by image, and torch on any other device, batch by batch.

A vote is the centroid of a pixel's instance as a place on the grid of candidates, in the units of parts.nearest_codes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from preprocessing.geometry import Size
from preprocessing.panoptic_map import PanopticMap
from preprocessing.pictures import Picture
from training.methods.generalist.config import DecodeConfig, GeneralistConfig
from training.methods.generalist.targets import embed, omegas
from training.parts.assemble import (
    NO_INSTANCE,
    Assembly,
    assemble,
    assemble_on_device,
    best_classes,
    refuse_infinite,
)
from training.parts.nearest_codes import FIXED, HALF, nearest_codes

_CHUNK_BYTES = 1 << 28
"""Most memory of a tensor of scores, (B, grid, pixels)."""


def decode(
    logits_BCHW: Tensor, codes_BXHW: Tensor, sizes: Sequence[Size], assembly: Assembly, config: GeneralistConfig
) -> list[PanopticMap]:
    """A batch of network outputs on any device, float32 or bf16 -> panoptic maps on the host.

    logits: of the semantic head, by contiguous id. codes: of the instance head (cast_votes). sizes: height, width of
    each image and result. Raises TesseraError naming the place in the batch of an output that is not finite.
    """
    if not sizes:
        return []
    refuse_infinite(logits_BCHW, codes_BXHW)
    path = decode_on_host if codes_BXHW.device.type == "cpu" else decode_on_device
    return path(logits_BCHW, codes_BXHW, sizes, assembly, config)


def decode_on_host(
    logits_BCHW: Tensor, codes_BXHW: Tensor, sizes: Sequence[Size], assembly: Assembly, config: GeneralistConfig
) -> list[PanopticMap]:
    """See decode. Tensors on the CPU."""
    maps = []
    for logits_CHW, codes_XHW, size in zip(logits_BCHW, codes_BXHW, sizes, strict=True):
        classes_HW = best_classes(logits_CHW.float().contiguous().numpy())
        votes_2HW, inside_HW = cast_votes_on_host(codes_XHW, config)
        if not config.void_kept:
            inside_HW = assembly.labels.is_thing[classes_HW]
        instances_HW = group_votes(votes_2HW, inside_HW, config.decode)
        maps.append(assemble(instances_HW, classes_HW, size, assembly))
    return maps


def decode_on_device(
    logits_BCHW: Tensor, codes_BXHW: Tensor, sizes: Sequence[Size], assembly: Assembly, config: GeneralistConfig
) -> list[PanopticMap]:
    """See decode. Tensors on any device; the host waits for it a fixed number of times a batch."""
    classes_BHW = logits_BCHW.argmax(1)
    votes_B2HW, inside_BHW = cast_votes(codes_BXHW, config)
    if not config.void_kept:
        inside_BHW = torch.from_numpy(assembly.labels.is_thing).to(classes_BHW.device)[classes_BHW]
    cells_BHW = cells_of(votes_B2HW, config.decode.grid)
    sums_BG6 = sum_cells_on_device(votes_B2HW, inside_BHW, cells_BHW, config.decode.grid).cpu().numpy()
    groups = [group_cells(sums_G6, (inside_BHW.shape[1], inside_BHW.shape[2]), config.decode) for sums_G6 in sums_BG6]
    group_BG = torch.from_numpy(np.stack(groups)).to(cells_BHW.device)
    instances_BP = group_BG.gather(1, cells_BHW.flatten(1)).where(inside_BHW.flatten(1), NO_INSTANCE)
    return assemble_on_device(instances_BP.view_as(classes_BHW), classes_BHW, sizes, assembly)


def group_votes(votes_2HW: NDArray[np.int32], inside_HW: NDArray[np.bool_], config: DecodeConfig) -> NDArray[np.int32]:
    """Votes of one image -> instance of every pixel, int32 (H, W), 0.. or NO_INSTANCE."""
    height, width = inside_HW.shape
    group_G = group_cells(sum_cells(votes_2HW, inside_HW, config.grid), (height, width), config)
    return spread(votes_2HW, inside_HW, group_G, config.grid)


def group_cells(sums_G6: NDArray[np.int64], size: Size, config: DecodeConfig) -> NDArray[np.int32]:
    """Sums of `sum_cells` -> instance of each cell, int32 (grid * grid,), 0.. or NO_INSTANCE. size: H, W of the votes.

    Cells are taken by falling number of votes around them; a cell within `reach` of a group's first cell joins the
    nearest such group, and starts one of its own otherwise. It also starts one when, apart, both groups of pixels
    explain their votes far better: every pixel votes for the centroid of the instance it belongs to, so the summed
    squared distance between votes and the centroid of the voters is nearly 0 for a true instance. This keeps
    neighbours apart that no smoothing could, and leaves scattered votes of one object together. Groups under the
    least area are given back.
    """
    grid, counts_G = config.grid, sums_G6[:, 0]
    padded = np.pad(counts_G.reshape(grid, grid), 1)
    columns = padded[:-2] + padded[1:-1] + padded[2:]
    around_G = (columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:]).ravel()
    occupied_K = np.flatnonzero(counts_G)
    occupied_K = occupied_K[np.lexsort((occupied_K, -counts_G[occupied_K], -around_G[occupied_K]))]
    group_K = _group_cells(occupied_K, _in_cells(sums_G6[occupied_K], size, grid), grid, config.reach, config.split)
    area_N = np.bincount(group_K, counts_G[occupied_K])
    kept_N = area_N >= max(1, config.min_area * size[0] * size[1])
    group_G = np.full(grid * grid, NO_INSTANCE, np.int32)
    group_G[occupied_K] = np.where(kept_N, np.cumsum(kept_N) - 1, NO_INSTANCE)[group_K]
    return group_G


def _in_cells(sums_K6: NDArray[np.int64], size: Size, grid: int) -> NDArray[np.float64]:
    """The sums with all lengths in cells: pixel x lies at (x + 0.5) grid / width - 0.5. Integers under 2^53."""
    scaled_K6 = sums_K6.astype(np.float64)
    scaled_K6[:, 1:3] /= FIXED
    scaled_K6[:, 3] /= FIXED**2
    half_K1 = scaled_K6[:, :1] / 2
    scaled_K6[:, 4:] = (scaled_K6[:, 4:] + half_K1) * [grid / size[1], grid / size[0]] - half_K1
    return scaled_K6


@njit(cache=True, nogil=True)
def _group_cells(
    cells_K: NDArray[np.int64], sums_K6: NDArray[np.float64], grid: int, reach: float, split: float
) -> NDArray[np.int64]:
    """Group of each cell, taken in their order; int64 (K,). See group_cells."""
    group_K = np.empty(cells_K.size, np.int64)
    peaks_N, sums_N6 = np.empty(cells_K.size, np.int64), np.empty((cells_K.size, 6))
    found = 0
    for k, cell in enumerate(cells_K):
        nearest, nearest_d2 = -1, reach * reach
        for group in range(found):
            dy, dx = cell // grid - peaks_N[group] // grid, cell % grid - peaks_N[group] % grid
            if dx * dx + dy * dy <= nearest_d2 and (nearest < 0 or dx * dx + dy * dy < nearest_d2):
                nearest, nearest_d2 = group, dx * dx + dy * dy
        if nearest >= 0:
            apart = _error(sums_N6[nearest]) + _error(sums_K6[k])
            if apart >= split * _error(sums_N6[nearest] + sums_K6[k]):
                sums_N6[nearest] += sums_K6[k]
                group_K[k] = nearest
                continue
        peaks_N[found], sums_N6[found] = cell, sums_K6[k]
        group_K[k] = found
        found += 1
    return group_K


@njit(cache=True, nogil=True)
def _error(sums_6: NDArray[np.float64]) -> float:
    """Summed squared distance, in cells, between the votes and the centroid of the voters."""
    count, x, y = sums_6[0], sums_6[4] / sums_6[0], sums_6[5] / sums_6[0]
    return sums_6[3] - 2 * (sums_6[1] * x + sums_6[2] * y) + count * (x * x + y * y)


def cast_votes(instance_BXHW: Tensor, config: GeneralistConfig) -> tuple[Tensor, Tensor]:
    """The instance head's output -> votes int32 (B, 2, H, W) and the mask of pixels inside instances, bool (B, H, W).

    On any device, in any floating type. "embedding": the nearest code of the grid; inside where it is nearer than
    the zero vector. "direct": u, v themselves; inside where the third channel is over 0.5. "classes": the best cell
    of each axis, rescaled; inside where both together are likelier than both voids. Without `void_kept` none of
    these rules was trained and the mask is true everywhere.
    """
    with _full_precision(instance_BXHW.device.type):
        votes_B2P, inside_BP = _CAST[config.encoding](instance_BXHW.flatten(2).float(), config)
    if not config.void_kept:
        inside_BP = torch.ones_like(inside_BP)
    shape = instance_BXHW.shape[2:]
    return votes_B2P.unflatten(2, shape), inside_BP.unflatten(1, shape)


def cast_votes_on_host(instance_XHW: Tensor, config: GeneralistConfig) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The same for one image on the CPU, in arrays. Embeddings go through a kernel of their own, whose votes differ
    from the others' only where float32 rounds differently: by 1, or by any distance between codes equally near."""
    if config.encoding != "embedding":
        votes_B2HW, inside_BHW = cast_votes(instance_XHW[None], config)
        return votes_B2HW[0].numpy(), inside_BHW[0].numpy()
    embedding_EP = instance_XHW.flatten(1).float().contiguous().numpy()
    votes_2P, inside_P = nearest_codes(embedding_EP, *_half_grid(config.decode.grid, tuple(omegas(config))))
    inside_P |= not config.void_kept
    shape = instance_XHW.shape[1:]
    return votes_2P.reshape(2, *shape), inside_P.reshape(shape)


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """float32 products as they are: bf16 and TF32 cannot tell neighbouring codes apart."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _of_embedding(embedding_BEP: Tensor, config: GeneralistConfig) -> tuple[Tensor, Tensor]:
    """All codes have the squared norm 2 L, so the nearest one has the largest dot product, which separates into one
    search over u and one over v; zero is nearer than every code exactly when the two best sum to less than L."""
    codes_GD = _codes(config.decode.grid, tuple(omegas(config))).to(embedding_BEP.device)
    pixels = max(1, _CHUNK_BYTES // (codes_GD.element_size() * len(codes_GD) * len(embedding_BEP)))
    best, votes = [], []
    for half_BDP in embedding_BEP.chunk(2, 1):
        found = [_nearest(chunk_BDP, codes_GD) for chunk_BDP in half_BDP.split(pixels, 2)]
        best.append(torch.cat([best_BP for best_BP, _ in found], 1))
        votes.append(torch.cat([votes_BP for _, votes_BP in found], 1))
    return torch.stack(votes, 1), best[0] + best[1] >= config.frequencies


def _of_direct(uv_B3P: Tensor, config: GeneralistConfig) -> tuple[Tensor, Tensor]:
    grid = config.decode.grid
    fixed_B2P = (uv_B3P[:, :2].clamp(0, 1) * (grid * FIXED)).round().int() - HALF
    return fixed_B2P.clamp(-HALF, grid * FIXED - HALF - 1), uv_B3P[:, 2] > 0.5


def _of_classes(logits_BKP: Tensor, config: GeneralistConfig) -> tuple[Tensor, Tensor]:
    cells, grid = config.cells, config.decode.grid
    logits_B2KP = logits_BKP.unflatten(1, (2, cells + 1))
    best_B2P, cell_B2P = logits_B2KP[:, :, :cells].max(2)
    middle_B2P = ((2 * cell_B2P + 1) * (grid * FIXED) + cells) // (2 * cells) - HALF  # rounded, in integers
    inside_BP = best_B2P.sum(1) > logits_B2KP[:, :, cells].sum(1)
    return middle_B2P.clamp(max=grid * FIXED - HALF - 1).int(), inside_BP


_CAST = {"embedding": _of_embedding, "direct": _of_direct, "classes": _of_classes}


@lru_cache(maxsize=8)
def _codes(grid: int, frequencies: tuple[float, ...]) -> Tensor:
    """(grid, 2 L) float32: codes of the cell centres (i + 0.5) / grid, which keep -1 and 1 apart."""
    centres_G = (2 * torch.arange(grid, dtype=torch.float64) + 1) / grid - 1
    return embed(centres_G, list(frequencies)).float()


def _nearest(values_BDP: Tensor, codes_GD: Tensor) -> tuple[Tensor, Tensor]:
    """Largest dot product of each column with a code, and the vote: its cell, refined by the parabola through its
    score and its neighbours'. The outermost cells have no two neighbours and stay as they are."""
    grid = len(codes_GD)
    scores_BGP = codes_GD.expand(len(values_BDP), -1, -1).bmm(values_BDP)
    best_BP, cell_BP = scores_BGP.max(1)
    if grid < 3:
        return best_BP, FIXED * cell_BP.int()
    inner_BP = cell_BP.clamp(1, grid - 2)
    before_BP, at_BP, after_BP = scores_BGP.gather(1, torch.stack([inner_BP - 1, inner_BP, inner_BP + 1], 1)).unbind(1)
    bend_BP = (before_BP - 2 * at_BP + after_BP).clamp(max=-1e-12)
    offset_BP = ((before_BP - after_BP) / (2 * bend_BP) * FIXED).clamp(-HALF, HALF - 1).round()
    votes_BP = FIXED * cell_BP + torch.where(inner_BP == cell_BP, offset_BP, 0).long()
    # the last clamp is for products that overflow: votes are used as indices
    return best_BP, votes_BP.clamp(-HALF, grid * FIXED - HALF - 1).int()


@lru_cache(maxsize=8)
def _half_grid(
    grid: int, frequencies: tuple[float, ...]
) -> tuple[NDArray[np.float32], tuple[np.float32, ...], tuple[np.float32, ...], int]:
    """What `nearest_codes` wants beside the pixels."""
    codes_JD = np.ascontiguousarray(_codes(grid, frequencies)[: (grid + 1) // 2].numpy())
    steps = [omega * 2 / grid for omega in frequencies]
    turns, bends = (tuple(map(np.float32, parts_L)) for parts_L in (np.sin(steps), 1 - np.cos(steps)))
    return codes_JD, turns, bends, grid


@njit(cache=True, nogil=True)
def sum_cells(votes_2HW: NDArray[np.int32], inside_HW: NDArray[np.bool_], grid: int) -> NDArray[np.int64]:
    """Per cell of the grid, (grid * grid, 6) int64: pixels that vote for it, the sums of their votes u and v, of
    u^2 + v^2, and of their own x and y in pixels."""
    height, width = inside_HW.shape
    sums_G6 = np.zeros((grid * grid, 6), np.int64)
    for y in range(height):
        for x in range(width):
            if inside_HW[y, x]:
                u, v = votes_2HW[0, y, x], votes_2HW[1, y, x]
                sums_6 = sums_G6[_cell(u, v, grid)]
                sums_6[0] += 1
                sums_6[1] += u
                sums_6[2] += v
                sums_6[3] += u * u + v * v
                sums_6[4] += x
                sums_6[5] += y
    return sums_G6


@njit(cache=True, nogil=True)
def _cell(u: int, v: int, grid: int) -> int:
    return (v + HALF) // FIXED * grid + (u + HALF) // FIXED


@njit(cache=True, nogil=True)
def spread(
    votes_2HW: NDArray[np.int32], inside_HW: NDArray[np.bool_], group_G: NDArray[np.int32], grid: int
) -> NDArray[np.int32]:
    """The group of every pixel's cell; int32 (H, W)."""
    height, width = inside_HW.shape
    instances_HW = np.full((height, width), NO_INSTANCE, np.int32)
    for y in range(height):
        for x in range(width):
            if inside_HW[y, x]:
                instances_HW[y, x] = group_G[_cell(votes_2HW[0, y, x], votes_2HW[1, y, x], grid)]
    return instances_HW


def cells_of(votes_B2HW: Tensor, grid: int) -> Tensor:
    """The cell of each vote, v * grid + u; int64 (B, H, W)."""
    u_BHW, v_BHW = ((votes_B2HW.long() + HALF) // FIXED).unbind(1)
    return v_BHW * grid + u_BHW


def sum_cells_on_device(votes_B2HW: Tensor, inside_BHW: Tensor, cells_BHW: Tensor, grid: int) -> Tensor:
    """sum_cells of every image, on the tensors' device: int64 (B, grid * grid, 6)."""
    u_BHW, v_BHW = votes_B2HW.long().unbind(1)
    y_H1, x_W = (torch.arange(n, device=cells_BHW.device) for n in inside_BHW.shape[1:])
    y_H1 = y_H1[:, None]
    sums_BG = []
    for each in (1, u_BHW, v_BHW, u_BHW**2 + v_BHW**2, x_W, y_H1):
        part_BP = (inside_BHW * each).flatten(1).long()  # pixels outside add 0
        sums_BG.append(part_BP.new_zeros(len(part_BP), grid * grid).scatter_add_(1, cells_BHW.flatten(1), part_BP))
    return torch.stack(sums_BG, 2)


CENTROID_VIEW = (
    "decoded centroids: the colour is the place where a pixel puts the centre of its object, red grows to the right, "
    "green downwards, so that one object should have one colour; black where the network sees no object"
)
"""Title of centroid_picture."""


def centroid_picture(instance_XHW: Tensor, config: GeneralistConfig) -> Picture:
    """Voted centroid as colour: red = x, green = y, blue where there is an instance; void is black."""
    votes_2HW, inside_HW = cast_votes_on_host(instance_XHW.cpu(), config)
    share_2HW = (votes_2HW + FIXED / 2) / (FIXED * config.decode.grid)
    rgb_3HW = np.concatenate([share_2HW, np.full((1, *inside_HW.shape), 0.6)]) * inside_HW
    return (255 * rgb_3HW.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)
