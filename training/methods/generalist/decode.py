"""From embeddings and classes to a panoptic map: nearest grid codes, votes, a majority of classes.

G: nearest neighbour on an 80 x 80 grid of candidate centroids, non-maximum suppression, majority vote of
the semantic head inside each instance, stuff from the semantic head. How votes become instances is ours.
"""

from functools import lru_cache

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from preprocessing.geometry import Size, resize_labels
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment, measured
from training.methods.generalist.config import DecodeConfig, GeneralistConfig
from training.methods.generalist.targets import embed, omegas

NO_INSTANCE = -1
_CHUNK = 1 << 14
"""Pixels per matrix product: its (pixels, grid) scores stay in the cache."""


def decode(
    classes_HW: Tensor, embedding_EHW: Tensor, size: Size, labels: LabelTable, config: GeneralistConfig
) -> PanopticMap:
    """One image.

    classes_HW: contiguous ids of the semantic head. embedding_EHW: (4 L, H, W). size: height, width of the
    result, reached by nearest-neighbour resizing of the decoded map.
    """
    votes_HW2, inside_HW = nearest_codes(embedding_EHW, config)
    instances_HW = group_votes(votes_HW2.numpy(), inside_HW.numpy(), config.decode)
    return assemble(instances_HW, classes_HW.cpu().numpy(), size, labels, config.decode)


def nearest_codes(embedding_EHW: Tensor, config: GeneralistConfig) -> tuple[Tensor, Tensor]:
    """Nearest code of every pixel on the grid of centroids, exactly.

    All codes have the squared norm 2 L, so the nearest one has the largest dot product, which separates
    into one search over u and one over v; the zero vector is nearer than every code exactly when the two
    best products sum to less than L. Returns, on the CPU, the votes x, y in cells (float32 (H, W, 2); the
    nearest cell's centre is the rounded value, the rest is a parabola through its neighbours) and the mask
    of pixels that are nearer to a code than to zero (bool (H, W)).
    """
    codes_GD = _codes(config.decode.grid, tuple(omegas(config))).to(embedding_EHW.device)
    best_2P, cell_2P = [], []
    with torch.autocast(embedding_EHW.device.type, enabled=False):  # bf16 cannot tell neighbouring codes apart
        for half_DP in embedding_EHW.float().flatten(1).chunk(2):
            found = [_nearest(chunk_DP, codes_GD) for chunk_DP in half_DP.split(_CHUNK, 1)]
            best_2P.append(torch.cat([best for best, _ in found]))
            cell_2P.append(torch.cat([cell for _, cell in found]))
    inside_P = best_2P[0] + best_2P[1] >= config.frequencies
    shape = embedding_EHW.shape[1:]
    return torch.stack(cell_2P, -1).reshape(*shape, 2).cpu(), inside_P.reshape(shape).cpu()


@lru_cache(maxsize=8)
def _codes(grid: int, frequencies: tuple[float, ...]) -> Tensor:
    """(grid, 2 L): codes of the cell centres (i + 0.5) / grid, which keep -1 and 1 apart."""
    centres_G = (2 * torch.arange(grid, dtype=torch.float64) + 1) / grid - 1
    return embed(centres_G, list(frequencies)).float()


def _nearest(values_DP: Tensor, codes_GD: Tensor) -> tuple[Tensor, Tensor]:
    """Largest dot product of each column with a code, and its cell, refined between cells."""
    scores_GP = codes_GD @ values_DP
    best_P, cell_P = scores_GP.max(0)
    if len(codes_GD) < 3:  # no cell has two neighbours
        return best_P, cell_P.float()
    inner_P = cell_P.clamp(1, len(codes_GD) - 2)
    around_3P = torch.stack([inner_P - 1, inner_P, inner_P + 1])
    before_P, at_P, after_P = scores_GP.gather(0, around_3P)
    bend_P = (before_P - 2 * at_P + after_P).clamp(max=-1e-12)
    offset_P = ((before_P - after_P) / (2 * bend_P)).clamp(-0.5, 0.5)
    return best_P, cell_P + torch.where(inner_P == cell_P, offset_P, 0)


def group_votes(
    votes_HW2: NDArray[np.float32], inside_HW: NDArray[np.bool_], config: DecodeConfig
) -> NDArray[np.int32]:
    """Votes -> instance of every pixel, int32 (H, W), 0.. or NO_INSTANCE.

    A cell of the grid is the unit. Cells are taken by falling number of votes around them; a cell within
    `reach` of a group's first cell joins the nearest such group, and starts one of its own otherwise. It
    also starts one when, apart, both groups of pixels explain their votes far better: every pixel votes for
    the centroid of the instance it belongs to, so the summed squared distance between votes and the
    centroid of the voters is nearly 0 for a true instance. This keeps neighbours apart that no smoothing
    could, and leaves scattered votes of one object together.
    """
    height, width = inside_HW.shape
    scale_2 = np.array([config.grid / width, config.grid / height])
    cells_HW, sums_G6 = _sum_cells(votes_HW2, inside_HW, config.grid, scale_2)
    counts_GG = sums_G6[:, 0].reshape(config.grid, config.grid)
    padded = np.pad(counts_GG, 1)
    shifts = [padded[y : y + config.grid, x : x + config.grid] for y in range(3) for x in range(3)]
    around_GG = np.sum(shifts, axis=0)
    occupied = np.flatnonzero(counts_GG)
    order = occupied[np.lexsort((occupied, -counts_GG.ravel()[occupied], -around_GG.ravel()[occupied]))]
    group_G = _group_cells(order, sums_G6, config.grid, config.reach, config.split)
    instances_HW = np.where(inside_HW, group_G[cells_HW], NO_INSTANCE)
    return _drop_small(instances_HW, config.min_area * height * width)


@njit(cache=True, nogil=True)
def _sum_cells(
    votes_HW2: NDArray[np.float32], inside_HW: NDArray[np.bool_], grid: int, scale_2: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Cell of every pixel, and per cell: voters, sum of votes x, y, of their squares, of voters' x, y.

    All in cells: pixel x lies at (x + 0.5) scale - 0.5.
    """
    height, width = inside_HW.shape
    cells_HW = np.zeros((height, width), np.int32)
    sums_G6 = np.zeros((grid * grid, 6))
    for y in range(height):
        for x in range(width):
            if not inside_HW[y, x]:
                continue
            u, v = float(votes_HW2[y, x, 0]), float(votes_HW2[y, x, 1])
            cell = min(max(round(v), 0), grid - 1) * grid + min(max(round(u), 0), grid - 1)
            cells_HW[y, x] = cell
            sums_G6[cell, 0] += 1
            sums_G6[cell, 1] += u
            sums_G6[cell, 2] += v
            sums_G6[cell, 3] += u * u + v * v
            sums_G6[cell, 4] += (x + 0.5) * scale_2[0] - 0.5
            sums_G6[cell, 5] += (y + 0.5) * scale_2[1] - 0.5
    return cells_HW, sums_G6


@njit(cache=True, nogil=True)
def _group_cells(
    order: NDArray[np.int64], sums_G6: NDArray[np.float64], grid: int, reach: float, split: float
) -> NDArray[np.int32]:
    """Group of each cell, int32 (grid * grid,); see group_votes."""
    group_G = np.full(grid * grid, NO_INSTANCE, np.int32)
    peaks = np.empty(order.size, np.int64)
    groups_N6 = np.empty((order.size, 6))
    found = 0
    for cell in order:
        nearest, nearest_d2 = -1, reach * reach
        for group in range(found):
            dy, dx = cell // grid - peaks[group] // grid, cell % grid - peaks[group] % grid
            if dx * dx + dy * dy <= nearest_d2 and (nearest < 0 or dx * dx + dy * dy < nearest_d2):
                nearest, nearest_d2 = group, dx * dx + dy * dy
        if nearest >= 0:
            apart = _error(groups_N6[nearest]) + _error(sums_G6[cell])
            if apart >= split * _error(groups_N6[nearest] + sums_G6[cell]):
                groups_N6[nearest] += sums_G6[cell]
                group_G[cell] = nearest
                continue
        peaks[found] = cell
        groups_N6[found] = sums_G6[cell]
        group_G[cell] = found
        found += 1
    return group_G


@njit(cache=True, nogil=True)
def _error(sums_6: NDArray[np.float64]) -> float:
    """Summed squared distance, in cells, between the votes and the centroid of the voters."""
    count, x, y = sums_6[0], sums_6[4] / sums_6[0], sums_6[5] / sums_6[0]
    return sums_6[3] - 2 * (sums_6[1] * x + sums_6[2] * y) + count * (x * x + y * y)


def _drop_small(instances_HW: NDArray[np.int32], min_area: float) -> NDArray[np.int32]:
    """Give the pixels of instances under min_area back."""
    areas = np.bincount(instances_HW.ravel() + 1)
    areas[0] = 0
    keep = areas >= max(1, min_area)
    names = np.full(areas.size, NO_INSTANCE, np.int32)
    names[keep] = np.arange(keep.sum())
    return names[instances_HW + 1]


def assemble(
    instances_HW: NDArray[np.int32],
    classes_HW: NDArray[np.int64],
    size: Size,
    labels: LabelTable,
    config: DecodeConfig,
) -> PanopticMap:
    """Instances with their most frequent thing class; outside of them stuff where the semantic head says so.

    Void where the two disagree: thing pixels outside of all instances, instances without a thing pixel.
    """
    found, is_thing, inside_HW = int(instances_HW.max()) + 1, labels.is_thing, instances_HW >= 0
    votes_NC = np.zeros((found, len(labels)), np.int64)
    np.add.at(votes_NC, (instances_HW[inside_HW], classes_HW[inside_HW]), 1)
    votes_NC[:, ~is_thing] = 0
    category_N = [int(votes_C.argmax()) for votes_C in votes_NC]
    label_N = np.where(votes_NC.any(1), np.arange(1, found + 1), 0)
    dense_HW = np.where(is_thing[classes_HW], 0, found + 1 + classes_HW).astype(np.uint16)
    dense_HW[inside_HW] = label_N[instances_HW[inside_HW]]
    segments = [Segment(0, category, True) for category in category_N]
    segments += [Segment(0, category, bool(is_thing[category])) for category in range(len(labels))]
    return _tabulate(resize_labels(dense_HW, size), segments, config.min_stuff_area)


def _tabulate(dense_HW: NDArray[np.uint16], segments: list[Segment], min_stuff_area: float) -> PanopticMap:
    """Measure; labels without pixels lose their row, small stuff becomes void."""
    kept, ids_HW = [], dense_HW.astype(np.int32)
    for segment in measured(dense_HW, segments):
        if not segment.is_thing and segment.area < min_stuff_area * ids_HW.size:
            ids_HW[ids_HW == segment.id] = 0
        elif segment.area > 0:
            kept.append(segment)
    return PanopticMap(ids_HW, tuple(kept))


def class_picture(classes_HW: Tensor, labels: LabelTable) -> NDArray[np.uint8]:
    """Contiguous ids -> RGB (H, W, 3)."""
    return labels.colors[classes_HW.cpu().numpy()]


def centroid_picture(embedding_EHW: Tensor, config: GeneralistConfig) -> NDArray[np.uint8]:
    """Voted centroid as colour: red = x, green = y, blue where there is an instance; void is black."""
    votes_HW2, inside_HW = nearest_codes(embedding_EHW, config)
    share_HW2 = (votes_HW2.numpy() + 0.5) / config.decode.grid
    rgb_HW3 = np.concatenate([share_HW2, np.full((*inside_HW.shape, 1), 0.6)], -1) * inside_HW.numpy()[..., None]
    return (255 * rgb_HW3.clip(0, 1)).astype(np.uint8)
