"""The losses of the generalist method as loops over pixels and instances, in plain Python floats."""

import math
from itertools import product

import numpy as np
import torch
from torch import Tensor

from training.batch import VOID, Batch
from training.methods.generalist.targets import InstanceTargets, SemanticTargets


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in tensors]


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def classes(logits: Tensor, targets: SemanticTargets) -> float:
    logits_BCHW, weight_BHW = _arrays(logits, targets.weight_BHW)
    total = 0.0
    for b, y, x in np.ndindex(weight_BHW.shape):
        category = int(targets.classes_BHW[b, y, x])
        if category != VOID:
            total -= weight_BHW[b, y, x] * math.log(_softmax(logits_BCHW[b, :, y, x])[category])
    return total / weight_BHW.size


def codes(predicted: Tensor, targets: InstanceTargets, parts: int, squared: bool) -> float:
    y_BXHW, c_BXHW, weight_BHW = _arrays(predicted, targets.dense_BXHW, targets.weight_BHW)
    size, total = y_BXHW.shape[1] // parts, 0.0
    for b, y, x in np.ndindex(weight_BHW.shape):
        difference = y_BXHW[b, :, y, x] - c_BXHW[b, :, y, x]
        distances = [np.linalg.norm(difference[i * size : (i + 1) * size]) for i in range(parts)]
        total += weight_BHW[b, y, x] * sum(d**2 if squared else d for d in distances) / parts
    return total / weight_BHW.size


def cells(logits: Tensor, targets: InstanceTargets) -> float:
    logits_BXHW, weight_BHW = _arrays(logits, targets.weight_BHW)
    count, total = logits_BXHW.shape[1] // 2, 0.0
    for b, y, x in np.ndindex(weight_BHW.shape):
        for axis in (0, 1):
            p = _softmax(logits_BXHW[b, axis * count : (axis + 1) * count, y, x])
            total -= weight_BHW[b, y, x] * math.log(p[int(targets.dense_BXHW[b, axis, y, x])]) / 2
    return total / weight_BHW.size


def _neighbours(shape: tuple[int, ...]):
    """Every pixel beside its right, and above its lower neighbour."""
    images, height, width = shape
    for b, y, x in product(range(images), range(height), range(width)):
        if x + 1 < width:
            yield (b, np.s_[:], y, x), (b, np.s_[:], y, x + 1)
        if y + 1 < height:
            yield (b, np.s_[:], y, x), (b, np.s_[:], y + 1, x)


def _mean(found: list[float]) -> float:
    return sum(found) / max(1, len(found))


def code_variation(predicted: Tensor) -> float:
    (y_BXHW,) = _arrays(predicted)
    images, _, height, width = y_BXHW.shape
    return _mean([float(np.linalg.norm(y_BXHW[p] - y_BXHW[q])) for p, q in _neighbours((images, height, width))])


def class_variation(logits: Tensor) -> float:
    (logits_BCHW,) = _arrays(logits)
    images, _, height, width = logits_BCHW.shape
    found = []
    for at, beside in _neighbours((images, height, width)):
        p, q = _softmax(logits_BCHW[at]), _softmax(logits_BCHW[beside])
        found.append(-float((p * np.log(q)).sum() + (q * np.log(p)).sum()) / 2)
    return _mean(found)


def cell_variation(logits: Tensor) -> float:
    u_BKHW, v_BKHW = logits.chunk(2, 1)
    return (class_variation(u_BKHW) + class_variation(v_BKHW)) / 2


def code_claim(y_X: np.ndarray, code_X: np.ndarray) -> float:
    """A pixel's probability for a segment: exp(-dx^2) exp(-dy^2), of the halves where there are two."""
    half = len(y_X) // 2
    return math.exp(-float(np.square(y_X[:half] - code_X[:half]).sum())) * math.exp(
        -float(np.square(y_X[half:] - code_X[half:]).sum())
    )


def cell_claim(logits_X: np.ndarray, cells_2: np.ndarray) -> float:
    u_K, v_K = np.split(logits_X, 2)
    return float(_softmax(u_K)[int(cells_2[0])] * _softmax(v_K)[int(cells_2[1])])


def claims(predicted: Tensor, codes: Tensor, by_cells: bool) -> np.ndarray:
    """(B, N, H, W)."""
    y_BXHW, codes_BNX = _arrays(predicted, codes)
    images, _, height, width = y_BXHW.shape
    result = np.zeros((images, codes_BNX.shape[1], height, width))
    for b, n, y, x in np.ndindex(result.shape):
        result[b, n, y, x] = (cell_claim if by_cells else code_claim)(y_BXHW[b, :, y, x], codes_BNX[b, n])
    return result


def dice(claims_BNHW: np.ndarray, batch: Batch, void_kept: bool = True) -> float:
    """An image without things costs 0; crowds, and without void all that is no thing, do not take part."""
    losses = []
    for b, labels_HW in enumerate(batch.labels_BHW.numpy()):
        overlap = total = 0.0
        for row in np.flatnonzero(batch.thing_BN[b].numpy()):
            area, inside, everywhere = float((labels_HW == row).sum()), 0.0, 0.0
            for y, x in np.ndindex(labels_HW.shape):
                label = labels_HW[y, x]
                if batch.crowd_BN[b, label] or not (void_kept or batch.thing_BN[b, label]):
                    continue
                everywhere += claims_BNHW[b, row, y, x]
                inside += claims_BNHW[b, row, y, x] if label == row else 0
            overlap += inside / area
            total += (everywhere + area) / area
        losses.append(1 - 2 * overlap / total if total else 0.0)
    return float(np.mean(losses))


def pairwise_entropy(log_p_BHWC: Tensor) -> Tensor:
    """Total variation of classes as it is defined, for plain autograd: a term per pair and direction."""
    p_BHWC = log_p_BHWC.exp()
    terms = []
    for a, b in ((np.s_[:, :, :-1], np.s_[:, :, 1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        there, back = -(p_BHWC[a] * log_p_BHWC[b]).sum(-1), -(p_BHWC[b] * log_p_BHWC[a]).sum(-1)
        terms.append(((there + back) / 2).flatten())
    pairs = torch.cat(terms)
    return pairs.mean() if pairs.numel() else 0 * log_p_BHWC.sum()
