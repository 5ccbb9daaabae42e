"""From embeddings and classes to panoptic maps: nearest grid codes, votes, a majority of classes.

G: nearest neighbour on an 80 x 80 grid of candidate centroids, non-maximum suppression, majority vote of the semantic
head inside each instance, stuff from the semantic head. How votes become instances is ours. Two paths do the same,
to the bit once votes are cast: Numba on the CPU, image by image, and torch on any other device, batch by batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from infra.errors import TesseraError
from preprocessing.geometry import Size, resize_labels
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment, measured
from training.methods.generalist.config import DecodeConfig, GeneralistConfig
from training.methods.generalist.votes import (
    FIXED,
    NO_INSTANCE,
    best_classes,
    cast_votes,
    cast_votes_on_host,
    cells_of,
    spread,
    sum_cells,
    sum_cells_on_device,
)


def decode(
    logits_BCHW: Tensor,
    instance_BXHW: Tensor,
    sizes: Sequence[Size],
    labels: LabelTable,
    config: GeneralistConfig,
) -> list[PanopticMap]:
    """A batch of network outputs on any device, float32 or bf16 -> panoptic maps on the host.

    logits: of the semantic head, by contiguous id. instance: of the instance head (votes.cast_votes). sizes: height,
    width of each result, reached by nearest-neighbour resizing of the decoded map. Raises TesseraError naming the
    place in the batch of an output that is not finite.
    """
    if not sizes:
        return []
    path = decode_on_host if instance_BXHW.device.type == "cpu" else decode_on_device
    return path(logits_BCHW, instance_BXHW, sizes, labels, config)


def decode_on_host(
    logits_BCHW: Tensor, instance_BXHW: Tensor, sizes: Sequence[Size], labels: LabelTable, config: GeneralistConfig
) -> list[PanopticMap]:
    """See decode. Tensors on the CPU."""
    _refuse_infinite(logits_BCHW, instance_BXHW)
    maps = []
    for logits_CHW, instance_XHW, size in zip(logits_BCHW, instance_BXHW, sizes, strict=True):
        classes_HW = best_classes(logits_CHW.float().contiguous().numpy())
        votes_2HW, inside_HW = cast_votes_on_host(instance_XHW, config)
        if not config.void_kept:
            inside_HW = labels.is_thing[classes_HW]
        instances_HW = group_votes(votes_2HW, inside_HW, config.decode)
        maps.append(assemble(instances_HW, classes_HW, size, labels, config.decode))
    return maps


def decode_on_device(
    logits_BCHW: Tensor, instance_BXHW: Tensor, sizes: Sequence[Size], labels: LabelTable, config: GeneralistConfig
) -> list[PanopticMap]:
    """See decode. Tensors on any device; the host waits for it a fixed number of times a batch."""
    _refuse_infinite(logits_BCHW, instance_BXHW)
    classes_BHW = logits_BCHW.argmax(1)
    votes_B2HW, inside_BHW = cast_votes(instance_BXHW, config)
    if not config.void_kept:
        inside_BHW = torch.from_numpy(labels.is_thing).to(classes_BHW.device)[classes_BHW]
    cells_BHW = cells_of(votes_B2HW, config.decode.grid)
    sums_BG6 = sum_cells_on_device(votes_B2HW, inside_BHW, cells_BHW, config.decode.grid).cpu().numpy()
    groups = [group_cells(sums_G6, (inside_BHW.shape[1], inside_BHW.shape[2]), config.decode) for sums_G6 in sums_BG6]
    group_BG = torch.from_numpy(np.stack(groups)).to(cells_BHW.device)
    instances_BP = group_BG.gather(1, cells_BHW.flatten(1)).where(inside_BHW.flatten(1), NO_INSTANCE)
    return assemble_on_device(instances_BP.view_as(classes_BHW), classes_BHW, sizes, labels, config.decode)


def _refuse_infinite(*outputs: Tensor) -> None:
    """Two extremes an image and output: NaN and infinities are among them, and one copy tells."""
    for_image = zip(*outputs, strict=True)
    extremes = [torch.stack([end.float() for x_XHW in image for end in x_XHW.aminmax()]) for image in for_image]
    for index, finite in enumerate(torch.stack(extremes).isfinite().all(1).tolist()):
        if not finite:
            raise TesseraError(f"decode: image {index} of the batch: the network's output is not finite")


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


def assemble(
    instances_HW: NDArray[np.int32],
    classes_HW: NDArray[np.int32],
    size: Size,
    labels: LabelTable,
    config: DecodeConfig,
) -> PanopticMap:
    """Instances with their most frequent thing class; outside of them stuff where the semantic head says so.

    Void where the two disagree: thing pixels outside of all instances, instances without a thing pixel.
    """
    found = int(instances_HW.max()) + 1
    category_M = _categories(_count_classes(instances_HW, classes_HW, found, len(labels)), labels)
    dense_HW = _paint(instances_HW, classes_HW, _labels_of(category_M), found)
    return _tabulate(resize_labels(dense_HW, size), category_M, labels, config)


@njit(cache=True, nogil=True)
def _count_classes(
    instances_HW: NDArray[np.int32], classes_HW: NDArray[np.int32], found: int, categories: int
) -> NDArray[np.int64]:
    """Pixels of each instance and class, and at the end of no instance; int64 (N + 1, C)."""
    counts_NC = np.zeros((found + 1, categories), np.int64)
    for y in range(instances_HW.shape[0]):
        for x in range(instances_HW.shape[1]):
            counts_NC[instances_HW[y, x], classes_HW[y, x]] += 1  # NO_INSTANCE, -1, is the last row
    return counts_NC


def _categories(counts_NC: NDArray[np.integer[Any]], labels: LabelTable) -> NDArray[np.int64]:
    """Counts of _count_classes -> category of each slot, or -1 where it stays empty; int64 (N + C,).

    Slots are the instances, then the classes outside of them.
    """
    votes_NC = counts_NC[:-1] * labels.is_thing
    category_N = np.where(votes_NC.any(1), votes_NC.argmax(1), -1)
    category_C = np.where((counts_NC[-1] > 0) & ~labels.is_thing, np.arange(len(labels)), -1)
    return np.concatenate([category_N, category_C])


def _labels_of(category_M: NDArray[np.int64]) -> NDArray[np.int64]:
    """The label of each slot: 1, 2, ..., and 0 where it stays empty."""
    return np.where(category_M >= 0, np.cumsum(category_M >= 0), 0)


@njit(cache=True, nogil=True)
def _paint(
    instances_HW: NDArray[np.int32], classes_HW: NDArray[np.int32], label_M: NDArray[np.int64], found: int
) -> NDArray[np.uint16]:
    """The label of each pixel's slot; uint16 (H, W)."""
    dense_HW = np.empty(instances_HW.shape, np.uint16)
    for y in range(instances_HW.shape[0]):
        for x in range(instances_HW.shape[1]):
            instance = instances_HW[y, x]
            dense_HW[y, x] = label_M[found + classes_HW[y, x] if instance == NO_INSTANCE else instance]
    return dense_HW


def assemble_on_device(
    instances_BHW: Tensor, classes_BHW: Tensor, sizes: Sequence[Size], labels: LabelTable, config: DecodeConfig
) -> list[PanopticMap]:
    """assemble of every image, on the tensors' device."""
    instances_BP, classes_BP = instances_BHW.flatten(1).long(), classes_BHW.flatten(1)
    found = int(instances_BP.max()) + 1
    none_BP = instances_BP == NO_INSTANCE
    pair_BP = instances_BP.where(~none_BP, found) * len(labels) + classes_BP
    counts_BQ = pair_BP.new_zeros(len(pair_BP), (found + 1) * len(labels))
    counts_BQ.scatter_add_(1, pair_BP, torch.ones_like(pair_BP))
    counts_BNC = counts_BQ.unflatten(1, (found + 1, len(labels))).cpu().numpy()
    category_BM = [_categories(counts_NC, labels) for counts_NC in counts_BNC]
    label_BM = torch.from_numpy(np.stack([_labels_of(category_M) for category_M in category_BM])).to(pair_BP.device)
    dense_BP = label_BM.gather(1, torch.where(none_BP, found + classes_BP, instances_BP))
    resized = _resized_to_host(dense_BP.view_as(classes_BHW), sizes)
    return [
        _tabulate(dense_HW, category_M, labels, config)
        for dense_HW, category_M in zip(resized, category_BM, strict=True)
    ]


def _resized_to_host(dense_BHW: Tensor, sizes: Sequence[Size]) -> list[NDArray[np.uint16]]:
    """resize_labels of every image on the device, then one copy; the rule itself says which pixels to take."""
    steps = [
        resize_labels(np.arange(old)[:, None], (new, 1))[:, 0]
        for size in sizes
        for old, new in zip(dense_BHW.shape[1:], size, strict=True)
    ]
    on_device = torch.from_numpy(np.concatenate(steps)).to(dense_BHW.device).split([len(step) for step in steps])
    places = zip(on_device[::2], on_device[1::2], strict=True)
    resized = [dense_HW[y_H[:, None], x_W] for dense_HW, (y_H, x_W) in zip(dense_BHW.short(), places, strict=True)]
    on_host = torch.cat([dense_HW.flatten() for dense_HW in resized]).cpu().numpy().view(np.uint16)
    ends = np.cumsum([height * width for height, width in sizes])
    return [dense_P.reshape(size) for dense_P, size in zip(np.split(on_host, ends[:-1]), sizes, strict=True)]


def _tabulate(
    dense_HW: NDArray[np.uint16], category_M: NDArray[np.int64], labels: LabelTable, config: DecodeConfig
) -> PanopticMap:
    """Measure the segments of all slots. One that lost its pixels has no row; small stuff becomes void."""
    filled = [int(category) for category in category_M if category >= 0]
    if len(filled) > np.iinfo(np.uint16).max:
        raise TesseraError(f"decode: {len(filled)} segments in one image do not fit uint16; raise min_area")
    segments = [Segment(0, category, bool(labels.is_thing[category])) for category in filled]
    kept, ids_HW = [], dense_HW.astype(np.int32)
    for segment in measured(dense_HW, segments):
        if not segment.is_thing and segment.area < config.min_stuff_area * ids_HW.size:
            ids_HW[ids_HW == segment.id] = 0
        elif segment.area > 0:
            kept.append(segment)
    return PanopticMap(ids_HW, tuple(kept))


def class_picture(classes_HW: Tensor, labels: LabelTable) -> NDArray[np.uint8]:
    """Contiguous ids -> RGB (H, W, 3)."""
    return labels.colors[classes_HW.cpu().numpy()]


def centroid_picture(instance_XHW: Tensor, config: GeneralistConfig) -> NDArray[np.uint8]:
    """Voted centroid as colour: red = x, green = y, blue where there is an instance; void is black."""
    votes_2HW, inside_HW = cast_votes_on_host(instance_XHW.cpu(), config)
    share_2HW = (votes_2HW + FIXED / 2) / (FIXED * config.decode.grid)
    rgb_3HW = np.concatenate([share_2HW, np.full((1, *inside_HW.shape), 0.6)]) * inside_HW
    return (255 * rgb_3HW.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)
