"""Losses of the generalist method (G, section on losses), in float32.

Shapes: B images, C classes, X channels of the instance head, H x W pixels, N rows of the segment table.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.batch import VOID, Batch
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.targets import InstanceTargets, SemanticTargets, counted

_EPSILON = 1e-8  # under square roots, whose gradient at 0 is infinite


def semantic_losses(logits_BCHW: Tensor, targets: SemanticTargets, config: GeneralistConfig) -> dict[str, Tensor]:
    """Weighted losses of the semantic task by name."""
    log_p_BHWC = log_probabilities(logits_BCHW)
    result = {"semantic": class_loss(log_p_BHWC, targets)}
    if config.total_variation:
        result["semantic_tv"] = config.total_variation * class_variation(log_p_BHWC)
    return result


def instance_losses(
    predicted_BXHW: Tensor, targets: InstanceTargets, batch: Batch, config: GeneralistConfig
) -> dict[str, Tensor]:
    """Weighted losses of the instance task by name; predicted: what the head says, in the config's encoding."""
    if config.encoding == "classes":
        halves_BHWK = [log_probabilities(half_BKHW) for half_BKHW in predicted_BXHW.chunk(2, 1)]
        result = {"instance": cell_loss(halves_BHWK, targets)}
        variation = torch.stack([class_variation(log_p_BHWK) for log_p_BHWK in halves_BHWK]).mean()
    else:
        parts = 2 if config.encoding == "embedding" else 1
        result = {"instance": code_loss(predicted_BXHW, targets, parts, config.squared)}
        variation = code_variation(predicted_BXHW)
    if config.total_variation:
        result["instance_tv"] = config.total_variation * variation
    if config.dice:
        claims = cell_claims if config.encoding == "classes" else code_claims
        claims_BNP = claims(predicted_BXHW, targets.codes_BNX)
        result["dice"] = config.dice * dice_loss(claims_BNP, batch, counted(batch, config))
    return result


def log_probabilities(logits_BCHW: Tensor) -> Tensor:
    """Log softmax over classes, (B, H, W, C): with the classes last it is one pass over channels-last memory."""
    return logits_BCHW.permute(0, 2, 3, 1).log_softmax(-1)


def class_loss(log_p_BHWC: Tensor, targets: SemanticTargets) -> Tensor:
    """Cross-entropy x w, 0 on void, mean over all pixels (the normaliser is ours: it makes workers' shares equal)."""
    loss_P = F.nll_loss(log_p_BHWC.flatten(0, 2), targets.classes_BHW.flatten(), ignore_index=VOID, reduction="none")
    return (loss_P * targets.weight_BHW.flatten()).mean()


def code_loss(predicted_BXHW: Tensor, targets: InstanceTargets, parts: int, squared: bool) -> Tensor:
    """Distance to the target code x w, mean over all pixels and over the code's parts.

    parts: 2 for embeddings, whose u and v halves are measured apart (G); 1 for u, v and "is instance".
    """
    difference_BSXHW = (predicted_BXHW - targets.dense_BXHW).unflatten(1, (parts, -1))
    d2_BSHW = difference_BSXHW.square().sum(2)
    distance_BSHW = d2_BSHW if squared else (d2_BSHW + _EPSILON).sqrt()
    return (distance_BSHW.mean(1) * targets.weight_BHW).mean()


def cell_loss(halves_BHWK: Sequence[Tensor], targets: InstanceTargets) -> Tensor:
    """Cross-entropy of the cell of u and of that of v, x w, mean over both and over all pixels."""
    losses = [
        F.nll_loss(log_p_BHWK.flatten(0, 2), cells_BHW.flatten(), reduction="none")
        for log_p_BHWK, cells_BHW in zip(halves_BHWK, targets.dense_BXHW.unbind(1), strict=True)
    ]
    return (torch.stack(losses).mean(0) * targets.weight_BHW.flatten()).mean()


def code_variation(predicted_BXHW: Tensor) -> Tensor:
    """Total variation: Euclidean norm between codes of neighbours, right and down, mean over pairs."""
    right = (predicted_BXHW[..., :, :-1] - predicted_BXHW[..., :, 1:]).square().sum(1)
    down = (predicted_BXHW[..., :-1, :] - predicted_BXHW[..., 1:, :]).square().sum(1)
    return ((right + _EPSILON).sqrt().sum() + (down + _EPSILON).sqrt().sum()) / _pairs(predicted_BXHW[:, 0])


def class_variation(log_p_BHWC: Tensor) -> Tensor:
    """Total variation: cross-entropy H(P, P of the neighbour), both directions, halved, mean over pairs."""
    return _NeighbourEntropy.apply(log_p_BHWC) / _pairs(log_p_BHWC[..., 0])


class _NeighbourEntropy(torch.autograd.Function):
    """Sum of -(p_a . log p_b + p_b . log p_a) / 2 over neighbouring pixels a, b; of log p (B, H, W, C).

    Both directions of all pairs together are -1/2 sum_a p_a . (sum of log p over a's neighbours): one product
    instead of four, and only log p is kept for the gradient. Written as pairs it took 4 times as long.
    """

    @staticmethod
    def forward(ctx: Any, log_p_BHWC: Tensor) -> Tensor:
        ctx.save_for_backward(log_p_BHWC)
        return -(log_p_BHWC.exp() * _neighbour_sum(log_p_BHWC)).sum() / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (log_p_BHWC,) = ctx.saved_tensors
        p_BHWC = log_p_BHWC.exp()
        return (_neighbour_sum(p_BHWC) + p_BHWC * _neighbour_sum(log_p_BHWC)) * (-gradient / 2)


def _neighbour_sum(values_BHWC: Tensor) -> Tensor:
    """Sum over the four neighbours inside the image."""
    total_BHWC = torch.zeros_like(values_BHWC)
    total_BHWC[:, :, 1:] += values_BHWC[:, :, :-1]
    total_BHWC[:, :, :-1] += values_BHWC[:, :, 1:]
    total_BHWC[:, 1:] += values_BHWC[:, :-1]
    total_BHWC[:, :-1] += values_BHWC[:, 1:]
    return total_BHWC


def _pairs(pixels_BHW: Tensor) -> int:
    """Pairs of neighbours."""
    images, height, width = pixels_BHW.shape
    return max(1, images * (height * (width - 1) + width * (height - 1)))


def code_claims(predicted_BXHW: Tensor, codes_BNX: Tensor) -> Tensor:
    """Probability of each segment at each pixel, (B, N, P): exp(-|y - c|^2) (G: exp(-dx^2) exp(-dy^2)).

    The square is expanded, |y|^2 - 2 y.c + |c|^2, so that nothing larger than B x N x pixels is made.
    """
    y_BXP = predicted_BXHW.flatten(2)
    square_BP, norm_BN = y_BXP.square().sum(1), codes_BNX.square().sum(-1)
    d2_BNP = square_BP[:, None] - 2 * torch.bmm(codes_BNX, y_BXP) + norm_BN[..., None]
    return torch.exp(-d2_BNP.clamp(min=0))


def cell_claims(logits_BXHW: Tensor, cells_BN2: Tensor) -> Tensor:
    """Probability of each segment at each pixel, (B, N, P): that of its cell of u times that of v (ours)."""
    log_p_B2KP = logits_BXHW.flatten(2).unflatten(1, (2, -1)).log_softmax(2)
    halves = [
        log_p_BKP.gather(1, cells_BN[..., None].expand(-1, -1, log_p_BKP.shape[-1]))
        for log_p_BKP, cells_BN in zip(log_p_B2KP.unbind(1), cells_BN2.unbind(-1), strict=True)
    ]
    return (halves[0] + halves[1]).exp()


def dice_loss(claims_BNP: Tensor, batch: Batch, counted_BN: Tensor) -> Tensor:
    """Generalised Dice over the things of each image, weight 1 / area; mean over images (G). Without things it is 0.

    claims: probability of each segment at each pixel. counted: segments whose pixels take part; crowds do not, since
    no instance can claim them.
    """
    labels_BP = batch.labels_BHW.long().flatten(1)
    p_BNP = claims_BNP * counted_BN.gather(1, labels_BP)[:, None]
    weight_BN = batch.thing_BN / batch.area_BN.clamp(min=1)
    own_BP = p_BNP.gather(1, labels_BP[:, None])[:, 0]  # each pixel's probability for its own segment
    inside_BN = torch.zeros_like(weight_BN).scatter_add(1, labels_BP, own_BP)
    overlap_B = (weight_BN * inside_BN).sum(1)
    total_B = (weight_BN * (p_BNP.sum(-1) + batch.area_BN)).sum(1)
    loss_B = 1 - 2 * overlap_B / total_B.clamp(min=_EPSILON)
    return (loss_B * batch.thing_BN.any(1)).mean()
