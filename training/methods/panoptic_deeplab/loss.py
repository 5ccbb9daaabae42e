"""Losses of Panoptic-DeepLab (D), in float32: of classes, centres and offsets.

D averages over the pixels of a batch, and over those with weight; here each image is averaged alone and then the
images, so that a step's gradient does not depend on how its batch is split (ours).
"""

import torch.nn.functional as F
from torch import Tensor

from training.batch import VOID
from training.methods.panoptic_deeplab.config import PanopticDeeplabConfig
from training.methods.panoptic_deeplab.targets import Targets


def losses(
    logits_BCHW: Tensor, heat_B1HW: Tensor, offset_B2HW: Tensor, targets: Targets, config: PanopticDeeplabConfig
) -> dict[str, Tensor]:
    """Weighted scalars by name."""
    return {
        "semantic": class_loss(logits_BCHW, targets, config.hardest),
        "centres": config.centre_weight * heat_loss(heat_B1HW, targets),
        "offsets": config.offset_weight * offset_loss(offset_B2HW, targets),
    }


def class_loss(logits_BCHW: Tensor, targets: Targets, hardest: float) -> Tensor:
    """Cross-entropy x weight, 0 on void: mean of the `hardest` share of an image's pixels, mean over images."""
    loss_BHW = F.cross_entropy(logits_BCHW, targets.classes_BHW, ignore_index=VOID, reduction="none")
    loss_BP = (loss_BHW * targets.class_weight_BHW).flatten(1)
    if hardest < 1:
        loss_BP = loss_BP.topk(max(1, int(hardest * loss_BP.shape[1])), sorted=False).values
    return loss_BP.mean()


def heat_loss(heat_B1HW: Tensor, targets: Targets) -> Tensor:
    """Squared error of the heat, mean over an image's pixels with weight, mean over images."""
    error_BHW = (heat_B1HW[:, 0] - targets.heat_BHW).square()
    return _weighted_mean(error_BHW, targets.heat_weight_BHW)


def offset_loss(offset_B2HW: Tensor, targets: Targets) -> Tensor:
    """|dy| + |dx|, mean over an image's pixels with weight, mean over images."""
    error_BHW = (offset_B2HW - targets.offset_B2HW).abs().sum(1)
    return _weighted_mean(error_BHW, targets.offset_weight_BHW)


def _weighted_mean(error_BHW: Tensor, weight_BHW: Tensor) -> Tensor:
    """0 for an image without weight."""
    sum_B, weight_B = ((error_BHW * weight_BHW).sum((1, 2)), weight_BHW.sum((1, 2)))
    return (sum_B / weight_B.clamp(min=1)).mean()
