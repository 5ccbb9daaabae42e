"""From classes, heat of centres and offsets to panoptic maps (D's post-processing).

Peaks of the heat are centres; a pixel of a thing class belongs to the centre that it points nearest to; an instance
has the most frequent class of its pixels. It runs on the network's grid, where D first resizes to the image's size.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from preprocessing.geometry import Size
from preprocessing.panoptic_map import PanopticMap
from preprocessing.pictures import Picture
from training.methods.panoptic_deeplab.config import DecodeConfig
from training.parts.assemble import (
    NO_INSTANCE,
    Assembly,
    assemble,
    assemble_on_device,
    best_classes,
    inside_frame,
    refuse_infinite,
)

Centres = NDArray[np.float32]
"""(K, 2): y, x in pixels of the grid, in reading order."""


def decode(
    logits_BCHW: Tensor,
    heat_B1HW: Tensor,
    offset_B2HW: Tensor,
    sizes: Sequence[Size],
    assembly: Assembly,
    config: DecodeConfig,
) -> list[PanopticMap]:
    """A batch of network outputs on any device, float32 or bf16 -> panoptic maps on the host.

    logits: by contiguous id. heat: scores of centres. offset: to the centre, y then x, pixels of the grid. sizes:
    height, width of each image and result. Raises TesseraError naming the place in the batch of an output that is not
    finite.
    """
    if not sizes:
        return []
    refuse_infinite(logits_BCHW, heat_B1HW, offset_B2HW)
    inner = [assembly.inner(heat_B1HW.shape[2:], size) for size in sizes]
    heat_BHW = heat_B1HW[:, 0].float().where(inside_frame(inner, heat_B1HW[:, 0]), -torch.inf)
    centres = [find_centres(heat_HW, config) for heat_HW in heat_BHW]
    path = decode_on_host if heat_BHW.device.type == "cpu" else decode_on_device
    return path(logits_BCHW, offset_B2HW.float(), centres, sizes, assembly)


def decode_on_host(
    logits_BCHW: Tensor, offset_B2HW: Tensor, centres: Sequence[Centres], sizes: Sequence[Size], assembly: Assembly
) -> list[PanopticMap]:
    """Tensors on the CPU. centres: of find_centres, an image."""
    maps = []
    for logits_CHW, offset_2HW, centre_K2, size in zip(logits_BCHW, offset_B2HW, centres, sizes, strict=True):
        classes_HW = best_classes(logits_CHW.float().contiguous().numpy())
        thing_HW = assembly.labels.is_thing[classes_HW]
        instances_HW = nearest_centres(offset_2HW.contiguous().numpy(), thing_HW, centre_K2)
        maps.append(assemble(instances_HW, classes_HW, size, assembly))
    return maps


def decode_on_device(
    logits_BCHW: Tensor, offset_B2HW: Tensor, centres: Sequence[Centres], sizes: Sequence[Size], assembly: Assembly
) -> list[PanopticMap]:
    """The same on the tensors' device."""
    classes_BHW = logits_BCHW.argmax(1)
    thing_BHW = torch.from_numpy(assembly.labels.is_thing).to(classes_BHW.device)[classes_BHW]
    found = [
        nearest_centres_on_device(offset_2HW, thing_HW, centre_K2)
        for offset_2HW, thing_HW, centre_K2 in zip(offset_B2HW, thing_BHW, centres, strict=True)
    ]
    return assemble_on_device(torch.stack(found), classes_BHW, sizes, assembly)


def find_centres(heat_HW: Tensor, config: DecodeConfig) -> Centres:
    """Places of the best peaks of a score map in reading order, y then x: float32 (K, 2), on the host.

    A peak is over the threshold and the highest of its window. Of a plateau, pixels side by side with the same score
    as bf16 and the enlarging at the image's borders make them, only the first in reading order is one (ours: else one
    object gets as many centres as its peak has pixels).
    """
    side = config.window
    rows_1HW = F.max_pool2d(heat_HW[None], (side, 1), 1, (side // 2, 0))
    peak_HW = (heat_HW == F.max_pool2d(rows_1HW, (1, side), 1, (0, side // 2))[0]) & (heat_HW > config.threshold)
    place_N2 = peak_HW.nonzero()
    score_N = heat_HW[place_N2[:, 0], place_N2[:, 1]].cpu().numpy()
    on_host_N2 = place_N2.cpu().numpy()
    first_N = first_of_regions(on_host_N2, heat_HW.shape[0], heat_HW.shape[1])
    place_K2, score_K = on_host_N2[first_N], score_N[first_N]
    best_K = np.sort(np.argsort(-score_K, kind="stable")[: config.most])
    return place_K2[best_K].astype(np.float32)


@njit(cache=True, nogil=True)
def first_of_regions(place_N2: NDArray[np.int64], height: int, width: int) -> NDArray[np.bool_]:
    """Which of these pixels, in reading order, are the first of their 8-connected region; bool (N,)."""
    waiting_HW = np.zeros((height + 2, width + 2), np.bool_)
    for y, x in place_N2:
        waiting_HW[y + 1, x + 1] = True
    first_N, stack_N2, found = np.zeros(len(place_N2), np.bool_), np.empty_like(place_N2), 0
    for n in range(len(place_N2)):
        if waiting_HW[place_N2[n, 0] + 1, place_N2[n, 1] + 1]:
            first_N[n] = True
            stack_N2[0], found = place_N2[n], 1
            waiting_HW[place_N2[n, 0] + 1, place_N2[n, 1] + 1] = False
        while found:
            found -= 1
            y, x = stack_N2[found, 0], stack_N2[found, 1]
            for near_y in range(y, y + 3):  # of the padded map
                for near_x in range(x, x + 3):
                    if waiting_HW[near_y, near_x]:
                        waiting_HW[near_y, near_x] = False
                        stack_N2[found, 0], stack_N2[found, 1] = near_y - 1, near_x - 1
                        found += 1
    return first_N


@njit(cache=True, nogil=True)
def nearest_centres(
    offset_2HW: NDArray[np.float32], thing_HW: NDArray[np.bool_], centre_K2: Centres
) -> NDArray[np.int32]:
    """The centre that each pixel of a thing points nearest to, the first of equals; int32 (H, W)."""
    instances_HW = np.full(thing_HW.shape, NO_INSTANCE, np.int32)
    for y in range(thing_HW.shape[0]):
        for x in range(thing_HW.shape[1]):
            if thing_HW[y, x]:
                to_y, to_x = np.float32(y) + offset_2HW[0, y, x], np.float32(x) + offset_2HW[1, y, x]
                least = np.float32(np.inf)
                for k in range(len(centre_K2)):
                    dy, dx = to_y - centre_K2[k, 0], to_x - centre_K2[k, 1]
                    d2 = dy * dy + dx * dx
                    if d2 < least:
                        least, instances_HW[y, x] = d2, k
    return instances_HW


def nearest_centres_on_device(offset_2HW: Tensor, thing_HW: Tensor, centre_K2: Centres) -> Tensor:
    """nearest_centres on the tensors' device, int64 (H, W)."""
    y_H, x_W = (torch.arange(side, device=thing_HW.device) for side in thing_HW.shape)
    to_y_HW, to_x_HW = offset_2HW[0] + y_H[:, None], offset_2HW[1] + x_W
    least_HW = torch.full_like(to_y_HW, torch.inf)
    instances_HW = torch.full_like(thing_HW, NO_INSTANCE, dtype=torch.long)
    for k, (y, x) in enumerate(centre_K2.tolist()):  # one by one: no (K, H, W) is made
        d2_HW = (to_y_HW - y).square() + (to_x_HW - x).square()
        nearer_HW = d2_HW < least_HW
        least_HW, instances_HW = d2_HW.where(nearer_HW, least_HW), instances_HW.masked_fill(nearer_HW, k)
    return instances_HW.where(thing_HW, NO_INSTANCE)


HEAT_VIEW = "heat of centres: bright where the network sees the centre of an object"
"""Title of heat_picture."""
OFFSET_VIEW = (
    "offsets: the hue is the direction from a pixel to the centre of its object, so that all hues should stand around "
    "each centre; pale where the way is short"
)
"""Title of offset_picture."""


def heat_picture(heat_HW: Tensor) -> Picture:
    """Scores from 0, black, to 1, white."""
    gray_HW = (255 * heat_HW.float().cpu().clamp(0, 1)).byte().numpy()
    return gray_HW[..., None].repeat(3, -1)


def offset_picture(offset_2HW: Tensor) -> Picture:
    """Direction as hue, the longest offset of the image in full colour, none in white."""
    y_HW, x_HW = offset_2HW.float().cpu().numpy()
    length_HW = np.hypot(y_HW, x_HW)
    share_HW = length_HW / max(float(length_HW.max()), 1e-6)
    turns_3 = 2 * np.pi / 3 * np.arange(3)
    hue_HW3 = 0.5 + 0.5 * np.cos(np.arctan2(y_HW, x_HW)[..., None] - turns_3)
    return (255 * (1 - share_HW[..., None] * (1 - hue_HW3))).astype(np.uint8)
