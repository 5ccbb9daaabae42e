"""What Panoptic-DeepLab should say of each pixel: its class, the heat of centres, the way to its own centre."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from preprocessing.geometry import Size
from training.batch import VOID, Batch
from training.methods.panoptic_deeplab.config import PanopticDeeplabConfig


@dataclass(frozen=True)
class Targets:
    """Dense targets; all weights are float32."""

    classes_BHW: Tensor
    """int64 contiguous ids, VOID where there is none."""
    class_weight_BHW: Tensor
    """1, more on small things, 0 on void."""
    heat_BHW: Tensor
    """float32: 1 at each centre, a Gaussian around it, the largest where they meet."""
    heat_weight_BHW: Tensor
    """1, 0 on void and crowds, whose centres nobody knows."""
    offset_B2HW: Tensor
    """float32, y then x, pixels: from each pixel of a thing to its centroid, 0 elsewhere."""
    offset_weight_BHW: Tensor
    """1 on things that are no crowd."""


def targets(batch: Batch, config: PanopticDeeplabConfig) -> Targets:
    """Gather a batch's segment tables to pixels, on its device (D's target generator, by segment instead of mask)."""
    size = (batch.labels_BHW.shape[1], batch.labels_BHW.shape[2])
    centroid_BN2 = centroids(batch)
    small_BN = batch.thing_BN & (batch.area_BN < config.small_area)
    weight_BN = 1 + (config.small_weight - 1) * small_BN
    classes_BHW, thing_BHW = batch.classes_BHW, batch.to_pixels(batch.thing_BN)
    labelled_BHW = classes_BHW != VOID
    return Targets(
        classes_BHW,
        batch.to_pixels(weight_BN) * labelled_BHW,
        heat(centroid_BN2, batch.thing_BN, size, config.sigma),
        (labelled_BHW & ~batch.to_pixels(batch.crowd_BN)).float(),
        offsets(batch, centroid_BN2) * thing_BHW[:, None],
        thing_BHW.float(),
    )


def with_crowds(batch: Batch) -> Batch:
    """The batch with each crowd as one thing, at the mean of its pixels: no network is told so, but a perfect one may
    say so, and PQ ignores an instance that lies on a crowd."""
    labels_BP = batch.labels_BHW.long().flatten(1)
    height, width = batch.labels_BHW.shape[1:]
    place_P2 = torch.cartesian_prod(*(torch.arange(side, device=labels_BP.device) for side in (height, width)))
    share_P2 = (2 * place_P2.flip(-1) + 1) / place_P2.new_tensor([width, height]) - 1
    index_BP2 = labels_BP[..., None].expand(-1, -1, 2)
    sums_BN2 = torch.zeros_like(batch.centroid_BN2).scatter_add(1, index_BP2, share_P2.expand(len(labels_BP), -1, -1))
    mean_BN2 = sums_BN2 / batch.area_BN.clamp(min=1)[..., None]
    centroid_BN2 = torch.where(batch.crowd_BN[..., None], mean_BN2, batch.centroid_BN2)
    thing_BN, none_BN = batch.thing_BN | batch.crowd_BN, torch.zeros_like(batch.crowd_BN)
    return replace(batch, thing_BN=thing_BN, crowd_BN=none_BN, centroid_BN2=centroid_BN2)


def centroids(batch: Batch) -> Tensor:
    """y, x of each segment's centroid in pixels, centres at integers; float32 (B, N, 2)."""
    height, width = batch.labels_BHW.shape[1:]
    return ((batch.centroid_BN2.flip(-1) + 1) * batch.centroid_BN2.new_tensor([height, width]) - 1) / 2


def heat(centroid_BN2: Tensor, thing_BN: Tensor, size: Size, sigma: float) -> Tensor:
    """Largest of the things' Gaussians, float32 (B, H, W), peaks of 1 at the pixels nearest to the centroids (D; not
    cut off at 3 sigma, ours)."""
    peak_BN2 = centroid_BN2.round()
    y_BNH, x_BNW = (
        torch.exp(-((torch.arange(side, device=peak_BN2.device) - peak_BN2[..., axis, None]) ** 2) / (2 * sigma**2))
        for axis, side in enumerate(size)
    )
    x_BNW = x_BNW * thing_BN[..., None]
    heat_BHW = torch.zeros(len(peak_BN2), *size, device=peak_BN2.device)
    for y_BH, x_BW in zip(y_BNH.unbind(1), x_BNW.unbind(1), strict=True):  # row by row: no (B, N, H, W) is made
        heat_BHW = torch.maximum(heat_BHW, y_BH[:, :, None] * x_BW[:, None])
    return heat_BHW


def offsets(batch: Batch, centroid_BN2: Tensor) -> Tensor:
    """From each pixel to the centroid of its segment, y then x in pixels: float32 (B, 2, H, W)."""
    height, width = batch.labels_BHW.shape[1:]
    y_H, x_W = (torch.arange(side, device=centroid_BN2.device) for side in (height, width))
    y_BHW, x_BHW = (batch.to_pixels(part_BN) for part_BN in centroid_BN2.unbind(-1))
    return torch.stack([y_BHW - y_H[:, None], x_BHW - x_W], 1)
