"""The losses of the generalist method as loops over pixels and instances, in plain Python floats."""

import math
from itertools import product

import numpy as np
from torch import Tensor

from training.batch import Batch
from training.methods.generalist.targets import IGNORE, Targets


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in tensors]


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def semantic(logits: Tensor, targets: Targets) -> float:
    logits_BCHW, weight_BHW = _arrays(logits, targets.semantic_weight_BHW)
    total, labelled = 0.0, 0
    for b, y, x in np.ndindex(weight_BHW.shape):
        category = int(targets.classes_BHW[b, y, x])
        if category != IGNORE:
            total -= weight_BHW[b, y, x] * math.log(_softmax(logits_BCHW[b, :, y, x])[category])
            labelled += 1
    return total / max(1, labelled)


def embedding(predicted: Tensor, targets: Targets, squared: bool) -> float:
    y_BEHW, c_BEHW, weight_BHW = _arrays(predicted, targets.embedding_BEHW, targets.instance_weight_BHW)
    half, total = y_BEHW.shape[1] // 2, 0.0
    for b, y, x in np.ndindex(weight_BHW.shape):
        difference = y_BEHW[b, :, y, x] - c_BEHW[b, :, y, x]
        distances = [np.linalg.norm(difference[:half]), np.linalg.norm(difference[half:])]
        total += weight_BHW[b, y, x] * sum(d**2 if squared else d for d in distances) / 2
    return total / weight_BHW.size


def _neighbours(shape: tuple[int, ...]):
    """Every pixel beside its right, and above its lower neighbour."""
    images, height, width = shape
    for b, y, x in product(range(images), range(height), range(width)):
        if x + 1 < width:
            yield (b, np.s_[:], y, x), (b, np.s_[:], y, x + 1)
        if y + 1 < height:
            yield (b, np.s_[:], y, x), (b, np.s_[:], y + 1, x)


def embedding_variation(predicted: Tensor) -> float:
    (y_BEHW,) = _arrays(predicted)
    images, _, height, width = y_BEHW.shape
    return float(np.mean([np.linalg.norm(y_BEHW[p] - y_BEHW[q]) for p, q in _neighbours((images, height, width))]))


def semantic_variation(logits: Tensor) -> float:
    (logits_BCHW,) = _arrays(logits)
    images, _, height, width = logits_BCHW.shape
    found = []
    for at, beside in _neighbours((images, height, width)):
        p, q = _softmax(logits_BCHW[at]), _softmax(logits_BCHW[beside])
        found.append(-((p * np.log(q)).sum() + (q * np.log(p)).sum()) / 2)
    return float(np.mean(found))


def dice(predicted: Tensor, codes: Tensor, batch: Batch) -> float:
    y_BEHW, codes_BNE = _arrays(predicted, codes)
    losses = []
    for b, labels_HW in enumerate(batch.labels_BHW.numpy()):
        overlap = total = 0.0
        for row in np.flatnonzero(batch.thing_BN[b].numpy()):
            area, inside, everywhere = float(batch.area_BN[b, row]), 0.0, 0.0
            for y, x in np.ndindex(labels_HW.shape):
                if batch.crowd_BN[b, labels_HW[y, x]]:
                    continue
                p = math.exp(-float(np.square(y_BEHW[b, :, y, x] - codes_BNE[b, row]).sum()))
                everywhere += p
                inside += p if labels_HW[y, x] == row else 0
            overlap += inside / area
            total += (everywhere + area) / area
        if total:
            losses.append(1 - 2 * overlap / total)
    return float(np.mean(losses)) if losses else 0.0
