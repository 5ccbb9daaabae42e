"""The paper's formulas against slow, obvious ones in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.scenes import scene_batch, scene_example
from training.batch import collate
from training.methods.generalist import loss
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.model import pixel_phases, rotate
from training.methods.generalist.targets import IGNORE, eds_weight, embed, embed_xy, make_targets, omegas

CONFIG = GeneralistConfig(eds_distance=4.0, eds_min=0.1)
SIZE = (16, 16)


def gamma(p, frequencies):
    return [math.sin(w * p) for w in frequencies] + [math.cos(w * p) for w in frequencies]


@pytest.mark.parametrize("half_period", [False, True])
@pytest.mark.parametrize("frequencies", [1, 2, 4, 5])
def test_embeddings_follow_the_formula(frequencies, half_period):
    config = GeneralistConfig(frequencies=frequencies, half_period=half_period)
    expected = [(math.pi / 2 if half_period else math.pi) * 2**k for k in range(frequencies)]
    assert omegas(config) == pytest.approx(expected)
    points = torch.rand(50, 2, dtype=torch.float64) * 2 - 1
    codes = embed_xy(points, omegas(config))
    for (u, v), code in zip(points.tolist(), codes.tolist(), strict=True):
        assert code == pytest.approx(gamma(u, expected) + gamma(v, expected), abs=1e-12)
    assert codes.square().sum(-1).numpy() == pytest.approx(2 * frequencies)


def test_the_two_borders_have_one_code_with_the_papers_period_and_two_with_half_of_it():
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    same = embed(ends, omegas(GeneralistConfig()))
    other = embed(ends, omegas(GeneralistConfig(half_period=True)))
    assert torch.allclose(same[0], same[1], atol=1e-9)
    assert (other[0] - other[1]).norm() > 1


def test_eds_weights_follow_the_formula_and_distance_0_switches_them_off():
    d2 = torch.arange(0, 400)
    expected = [0.1 + 0.9 * math.exp(-d / 16) for d in d2.tolist()]
    assert eds_weight(d2, 4.0, 0.1).tolist() == pytest.approx(expected, abs=1e-6)
    assert (eds_weight(d2, 0, 0.1) == 1).all()


def test_targets_say_for_each_pixel_what_its_segment_says():
    for seed in range(12):
        example = scene_example(seed, SIZE)
        targets = make_targets(collate([example]), CONFIG)
        for y, x in np.ndindex(SIZE):
            label = int(example.labels_HW[y, x])
            segment = example.segments[label - 1] if label else None
            weights = [
                0.1 + 0.9 * math.exp(-int(d2[y, x]) / 16) for d2 in (example.semantic_d2_HW, example.instance_d2_HW)
            ]
            code = [0.0] * 16
            if segment is not None and segment.centroid is not None:
                u, v = ((2 * c + 1) / 16 - 1 for c in segment.centroid)
                code = gamma(u, omegas(CONFIG)) + gamma(v, omegas(CONFIG))
            assert targets.classes_BHW[0, y, x] == (segment.category if segment else IGNORE)
            assert targets.embedding_BEHW[0, :, y, x].tolist() == pytest.approx(code, abs=1e-5)
            assert float(targets.semantic_weight_BHW[0, y, x]) == pytest.approx(weights[0] if segment else 0, abs=1e-6)
            crowd = segment is not None and segment.is_crowd
            assert float(targets.instance_weight_BHW[0, y, x]) == pytest.approx(0 if crowd else weights[1], abs=1e-6)


def test_a_flip_mirrors_targets_and_changes_the_sign_of_u():
    example = scene_example(3, SIZE)
    straight, flipped = (make_targets(collate([e]), CONFIG) for e in (example, example.flipped()))
    mirrored = straight.embedding_BEHW.flip(-1).clone()
    mirrored[:, :4] *= -1  # the sines of u
    assert torch.allclose(flipped.embedding_BEHW, mirrored, atol=1e-5)
    for name in ("classes_BHW", "semantic_weight_BHW", "instance_weight_BHW"):
        assert torch.equal(getattr(flipped, name), getattr(straight, name).flip(-1))
    again = [s.centroid for s in example.flipped().flipped().segments]
    assert again == [s.centroid and pytest.approx(s.centroid) for s in example.segments]


def doubles(seeds):
    batch = scene_batch(seeds, SIZE)
    targets = make_targets(batch, CONFIG)
    floats = {k: v.double() for k, v in vars(targets).items() if v.is_floating_point()}
    batch = replace(batch, area_BN=batch.area_BN.double(), centroid_BN2=batch.centroid_BN2.double())
    return batch, replace(targets, **floats)


def test_semantic_loss_is_the_weighted_cross_entropy_over_labelled_pixels():
    _, targets = doubles([1, 2])
    logits = torch.randn(2, 7, *SIZE, dtype=torch.float64)
    total, count = 0.0, 0
    for b, y, x in np.ndindex(2, *SIZE):
        category = int(targets.classes_BHW[b, y, x])
        if category != IGNORE:
            p = logits[b, :, y, x].softmax(0)[category]
            total -= math.log(p) * float(targets.semantic_weight_BHW[b, y, x])
            count += 1
    assert float(loss.semantic_loss(logits, targets)) == pytest.approx(total / count)


@pytest.mark.parametrize("squared", [False, True])
def test_embedding_loss_is_the_mean_of_both_halves_distances(squared):
    _, targets = doubles([1, 2])
    predicted = torch.randn(2, 16, *SIZE, dtype=torch.float64)
    total = 0.0
    for b, y, x in np.ndindex(2, *SIZE):
        d2 = (predicted[b, :, y, x] - targets.embedding_BEHW[b, :, y, x]) ** 2
        halves = [float(d2[:8].sum()), float(d2[8:].sum())]
        distance = sum(h if squared else math.sqrt(h) for h in halves) / 2
        total += distance * float(targets.instance_weight_BHW[b, y, x])
    assert float(loss.embedding_loss(predicted, targets, squared)) == pytest.approx(total / (2 * 256), rel=1e-6)


def pairs(height, width):
    yield from (((y, x), (y, x + 1)) for y in range(height) for x in range(width - 1))
    yield from (((y, x), (y + 1, x)) for y in range(height - 1) for x in range(width))


def test_total_variations_are_means_over_right_and_lower_neighbours():
    values = torch.randn(1, 6, 5, 4, dtype=torch.float64)
    p = values.softmax(1)
    norms, entropies = [], []
    for (y, x), (v, u) in pairs(5, 4):
        a, b = values[0, :, y, x], values[0, :, v, u]
        norms.append(float((a - b).norm()))
        pa, pb = p[0, :, y, x], p[0, :, v, u]
        entropies.append(float(-(pa * pb.log()).sum() - (pb * pa.log()).sum()) / 2)
    assert float(loss.embedding_variation(values)) == pytest.approx(np.mean(norms), rel=1e-6)
    assert float(loss.semantic_variation(values)) == pytest.approx(np.mean(entropies), rel=1e-9)


def slow_dice(predicted, codes, batch):
    losses = []
    for b in range(len(batch.keys)):
        inside = total = 0.0
        for n in torch.nonzero(batch.thing_BN[b]).flatten().tolist():
            weight = 1 / float(batch.area_BN[b, n])
            for y, x in np.ndindex(*SIZE):
                label = int(batch.labels_BHW[b, y, x])
                if batch.crowd_BN[b, label]:
                    continue
                difference = predicted[b, :, y, x] - codes[b, n]
                p = math.exp(-float(difference[:8].square().sum())) * math.exp(-float(difference[8:].square().sum()))
                inside += weight * p * (label == n)
                total += weight * (p + (label == n))
        if total:
            losses.append(1 - 2 * inside / total)
    return sum(losses) / max(1, len(losses))


def test_dice_loss_is_the_generalised_one():
    batch, targets = doubles(range(6))
    codes = embed_xy(batch.centroid_BN2, omegas(CONFIG))
    predicted = targets.embedding_BEHW + 0.3 * torch.randn(6, 16, *SIZE, dtype=torch.float64)
    assert float(loss.dice_loss(predicted, codes, batch)) == pytest.approx(slow_dice(predicted, codes, batch), abs=1e-9)


def test_gradients_are_those_of_the_losses():
    batch, targets = doubles([4])
    small = (slice(None), slice(None), slice(0, 6), slice(0, 6))
    cut = {k: v[small if v.ndim == 4 else (slice(None), slice(0, 6), slice(0, 6))] for k, v in vars(targets).items()}
    targets = replace(targets, **cut)
    batch = replace(batch, labels_BHW=batch.labels_BHW[:, :6, :6])
    codes = embed_xy(batch.centroid_BN2, omegas(CONFIG))
    embedding = torch.randn(1, 16, 6, 6, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(1, 7, 6, 6, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda y: loss.embedding_loss(y, targets, False), embedding)
    assert check(loss.embedding_variation, embedding)
    assert check(lambda y: loss.dice_loss(y, codes, batch), embedding)
    assert check(lambda z: loss.semantic_loss(z, targets), logits)
    assert check(loss.semantic_variation, logits)


def test_the_relative_head_turns_offsets_into_centroids():
    grid, frequencies = (6, 9), omegas(GeneralistConfig(half_period=True))
    ys, xs = torch.meshgrid(*((2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in grid), indexing="ij")
    centroid = torch.tensor([0.3, -0.7], dtype=torch.float64)
    offsets = torch.stack([centroid[0] - xs, centroid[1] - ys], -1)
    relative = embed_xy(offsets, frequencies).permute(2, 0, 1)[None].float()
    turned = rotate(relative, pixel_phases(grid, frequencies))
    expected = embed_xy(centroid, frequencies).float()[None, :, None, None].expand_as(turned)
    assert torch.allclose(turned, expected, atol=1e-5)
    assert not rotate(torch.zeros_like(relative), pixel_phases(grid, frequencies)).any()
