"""Positional embedding of centroids, Edge Distance Sampling weights, and the dense targets made of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.batch import Batch
from training.methods.generalist.config import GeneralistConfig

IGNORE = -1
"""Class of pixels without a semantic label."""


@dataclass(frozen=True)
class Targets:
    """Dense targets of a batch."""

    classes_BHW: Tensor
    """int64 contiguous ids, IGNORE on void."""
    semantic_weight_BHW: Tensor
    """float32, EDS; 0 on void."""
    embedding_BEHW: Tensor
    """float32, the code of the pixel's centroid; zeros where it belongs to no single thing."""
    instance_weight_BHW: Tensor
    """float32, EDS; 0 on crowds, which have no single centroid (G is silent)."""


def omegas(config: GeneralistConfig) -> list[float]:
    """Angular frequencies, ascending: 2^k pi (G), or 2^k pi/2 with half_period; k = 0..L-1."""
    base = math.pi / 2 if config.half_period else math.pi
    return [base * 2**k for k in range(config.frequencies)]


def embed(positions: Tensor, frequencies: list[float]) -> Tensor:
    """gamma (G): (...,) in [-1, 1] -> (..., 2 L) as L sines, then L cosines. Squared norm L."""
    phases = positions[..., None] * positions.new_tensor(frequencies)
    return torch.cat([phases.sin(), phases.cos()], -1)


def embed_xy(centroids_N2: Tensor, frequencies: list[float]) -> Tensor:
    """x, y in [-1, 1], (..., 2) -> (..., 4 L): gamma(u = x), then gamma(v = y)."""
    return embed(centroids_N2, frequencies).flatten(-2)


def eds_weight(d2: Tensor, distance: float, minimum: float) -> Tensor:
    """w = w_min + (1 - w_min) exp(-d^2 / D^2) (G). d2: squared pixels. D = 0: weight 1 everywhere."""
    if distance == 0:
        return torch.ones_like(d2, dtype=torch.float32)
    return minimum + (1 - minimum) * torch.exp(-d2.float() / distance**2)


def make_targets(batch: Batch, config: GeneralistConfig) -> Targets:
    """Gather per-segment values to pixels, on the batch's device."""
    flat_BP = batch.labels_BHW.flatten(1)
    shape = batch.labels_BHW.shape

    def to_pixels(rows_BN: Tensor) -> Tensor:
        return rows_BN.gather(1, flat_BP).reshape(shape)

    codes_BNE = embed_xy(batch.centroid_BN2, omegas(config)) * batch.thing_BN[..., None]
    index_BPE = flat_BP[..., None].expand(-1, -1, codes_BNE.shape[-1])
    embedding_BPE = codes_BNE.gather(1, index_BPE)
    classes_BHW = to_pixels(batch.category_BN)
    labelled_BHW = classes_BHW != IGNORE
    weights = [
        eds_weight(d2, config.eds_distance, config.eds_min) for d2 in (batch.semantic_d2_BHW, batch.instance_d2_BHW)
    ]
    return Targets(
        classes_BHW,
        weights[0] * labelled_BHW,
        embedding_BPE.transpose(1, 2).reshape(shape[0], -1, *shape[1:]),
        weights[1] * ~to_pixels(batch.crowd_BN),
    )
