"""The gradient written by hand, layouts in memory, the largest tensor and autocast, for the generalist's losses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from preprocessing.synthetic import CATEGORIES
from tests.support.examples import THING, batch_of, example_of, scenes
from tests.support.loss_cases import CONFIGS, MIXED, Case
from tests.training import slow_losses
from training.backbones import StemVitConfig
from training.batch import Example
from training.methods.generalist import loss
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.model import Generalist
from training.methods.generalist.targets import instance_targets, semantic_targets
from training.recipes.generalist import debug

SIZES = [(1, 1), (1, 7), (7, 1), (2, 2), (5, 6)]


def contiguous(values: Tensor) -> Tensor:
    return values.contiguous()


def channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def strided(values: Tensor) -> Tensor:
    return torch.stack([values, values + 1], -1).flatten(3)[..., ::2]


def turned(values: Tensor) -> Tensor:
    return values.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS = [contiguous, channels_last, strided, turned]


def logits_of(size: tuple[int, int]) -> Tensor:
    return 2 * torch.randn(2, 5, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_variation_of_classes_and_its_gradient_are_those_of_the_pairs(
    size: tuple[int, int], layout: Callable[[Tensor], Tensor]
):
    """Its gradient is written by hand; with respect to log p, as if that were free, and through the softmax."""
    logits = logits_of(size).requires_grad_()
    value = loss.class_variation(loss.log_probabilities(layout(logits)))
    expected = slow_losses.pairwise_entropy(logits.permute(0, 2, 3, 1).log_softmax(-1))
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(3 * v, logits)[0] for v in (value, expected)))

    free = layout(logits.detach()).permute(0, 2, 3, 1).requires_grad_()
    found, expected = (f(free) for f in (loss.class_variation, slow_losses.pairwise_entropy))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(v, free)[0] for v in (found, expected)))
    assert bool(found.detach() != 0) == (size != (1, 1))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_variation_of_classes_passes_gradcheck(size: tuple[int, int], layout: Callable[[Tensor], Tensor]):
    logits = logits_of(size).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss.class_variation(loss.log_probabilities(layout(x))), logits)
    assert torch.autograd.gradcheck(lambda x: loss.class_variation(layout(x).permute(0, 2, 3, 1)), logits)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_losses_do_not_depend_on_the_layout_in_memory(layout: Callable[[Tensor], Tensor]):
    for config in CONFIGS.values():
        case = Case(*MIXED, config=config, double=True)
        for name, value in case.losses(layout(case.logits), layout(case.predicted)).items():
            torch.testing.assert_close(value, case.losses()[name], atol=1e-9, rtol=1e-9)


def test_the_variation_of_classes_in_float32_has_the_gradient_of_float64():
    """Also where the network is sure: its log probabilities go down to -200."""
    logits = 40 * logits_of((8, 9))
    grads = []
    for dtype in (torch.float32, torch.float64):
        x = logits.to(dtype).requires_grad_()
        loss.class_variation(loss.log_probabilities(x)).backward()
        grads.append(x.grad.double())
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def crowded(things: int, size: tuple[int, int]) -> Example:
    """So many things that there are more rows than channels."""
    labels_HW = np.arange(size[0] * size[1]).reshape(size) % (things + 1)
    return example_of(labels_HW, [THING] * things)


SMALL = {
    "embedding": GeneralistConfig(frequencies=2),
    "direct": GeneralistConfig(encoding="direct"),
    "classes": GeneralistConfig(encoding="classes", cells=4),
    "classes, many": GeneralistConfig(encoding="classes", cells=40),
}


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize("things", [2, 30])
def test_no_tensor_is_larger_than_pixels_by_rows_or_channels(config: GeneralistConfig, things: int):
    """Forward and backward, targets included."""
    examples = [crowded(things, (20, 20))] * 3
    case = Case(*examples, config=config)
    logits, predicted = case.logits.clone().requires_grad_(), case.predicted.clone().requires_grad_()
    with Largest() as largest:
        semantic_targets(case.batch, config), instance_targets(case.batch, config)
        torch.stack(list(case.losses(logits, predicted).values())).sum().backward()
    channels = max(config.instance_channels, len(CATEGORIES))
    assert case.batch.thing_BN.shape[1] == things + 1
    assert logits.grad is not None
    assert predicted.grad is not None
    assert largest.elements <= 3 * 400 * max(things + 1, channels)


def test_a_product_of_rows_pixels_and_channels_would_be_noticed():
    """Made in the forward, or in the backward pass alone."""
    rows, pixels = torch.rand(7, 1, 3, requires_grad=True), torch.rand(1, 11, 3)
    with Largest() as largest:
        found = (rows - pixels).square().sum()
    assert largest.elements == 7 * 11 * 3
    with Largest() as largest:
        found.backward()
    assert largest.elements == 7 * 11 * 3


STEM = StemVitConfig(widths=(8, 16, 16, 32), depth=1)
HEADS = {
    "alternating": {"dice": 1.0},
    "joint": {"tasks": "joint", "backbone": STEM},
    "relative": {"tasks": "joint", "relative": True, "half_period": True, "squared": True},
    "direct": {"encoding": "direct", "void_kept": False},
    "classes": {"encoding": "classes", "cells": 8, "backbone": STEM},
}


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
def test_under_autocast_losses_are_the_float32_losses_of_what_the_network_said(options: dict[str, Any], step: int):
    torch.manual_seed(0)
    recipe = debug()
    recipe = replace(recipe, method=replace(recipe.method, **options))
    method, batch = recipe.build(CATEGORIES), batch_of(*scenes(4))
    assert isinstance(method, Generalist)
    said: list[tuple[Tensor, Tensor]] = []
    hook = method.network.register_forward_hook(lambda _, args, outputs: said.append(outputs))
    with torch.autocast("cpu", torch.bfloat16):
        found = method.losses(batch, step)
    hook.remove()
    logits, codes = said[0]
    config, expected = method.config, {}
    if logits.numel():
        assert logits.dtype == torch.bfloat16
        expected |= loss.semantic_losses(logits.float(), semantic_targets(batch, config), config)
    if codes.numel():
        assert codes.dtype == (torch.float32 if config.relative else torch.bfloat16)
        expected |= loss.instance_losses(codes.float(), instance_targets(batch, config), batch, config)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert value.ndim == 0
        assert torch.equal(value, expected[name]), name


def test_autocast_inside_the_losses_would_be_noticed():
    case = Case(*MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.losses()
    assert not torch.equal(found["dice"], case.losses()["dice"])
