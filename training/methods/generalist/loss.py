"""Losses of the generalist method (G, section on losses), in float32.

Shapes: B images, C classes, E = 4 L embedding channels, H x W pixels, N rows of the segment table.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from training.batch import Batch
from training.methods.generalist.targets import IGNORE, Targets

_EPSILON = 1e-8  # under square roots, whose gradient at 0 is infinite


def semantic_loss(logits_BCHW: Tensor, targets: Targets) -> Tensor:
    """Cross-entropy x w, mean over the pixels that have a class (the normaliser is ours)."""
    loss_BHW = F.cross_entropy(logits_BCHW, targets.classes_BHW, ignore_index=IGNORE, reduction="none")
    labelled = (targets.classes_BHW != IGNORE).sum().clamp(min=1)
    return (loss_BHW * targets.semantic_weight_BHW).sum() / labelled


def embedding_loss(predicted_BEHW: Tensor, targets: Targets, squared: bool) -> Tensor:
    """Mean of the u half's and the v half's distance to the target embedding, x w, mean over all pixels."""
    difference_B2EHW = (predicted_BEHW - targets.embedding_BEHW).unflatten(1, (2, -1))
    d2_B2HW = difference_B2EHW.square().sum(2)
    distance_B2HW = d2_B2HW if squared else (d2_B2HW + _EPSILON).sqrt()
    return (distance_B2HW.mean(1) * targets.instance_weight_BHW).mean()


def embedding_variation(predicted_BEHW: Tensor) -> Tensor:
    """Total variation: Euclidean norm between embeddings of neighbours, right and down, mean over pairs."""
    return _pair_mean(lambda a, b: ((a - b).square().sum(1) + _EPSILON).sqrt(), predicted_BEHW, predicted_BEHW)


def semantic_variation(logits_BCHW: Tensor) -> Tensor:
    """Total variation: cross-entropy H(P, P of the neighbour), both directions, halved, mean over pairs."""
    log_p = logits_BCHW.log_softmax(1)
    p = log_p.exp()
    forward = _pair_mean(lambda a, b: -(a * b).sum(1), p, log_p)
    return (forward + _pair_mean(lambda a, b: -(a * b).sum(1), log_p, p)) / 2


def _pair_mean(distance: Callable[[Tensor, Tensor], Tensor], left_BXHW: Tensor, right_BXHW: Tensor) -> Tensor:
    """Mean of `distance` over horizontal and vertical neighbours."""
    across = distance(left_BXHW[..., :, :-1], right_BXHW[..., :, 1:])
    down = distance(left_BXHW[..., :-1, :], right_BXHW[..., 1:, :])
    return (across.sum() + down.sum()) / max(1, across.numel() + down.numel())


def dice_loss(predicted_BEHW: Tensor, codes_BNE: Tensor, batch: Batch) -> Tensor:
    """Generalised Dice over the instances of each image, weight 1 / area; mean over images with instances.

    p_l = exp(-dx^2) exp(-dy^2), the distances of a pixel's embedding to instance l's. The square is
    expanded, |y|^2 - 2 y.c + |c|^2, so that nothing larger than B x N x pixels is made. Crowd pixels are
    left out: no instance can claim them.
    """
    y_BEP = predicted_BEHW.flatten(2)
    labels_BP = batch.labels_BHW.flatten(1)
    free_BP = ~batch.crowd_BN.gather(1, labels_BP)
    square_BP, norm_BN = y_BEP.square().sum(1), codes_BNE.square().sum(-1)
    d2_BNP = square_BP[:, None] - 2 * torch.bmm(codes_BNE, y_BEP) + norm_BN[..., None]
    p_BNP = torch.exp(-d2_BNP.clamp(min=0)) * free_BP[:, None]
    weight_BN = batch.thing_BN / batch.area_BN.clamp(min=1)
    inside_BN = torch.zeros_like(weight_BN)
    own_B1P = p_BNP.gather(1, labels_BP[:, None])  # each pixel's probability for its own instance
    inside_BN = inside_BN.scatter_add(1, labels_BP, own_B1P[:, 0])
    overlap_B = (weight_BN * inside_BN).sum(1)
    total_B = (weight_BN * (p_BNP.sum(-1) + batch.area_BN)).sum(1)
    has_things_B = batch.thing_BN.any(1)
    loss_B = 1 - 2 * overlap_B / total_B.clamp(min=_EPSILON)
    return (loss_B * has_things_B).sum() / has_things_B.sum().clamp(min=1)
