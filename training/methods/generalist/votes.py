"""What each pixel votes for: the centroid of its instance as a place on the grid of candidates.

Votes are integers in units of 1 / FIXED cell, so whatever is summed over them is exact and depends neither on the
device nor on the order. Cell i of an axis has its centre at FIXED * i (u = (2 i + 1) / grid - 1) and owns the votes
FIXED * i - FIXED / 2 up to, not including, FIXED * i + FIXED / 2. Axis 0 of votes is u, v.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.targets import embed, omegas

FIXED = 64
"""Votes per cell."""
NO_INSTANCE = -1
_HALF = FIXED // 2
_BLOCK = 512
"""Pixels whose embeddings are compared at once: they stay in the first cache."""
_STREAM = 2048
"""Pixels whose classes are compared at once: only the best so far stay in the first cache."""
_CHUNK_BYTES = 1 << 28
"""Most memory of a tensor of scores, (B, grid, pixels)."""


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
    fixed_B2P = (uv_B3P[:, :2].clamp(0, 1) * (grid * FIXED)).round().int() - _HALF
    return fixed_B2P.clamp(-_HALF, grid * FIXED - _HALF - 1), uv_B3P[:, 2] > 0.5


def _of_classes(logits_BKP: Tensor, config: GeneralistConfig) -> tuple[Tensor, Tensor]:
    cells, grid = config.cells, config.decode.grid
    logits_B2KP = logits_BKP.unflatten(1, (2, cells + 1))
    best_B2P, cell_B2P = logits_B2KP[:, :, :cells].max(2)
    middle_B2P = ((2 * cell_B2P + 1) * (grid * FIXED) + cells) // (2 * cells) - _HALF  # rounded, in integers
    inside_BP = best_B2P.sum(1) > logits_B2KP[:, :, cells].sum(1)
    return middle_B2P.clamp(max=grid * FIXED - _HALF - 1).int(), inside_BP


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
    offset_BP = ((before_BP - after_BP) / (2 * bend_BP) * FIXED).clamp(-_HALF, _HALF - 1).round()
    votes_BP = FIXED * cell_BP + torch.where(inner_BP == cell_BP, offset_BP, 0).long()
    # the last clamp is for products that overflow: votes are used as indices
    return best_BP, votes_BP.clamp(-_HALF, grid * FIXED - _HALF - 1).int()


@lru_cache(maxsize=8)
def _half_grid(
    grid: int, frequencies: tuple[float, ...]
) -> tuple[NDArray[np.float32], tuple[np.float32, ...], tuple[np.float32, ...], int]:
    """What `nearest_codes` wants beside the pixels."""
    codes_JD = np.ascontiguousarray(_codes(grid, frequencies)[: (grid + 1) // 2].numpy())
    steps = [omega * 2 / grid for omega in frequencies]
    turns, bends = (tuple(map(np.float32, parts_L)) for parts_L in (np.sin(steps), 1 - np.cos(steps)))
    return codes_JD, turns, bends, grid


@njit(cache=True, nogil=True, fastmath={"contract"})
def nearest_codes(
    embedding_EP: NDArray[np.float32],
    codes_JD: NDArray[np.float32],
    turns: tuple[np.float32, ...],
    bends: tuple[np.float32, ...],
    grid: int,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Votes, int32 (2, P), and mask, bool (P,), of embeddings, float32 (4 L, P); see cast_votes.

    codes_JD: codes of the first half of the cells. turns, bends: sin and 1 - cos of a cell's step, per frequency;
    they are tuples, so that their length L is known when this compiles and loops over it unroll.

    The centres of cells i and grid - 1 - i are mirror images, p and -p. With S and C the parts of a dot product that
    come from sines and cosines, their scores are C + S and C - S: the better one is C + |S|, so the search runs over
    half of the cells and costs 2 L multiplications for two. Which of the two it was, S says afterwards.
    """
    pixels, width = embedding_EP.shape[1], codes_JD.shape[1]
    votes_2P, inside_P = np.empty((2, pixels), np.int32), np.empty(pixels, np.bool_)
    values_EN, code_DN = np.zeros((2 * width, _BLOCK), np.float32), np.empty((width, _BLOCK), np.float32)
    best_2N, pair_N, votes_N = np.empty((2, _BLOCK), np.float32), np.zeros(_BLOCK, np.int32), np.empty(_BLOCK, np.int32)
    for start in range(0, pixels, _BLOCK):
        stop = min(start + _BLOCK, pixels)
        values_EN[:, : stop - start] = embedding_EP[:, start:stop]
        for axis in range(2):
            values_DN = values_EN[width * axis : width * (axis + 1)]
            _search(values_DN, codes_JD, turns, best_2N[axis], pair_N)
            for d in range(width):
                for x in range(_BLOCK):
                    code_DN[d, x] = codes_JD[np.uint32(pair_N[x]), d]  # unsigned: no negative index to provide for
            _refine(values_DN, code_DN, turns, bends, grid, pair_N, votes_N)
            votes_2P[axis, start:stop] = votes_N[: stop - start]
        for x in range(stop - start):
            inside_P[start + x] = best_2N[0, x] + best_2N[1, x] >= len(turns)
    return votes_2P, inside_P


@njit(cache=True, nogil=True, fastmath={"contract"})
def _search(
    values_DN: NDArray[np.float32],
    codes_JD: NDArray[np.float32],
    turns: tuple[np.float32, ...],
    best_N: NDArray[np.float32],
    pair_N: NDArray[np.int32],
) -> None:
    """The best score of each pixel and the pair of cells that has it, the first of equals."""
    length = len(turns)
    best_N[:] = -np.inf
    for pair in range(len(codes_JD)):
        code_D = codes_JD[pair]
        for x in range(best_N.size):  # the loop that LLVM vectorises: whole rows, selections instead of branches
            odd, even = code_D[0] * values_DN[0, x], code_D[length] * values_DN[length, x]
            for k in range(1, length):
                odd += code_D[k] * values_DN[k, x]
                even += code_D[length + k] * values_DN[length + k, x]
            score = even + abs(odd)
            better = score > best_N[x]
            best_N[x] = score if better else best_N[x]
            pair_N[x] = np.int32(pair) if better else pair_N[x]


@njit(cache=True, nogil=True, fastmath={"contract"})
def _refine(
    values_DN: NDArray[np.float32],
    code_DN: NDArray[np.float32],
    turns: tuple[np.float32, ...],
    bends: tuple[np.float32, ...],
    grid: int,
    pair_N: NDArray[np.int32],
    votes_N: NDArray[np.int32],
) -> None:
    """The better cell of each pair (code_DN: the code of its first), and the parabola through the cell's score f(p)
    and its neighbours', f(p - step) and f(p + step).

    The vertex lies (f(p + step) - f(p - step)) / (2 f(p) - f(p - step) - f(p + step)) half cells away, and by the sums
    of angles both differences are dot products with parts of the code of p: no neighbour's score is needed. Where the
    cell is the pair's second, -p, the sines change sign.
    """
    length, last = len(turns), np.int32(grid - 1)
    zero, half = np.float32(0), np.float32(_HALF)
    for x in range(votes_N.size):
        odd = odd_slope = even_slope = odd_bend = even_bend = zero
        for k in range(length):
            by_sine, by_cosine = code_DN[k, x] * values_DN[k, x], code_DN[length + k, x] * values_DN[length + k, x]
            odd += by_sine
            odd_bend += bends[k] * by_sine
            even_bend += bends[k] * by_cosine
            even_slope += turns[k] * (code_DN[length + k, x] * values_DN[k, x])
            odd_slope += turns[k] * (code_DN[k, x] * values_DN[length + k, x])
        second = odd < zero
        slope = even_slope + (odd_slope if second else -odd_slope)
        bend = max(even_bend + (-odd_bend if second else odd_bend), np.float32(1e-12))
        offset = min(max(slope / bend * half, -half), half - np.float32(1))
        cell = last - pair_N[x] if second else pair_N[x]
        inner = (cell > 0) & (cell < last)
        vote = np.int32(FIXED) * cell + np.int32(np.rint(offset if inner else zero))
        votes_N[x] = min(max(vote, np.int32(-_HALF)), np.int32(FIXED * grid - _HALF - 1))  # see _nearest


@njit(cache=True, nogil=True)
def best_classes(logits_CHW: NDArray[np.float32]) -> NDArray[np.int32]:
    """Argmax over classes, the first of equals; int32 (H, W)."""
    categories, height, width = logits_CHW.shape
    logits_CP = logits_CHW.reshape(categories, height * width)
    classes_P = np.zeros(height * width, np.int32)
    for start in range(0, height * width, _STREAM):
        best_N = logits_CP[0, start : start + _STREAM].copy()
        classes_N = classes_P[start : start + _STREAM]
        for category in range(1, categories):
            logits_N = logits_CP[category, start : start + _STREAM]
            for x in range(best_N.size):
                better = logits_N[x] > best_N[x]
                best_N[x] = logits_N[x] if better else best_N[x]
                classes_N[x] = np.int32(category) if better else classes_N[x]
    return classes_P.reshape(height, width)


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
    return (v + _HALF) // FIXED * grid + (u + _HALF) // FIXED


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
    u_BHW, v_BHW = ((votes_B2HW.long() + _HALF) // FIXED).unbind(1)
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
