"""Which code of a grid each pixel's positional embedding is nearest to: the search of the generalist's decoding.

Votes are integers in units of 1 / FIXED cell, so whatever is summed over them is exact and depends neither on the
device nor on the order. Cell i of an axis has its centre at FIXED * i (u = (2 i + 1) / grid - 1) and owns the votes
FIXED * i - HALF up to, not including, FIXED * i + HALF. Axis 0 of votes is u, v.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

FIXED = 64
"""Votes per cell."""
HALF = FIXED // 2
_BLOCK = 512
"""Pixels whose embeddings are compared at once: they stay in the first cache."""


@njit(cache=True, nogil=True, fastmath={"contract"})
def nearest_codes(
    embedding_EP: NDArray[np.float32],
    codes_JD: NDArray[np.float32],
    turns: tuple[np.float32, ...],
    bends: tuple[np.float32, ...],
    grid: int,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Votes, int32 (2, P), and mask, bool (P,), of embeddings, float32 (4 L, P); see generalist.decode.cast_votes.

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
    zero, half = np.float32(0), np.float32(HALF)
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
        votes_N[x] = min(max(vote, np.int32(-HALF)), np.int32(FIXED * grid - HALF - 1))  # for products that overflow
