from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from preprocessing.panoptic_map import Segment
from preprocessing.synthetic import CATEGORIES
from tests.support.examples import (
    BOX,
    STUFF,
    THING,
    batch_of,
    example_of,
    in_double,
    odd,
    of_all_kinds,
    scene,
    scenes,
    whole,
)
from tests.training import slow_losses
from training.backbones import StemVitConfig
from training.batch import Example
from training.methods.generalist import loss
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.model import Generalist
from training.methods.generalist.targets import (
    InstanceTargets,
    SemanticTargets,
    instance_targets,
    semantic_targets,
)
from training.recipes.generalist import debug


def config_of(**options: Any) -> GeneralistConfig:
    base = {"frequencies": 2, "eds_distance": 4.0, "cells": 5, "total_variation": 0.3, "dice": 0.7}
    return GeneralistConfig(**base | options)


CONFIG = config_of()
CONFIGS = {
    "embedding": CONFIG,
    "embedding, squared": config_of(squared=True),
    "embedding, without void": config_of(void_kept=False, frequencies=3, half_period=True),
    "direct": config_of(encoding="direct", eds_min=0.2),
    "direct, squared, without void": config_of(encoding="direct", squared=True, void_kept=False),
    "classes": config_of(encoding="classes"),
    "classes, without void": config_of(encoding="classes", void_kept=False, boundaries="panoptic"),
    "without EDS": config_of(eds_distance=0.0),
}
MIXED = [*scenes(3, (16, 16)), of_all_kinds((16, 16)), whole(STUFF, (16, 16)), whole(None, (16, 16))]
ODD = [(size, name) for size in ((1, 1), (1, 7), (7, 1), (9, 12)) for name in odd(size)]
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


class Case:
    """A batch with targets and random predictions."""

    def __init__(self, *examples: Example, config: GeneralistConfig = CONFIG, double: bool = False) -> None:
        self.config = config
        self.batch = in_double(batch_of(*examples)) if double else batch_of(*examples)
        self.semantic = semantic_targets(self.batch, config)
        self.instance = instance_targets(self.batch, config)
        if double:
            self.semantic = replace(self.semantic, weight_BHW=self.semantic.weight_BHW.double())
            self.instance = replace(self.instance, weight_BHW=self.instance.weight_BHW.double())
        images, _, height, width = self.batch.images_B3HW.shape
        generator, dtype = torch.Generator().manual_seed(1), torch.float64 if double else torch.float32
        shapes = ((images, count, height, width) for count in (len(CATEGORIES), config.instance_channels))
        self.logits, noise = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
        self.predicted = noise if config.encoding == "classes" else self.instance.dense_BXHW + 0.5 * noise

    @property
    def ideal(self) -> Tensor:
        """What a perfect instance head says."""
        dense = self.instance.dense_BXHW
        if self.config.encoding != "classes":
            return dense
        halves = [torch.nn.functional.one_hot(cells, self.config.cells + 1) for cells in dense.unbind(1)]
        return 100 * torch.cat(halves, -1).movedim(-1, 1).to(self.predicted.dtype)

    def losses(self, logits: Tensor | None = None, predicted: Tensor | None = None) -> dict[str, Tensor]:
        """Of both tasks, from the product."""
        logits, predicted = (
            self.logits if logits is None else logits,
            self.predicted if predicted is None else predicted,
        )
        semantic = loss.semantic_losses(logits, self.semantic, self.config)
        return semantic | loss.instance_losses(predicted, self.instance, self.batch, self.config)

    def slow(self) -> dict[str, float]:
        """Of both tasks, from loops."""
        config, y, targets = self.config, self.predicted, self.instance
        if config.encoding == "classes":
            instance, variation = slow_losses.cells(y, targets), slow_losses.cell_variation(y)
        else:
            parts = 2 if config.encoding == "embedding" else 1
            instance = slow_losses.codes(y, targets, parts, config.squared)
            variation = slow_losses.code_variation(y)
        claims = slow_losses.claims(y, targets.codes_BNX, config.encoding == "classes")
        return {
            "semantic": slow_losses.classes(self.logits, self.semantic),
            "semantic_tv": 0.3 * slow_losses.class_variation(self.logits),
            "instance": instance,
            "instance_tv": 0.3 * variation,
            "dice": 0.7 * slow_losses.dice(claims, self.batch, config.void_kept),
        }

    def image(self, b: int) -> "Case":
        """One image of the batch."""
        part = object.__new__(Case)
        part.config = self.config
        for name in ("semantic", "instance", "batch"):
            whole = getattr(self, name)
            cut = {k: v[b : b + 1] for k, v in vars(whole).items()}
            setattr(part, name, type(whole)(**cut))
        part.logits, part.predicted = self.logits[b : b + 1], self.predicted[b : b + 1]
        return part


def test_the_mixed_batch_has_everything_that_losses_tell_apart():
    batch = batch_of(*MIXED)
    assert batch.thing_BN.any()
    assert batch.crowd_BN.any()
    assert not batch.thing_BN.any(1).all()
    assert (batch.labels_BHW == 0).any()


@all_configs
def test_losses_equal_their_slow_definitions(config: GeneralistConfig):
    case = Case(*MIXED, config=config)
    found, slow = case.losses(), case.slow()
    assert found.keys() == slow.keys()
    for name, value in slow.items():
        assert float(found[name]) == pytest.approx(value, abs=2e-5), name
        assert value > 0.005, name


@all_configs
def test_losses_of_a_batch_are_the_means_of_its_images(config: GeneralistConfig):
    """Whatever the images hold: so they do not depend on how a batch is split."""
    case = Case(*MIXED, config=config, double=True)
    parts = [case.image(b).losses() for b in range(len(MIXED))]
    for name, value in case.losses().items():
        assert float(value) == pytest.approx(float(torch.stack([part[name] for part in parts]).mean()), abs=1e-9), name


def test_what_is_switched_off_is_left_out():
    case = Case(*MIXED, config=config_of(total_variation=0.0, dice=0.0))
    assert case.losses().keys() == {"semantic", "instance"}


def window(case: Case) -> Case:
    """4 x 4 pixels around the middle of `of_all_kinds`, where all kinds meet."""
    cut = np.s_[..., 7:11, 7:11]
    case.semantic = SemanticTargets(case.semantic.classes_BHW[cut], case.semantic.weight_BHW[cut])
    case.instance = InstanceTargets(
        case.instance.codes_BNX, case.instance.dense_BXHW[cut], case.instance.weight_BHW[cut]
    )
    case.batch = replace(case.batch, labels_BHW=case.batch.labels_BHW[cut])
    case.logits, case.predicted = case.logits[cut], case.predicted[cut]
    assert case.batch.labels_BHW.unique().tolist() == [0, 1, 2, 3, 4]
    return case


@all_configs
def test_gradients_are_those_of_the_values(config: GeneralistConfig):
    case = window(Case(of_all_kinds((16, 16)), config=config, double=True))
    logits, predicted = case.logits.clone().requires_grad_(), case.predicted.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(list(case.losses(logits=x).values())[:2]), logits)
    assert torch.autograd.gradcheck(lambda x: tuple(list(case.losses(predicted=x).values())[2:]), predicted)


@all_configs
@pytest.mark.parametrize("prediction", ["zero", "ideal", "random", "huge"])
def test_losses_and_gradients_stay_finite(prediction: str, config: GeneralistConfig):
    for size, kind in ODD:
        case = Case(odd(size)[kind], config=config)
        factor = {"zero": 0, "huge": 1e4}.get(prediction, 1)
        predicted = (case.ideal if prediction == "ideal" else factor * case.predicted).clone().requires_grad_()
        logits = (factor * case.logits).requires_grad_()
        for name, found in case.losses(logits, predicted).items():
            assert found.isfinite(), (name, size, kind)
            grads = torch.autograd.grad(found, (logits, predicted), retain_graph=True, allow_unused=True)
            assert sum(g is not None for g in grads) == 1
            assert all(g.isfinite().all() for g in grads if g is not None), (name, size, kind)


@all_configs
def test_a_perfect_instance_head_costs_nothing(config: GeneralistConfig):
    case = Case(*MIXED, config=config)
    assert float(case.losses(predicted=case.ideal)["instance"]) < 1.1e-4  # the root's epsilon
    assert float(case.losses()["instance"]) > 0.02


@pytest.mark.parametrize("name", ["embedding", "embedding, squared", "direct", "classes"])
def test_crowds_cost_nothing_whatever_is_said_of_them(name: str):
    case = Case(*MIXED, config=CONFIGS[name])
    crowd_BHW = case.batch.crowd_BN.gather(1, case.batch.labels_BHW.long().flatten(1)).view(case.batch.labels_BHW.shape)
    assert crowd_BHW.any()
    other = (
        case.predicted
        + 3 * torch.randn(case.predicted.shape, generator=torch.Generator().manual_seed(2)) * (crowd_BHW[:, None])
    )
    plain, changed = case.losses(), case.losses(predicted=other)
    for loss_name in ("instance", "dice"):
        assert float(changed[loss_name]) == pytest.approx(float(plain[loss_name]), abs=1e-6)
    assert float(changed["instance_tv"]) > float(plain["instance_tv"])


@pytest.mark.parametrize("name", ["embedding", "direct", "classes"])
@pytest.mark.parametrize("kept", [True, False])
def test_void_and_stuff_cost_something_only_where_they_are_kept(name: str, kept: bool):
    case = Case(*MIXED, config=replace(CONFIGS[name], void_kept=kept))
    inside_BHW = case.batch.thing_BN.gather(1, case.batch.labels_BHW.long().flatten(1)).view(
        case.batch.labels_BHW.shape
    )
    noise = torch.randn(case.predicted.shape, generator=torch.Generator().manual_seed(2))
    plain, changed = case.losses(), case.losses(predicted=case.predicted + 3 * noise * ~inside_BHW[:, None])
    for loss_name in ("instance", "dice"):
        moved = abs(float(changed[loss_name]) - float(plain[loss_name]))
        assert (moved > 1e-4) if kept else (moved < 1e-6)


def test_void_costs_nothing_in_the_semantic_task_and_dilutes_it():
    alone, beside = Case(scene(1, (16, 16))), Case(scene(1, (16, 16)), whole(None, (16, 16)))
    beside.logits = torch.cat([alone.logits, 50 * beside.logits[1:]])
    assert float(beside.losses()["semantic"]) == pytest.approx(float(alone.losses()["semantic"]) / 2, abs=1e-6)
    logits = beside.logits.clone().requires_grad_()
    loss.semantic_losses(logits, beside.semantic, config_of(total_variation=0.0))["semantic"].backward()
    assert not logits.grad[1].any()
    assert logits.grad[0].any()


def test_dice_is_nearly_0_on_the_perfect_embedding_of_far_instances():
    labels_HW = np.zeros((32, 32), int)
    labels_HW[2:12, 3:13], labels_HW[20:30, 18:28] = 1, 2
    config = GeneralistConfig(dice=1.0)
    case = Case(example_of(labels_HW, [THING, Segment(0, BOX, True)]), config=config)
    assert 0 <= float(case.losses(predicted=case.ideal)["dice"]) < 0.005
    assert float(case.losses(predicted=torch.zeros_like(case.predicted))["dice"]) > 0.99


@pytest.mark.parametrize("name", ["embedding", "embedding, without void", "direct", "classes"])
@pytest.mark.parametrize("kind", ["only void", "only stuff", "only a crowd"])
def test_dice_without_things_is_0_and_changes_nothing(kind: str, name: str):
    case = Case(odd((9, 12))[kind], config=CONFIGS[name])
    predicted = case.predicted.clone().requires_grad_()
    found = case.losses(predicted=predicted)["dice"]
    found.backward()
    assert found.detach() == 0
    assert not predicted.grad.any()


def test_images_without_things_dilute_dice():
    alone, beside = Case(scene(1, (16, 16))), Case(scene(1, (16, 16)), whole(STUFF, (16, 16)), whole(None, (16, 16)))
    beside.predicted = torch.cat([alone.predicted, beside.predicted[1:]])
    assert float(alone.losses()["dice"]) == pytest.approx(3 * float(beside.losses()["dice"]), abs=1e-6)


@pytest.mark.parametrize("name", ["embedding", "direct", "classes"])
def test_claims_equal_their_slow_definition(name: str):
    case = Case(*scenes(2, (9, 12)), of_all_kinds((9, 12)), config=CONFIGS[name], double=True)
    function = loss.cell_claims if name == "classes" else loss.code_claims
    slow_BNHW = slow_losses.claims(case.predicted, case.instance.codes_BNX, name == "classes")
    found_BNP = function(case.predicted, case.instance.codes_BNX)
    torch.testing.assert_close(found_BNP, torch.from_numpy(slow_BNHW).flatten(2), atol=1e-9, rtol=1e-9)
    assert found_BNP.min() >= 0
    assert found_BNP.max() <= 1


def test_claims_of_far_codes_are_exact_in_float32():
    """|y|^2 - 2 y.c + |c|^2 loses digits, but not those that an exponential shows."""
    case = Case(*scenes(3, (16, 16)), config=GeneralistConfig())
    found = loss.code_claims(3 * case.predicted, case.instance.codes_BNX).double()
    exact = loss.code_claims(3 * case.predicted.double(), case.instance.codes_BNX.double())
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["embedding", "direct", "classes"])
def test_gradients_of_claims_and_of_dice_are_those_of_the_values(name: str):
    case = window(Case(of_all_kinds((16, 16)), config=CONFIGS[name], double=True))
    function = loss.cell_claims if name == "classes" else loss.code_claims
    predicted = case.predicted.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, case.instance.codes_BNX), predicted)
    claims = torch.rand(function(predicted, case.instance.codes_BNX).shape, dtype=torch.float64).requires_grad_()
    for counted in (~case.batch.crowd_BN, case.batch.thing_BN):
        assert torch.autograd.gradcheck(lambda x: loss.dice_loss(x, case.batch, counted), claims)  # noqa: B023


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
