"""From instances and classes of pixels to panoptic maps, for every method that decodes pixel by pixel.

Two paths do the same to the bit: Numba on the CPU, image by image, and torch on any other device, batch by batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from infra.errors import TesseraError
from preprocessing.geometry import Frame, Size, resize_labels
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment, measured
from preprocessing.pictures import Picture

NO_INSTANCE = -1
_STREAM = 2048
"""Pixels whose classes are compared at once: only the best so far stay in the first cache."""


@dataclass(frozen=True)
class Assembly:
    """What the maps of one method have in common."""

    labels: LabelTable
    keep_aspect: bool = False
    """How the images came onto the grid, see geometry.Frame; maps leave it the same way."""
    min_stuff_area: float = 0.0
    """Share of the image's pixels under which a stuff segment becomes void."""

    def inner(self, grid: Sequence[int], size: Size) -> Size:
        """The part of the network's grid that an image of this size fills."""
        return Frame(size=(grid[0], grid[1]), keep_aspect=self.keep_aspect).inner(size)


def refuse_infinite(*outputs: Tensor) -> None:
    """Raise TesseraError naming the place in the batch of an output, (B, ...), that is not finite.

    Two extremes an image and output: NaN and infinities are among them, and one copy tells.
    """
    for_image = zip(*outputs, strict=True)
    extremes = [torch.stack([end.float() for x in image for end in x.aminmax()]) for image in for_image]
    for index, finite in enumerate(torch.stack(extremes).isfinite().all(1).tolist()):
        if not finite:
            raise TesseraError(f"decode: image {index} of the batch: the network's output is not finite")


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


def assemble(
    instances_HW: NDArray[np.int32], classes_HW: NDArray[np.int32], size: Size, assembly: Assembly
) -> PanopticMap:
    """Instances with their most frequent thing class; outside of them stuff where the semantic head says so.

    Void where the two disagree: thing pixels outside of all instances, instances without a thing pixel. instances:
    0.. or NO_INSTANCE; classes: contiguous ids; both of the whole grid. size: height, width of the image and of the
    result, reached by nearest-neighbour resizing.
    """
    height, width = assembly.inner(classes_HW.shape, size)
    instances_HW, classes_HW = instances_HW[:height, :width], classes_HW[:height, :width]
    found = int(instances_HW.max()) + 1
    category_M = _categories(_count_classes(instances_HW, classes_HW, found, len(assembly.labels)), assembly.labels)
    dense_HW = _paint(instances_HW, classes_HW, _labels_of(category_M), found)
    return _tabulate(resize_labels(dense_HW, size), category_M, assembly)


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
    instances_BHW: Tensor, classes_BHW: Tensor, sizes: Sequence[Size], assembly: Assembly
) -> list[PanopticMap]:
    """assemble of every image, on the tensors' device."""
    labels, inner = assembly.labels, [assembly.inner(classes_BHW.shape[1:], size) for size in sizes]
    inside_BP = inside_frame(inner, classes_BHW).flatten(1)
    instances_BP, classes_BP = instances_BHW.flatten(1).long(), classes_BHW.flatten(1)
    found = int(instances_BP.max()) + 1
    none_BP = instances_BP == NO_INSTANCE
    pair_BP = instances_BP.where(~none_BP, found) * len(labels) + classes_BP
    counts_BQ = pair_BP.new_zeros(len(pair_BP), (found + 1) * len(labels))
    counts_BQ.scatter_add_(1, pair_BP, inside_BP.long())
    counts_BNC = counts_BQ.unflatten(1, (found + 1, len(labels))).cpu().numpy()
    category_BM = [_categories(counts_NC, labels) for counts_NC in counts_BNC]
    label_BM = torch.from_numpy(np.stack([_labels_of(category_M) for category_M in category_BM])).to(pair_BP.device)
    dense_BP = label_BM.gather(1, torch.where(none_BP, found + classes_BP, instances_BP))
    resized = _resized_to_host(dense_BP.view_as(classes_BHW), inner, sizes)
    return [
        _tabulate(dense_HW, category_M, assembly) for dense_HW, category_M in zip(resized, category_BM, strict=True)
    ]


def inside_frame(inner: Sequence[Size], like_BHW: Tensor) -> Tensor:
    """Which pixels of the grid belong to the image and not to the padding; bool (B, H, W)."""
    height_B1, width_B1 = torch.tensor(inner, device=like_BHW.device).view(-1, 2, 1).unbind(1)
    y_H, x_W = (torch.arange(side, device=like_BHW.device) for side in like_BHW.shape[1:])
    return (y_H < height_B1)[:, :, None] & (x_W < width_B1)[:, None]


def _resized_to_host(dense_BHW: Tensor, inner: Sequence[Size], sizes: Sequence[Size]) -> list[NDArray[np.uint16]]:
    """resize_labels of every image on the device, then one copy; the rule itself says which pixels to take."""
    steps = [
        resize_labels(np.arange(old)[:, None], (new, 1))[:, 0]
        for before, after in zip(inner, sizes, strict=True)
        for old, new in zip(before, after, strict=True)
    ]
    on_device = torch.from_numpy(np.concatenate(steps)).to(dense_BHW.device).split([len(step) for step in steps])
    places = zip(on_device[::2], on_device[1::2], strict=True)
    resized = [dense_HW[y_H[:, None], x_W] for dense_HW, (y_H, x_W) in zip(dense_BHW.short(), places, strict=True)]
    on_host = torch.cat([dense_HW.flatten() for dense_HW in resized]).cpu().numpy().view(np.uint16)
    ends = np.cumsum([height * width for height, width in sizes])
    return [dense_P.reshape(size) for dense_P, size in zip(np.split(on_host, ends[:-1]), sizes, strict=True)]


def _tabulate(dense_HW: NDArray[np.uint16], category_M: NDArray[np.int64], assembly: Assembly) -> PanopticMap:
    """Measure the segments of all slots. One that lost its pixels has no row; small stuff becomes void."""
    filled = [int(category) for category in category_M if category >= 0]
    if len(filled) > np.iinfo(np.uint16).max:
        raise TesseraError(f"decode: {len(filled)} segments in one image do not fit uint16")
    segments = [Segment(0, category, bool(assembly.labels.is_thing[category])) for category in filled]
    kept, ids_HW = [], dense_HW.astype(np.int32)
    for segment in measured(dense_HW, segments):
        if not segment.is_thing and segment.area < assembly.min_stuff_area * ids_HW.size:
            ids_HW[ids_HW == segment.id] = 0
        elif segment.area > 0:
            kept.append(segment)
    return PanopticMap(ids_HW, tuple(kept))


SEMANTIC_VIEW = "predicted semantic: the class that each pixel is most likely of, before objects are told apart"
"""Title of class_picture."""


def class_picture(classes_HW: Tensor, labels: LabelTable) -> Picture:
    """Contiguous ids -> the categories' colours."""
    return labels.colors[classes_HW.cpu().numpy()]


def certain(classes_BHW: Tensor, count: int) -> Tensor:
    """Logits, float32 (B, count, H, W), that leave no doubt about a class."""
    images, height, width = classes_BHW.shape
    logits_BCHW = torch.zeros(images, count, height, width, device=classes_BHW.device)
    return logits_BCHW.scatter_(1, classes_BHW[:, None], 10.0)
