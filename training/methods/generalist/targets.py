"""Positional embedding of centroids, Edge Distance Sampling weights, and the dense targets made of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from infra.errors import TesseraError
from training.batch import VOID, Batch
from training.methods.generalist.config import GeneralistConfig


@dataclass(frozen=True)
class SemanticTargets:
    """Dense targets of the semantic task."""

    classes_BHW: Tensor
    """int64 contiguous ids, VOID where there is none."""
    weight_BHW: Tensor
    """float32, EDS; 0 on void."""


@dataclass(frozen=True)
class InstanceTargets:
    """Targets of the instance task; X channels, or for the encoding by classes 2 cells."""

    codes_BNX: Tensor
    """What the head should say of each segment: float32 codes, zeros but for things, or int64 cells of u and v,
    the last class but for things."""
    dense_BXHW: Tensor
    """The code of the segment that each pixel belongs to."""
    weight_BHW: Tensor
    """float32, EDS; 0 on crowds, which have no single centroid (G is silent), and on pixels that are left out."""


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
    """w = w_min + (1 - w_min) exp(-d^2 / D^2) (G). d2: squared pixels; distance: D, not 0."""
    return minimum + (1 - minimum) * torch.exp(-d2.float() / distance**2)


def eds_maps(batch: Batch, config: GeneralistConfig) -> tuple[Tensor, Tensor]:
    """EDS weights of the semantic and of the instance task, float32 (B, H, W) each.

    Where each stuff category is one segment, an edge of the panoptic map is an edge of one of the two tasks, so its
    distances are the smaller ones. D = 0: weight 1 everywhere. Raises TesseraError for a batch without distances.
    """
    if config.eds_distance == 0:
        return (torch.ones_like(batch.labels_BHW, dtype=torch.float32),) * 2
    if batch.d2_BH2W is None:
        raise TesseraError(f"samples {', '.join(batch.keys)}: EDS needs distances, and their shards have none")
    semantic_d2_BHW, instance_d2_BHW = batch.d2_BH2W.unbind(2)
    if config.boundaries == "panoptic":
        semantic_d2_BHW = instance_d2_BHW = torch.minimum(semantic_d2_BHW, instance_d2_BHW)
    distance, minimum = config.eds_distance, config.eds_min
    return eds_weight(semantic_d2_BHW, distance, minimum), eds_weight(instance_d2_BHW, distance, minimum)


def semantic_targets(batch: Batch, config: GeneralistConfig) -> SemanticTargets:
    """Gather categories to pixels, on the batch's device."""
    classes_BHW = batch.classes_BHW
    return SemanticTargets(classes_BHW, eds_maps(batch, config)[0] * (classes_BHW != VOID))


def instance_targets(batch: Batch, config: GeneralistConfig) -> InstanceTargets:
    """Encode each segment's centroid and gather the codes to pixels, on the batch's device."""
    codes_BNX = encode(batch.centroid_BN2, batch.thing_BN, config)
    index_BPX = batch.labels_BHW.long().flatten(1)[..., None].expand(-1, -1, codes_BNX.shape[-1])
    dense_BXP = codes_BNX.gather(1, index_BPX).transpose(1, 2)
    weight_BHW = eds_maps(batch, config)[1] * batch.to_pixels(counted(batch, config))
    return InstanceTargets(codes_BNX, dense_BXP.unflatten(2, batch.labels_BHW.shape[1:]), weight_BHW)


def counted(batch: Batch, config: GeneralistConfig) -> Tensor:
    """Segments whose pixels take part in the instance task, bool (B, N): no crowds; without void_kept only things."""
    return ~batch.crowd_BN if config.void_kept else batch.thing_BN


def encode(centroids_BN2: Tensor, thing_BN: Tensor, config: GeneralistConfig) -> Tensor:
    """x, y in [-1, 1] -> (B, N, X): what stands for a segment; see InstanceTargets.codes_BNX."""
    if config.encoding == "embedding":
        return embed_xy(centroids_BN2, omegas(config)) * thing_BN[..., None]
    share_BN2 = (centroids_BN2 + 1) / 2
    if config.encoding == "direct":
        return torch.cat([share_BN2, torch.ones_like(share_BN2[..., :1])], -1) * thing_BN[..., None]
    cells_BN2 = (share_BN2 * config.cells).long().clamp(0, config.cells - 1)
    return torch.where(thing_BN[..., None], cells_BN2, config.cells)
