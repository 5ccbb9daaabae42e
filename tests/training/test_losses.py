from collections.abc import Callable
from dataclasses import fields, replace

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
from training.batch import Batch, Example
from training.methods.generalist import loss
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.targets import Targets, embed_xy, make_targets, omegas

CONFIG = GeneralistConfig(frequencies=2, eds_distance=4.0)
MIXED = [*scenes(3, (16, 16)), of_all_kinds((16, 16)), whole(STUFF, (16, 16)), whole(None, (16, 16))]
ODD = [(size, name) for size in ((1, 1), (1, 7), (7, 1), (9, 12)) for name in odd(size)]


class Case:
    """A batch with targets and random predictions."""

    def __init__(self, *examples: Example, double: bool = False, config: GeneralistConfig = CONFIG) -> None:
        self.batch = in_double(batch_of(*examples)) if double else batch_of(*examples)
        self.targets = make_targets(self.batch, config)
        if double:
            floats = ("semantic_weight_BHW", "embedding_BEHW", "instance_weight_BHW")
            self.targets = replace(self.targets, **{n: getattr(self.targets, n).double() for n in floats})
        self.codes = embed_xy(self.batch.centroid_BN2, omegas(config))
        images, _, height, width = self.batch.images_B3HW.shape
        generator, dtype = torch.Generator().manual_seed(1), self.codes.dtype
        shapes = (images, len(CATEGORIES), height, width), tuple(self.targets.embedding_BEHW.shape)
        self.logits, noise = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
        self.embedding = self.targets.embedding_BEHW + 0.5 * noise


LOSSES: dict[str, Callable[[Tensor, Tensor, Targets, Tensor, Batch], Tensor]] = {
    "semantic": lambda logits, _, targets, codes, batch: loss.semantic_loss(logits, targets),
    "semantic_tv": lambda logits, *_: loss.semantic_variation(logits),
    "instance": lambda _, y, targets, codes, batch: loss.embedding_loss(y, targets, False),
    "squared": lambda _, y, targets, codes, batch: loss.embedding_loss(y, targets, True),
    "instance_tv": lambda _, y, *rest: loss.embedding_variation(y),
    "dice": lambda _, y, targets, codes, batch: loss.dice_loss(y, codes, batch),
}


def value(name: str, case: Case, logits: Tensor | None = None, embedding: Tensor | None = None) -> Tensor:
    predictions = case.logits if logits is None else logits, case.embedding if embedding is None else embedding
    return LOSSES[name](*predictions, case.targets, case.codes, case.batch)


def reference(name: str, case: Case) -> float:
    return {
        "semantic": lambda: slow_losses.semantic(case.logits, case.targets),
        "semantic_tv": lambda: slow_losses.semantic_variation(case.logits),
        "instance": lambda: slow_losses.embedding(case.embedding, case.targets, False),
        "squared": lambda: slow_losses.embedding(case.embedding, case.targets, True),
        "instance_tv": lambda: slow_losses.embedding_variation(case.embedding),
        "dice": lambda: slow_losses.dice(case.embedding, case.codes, case.batch),
    }[name]()


def test_the_mixed_batch_has_everything_that_losses_tell_apart():
    batch = batch_of(*MIXED)
    assert batch.thing_BN.any()
    assert batch.crowd_BN.any()
    assert not batch.thing_BN.any(1).all()
    assert (batch.labels_BHW == 0).any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_equals_its_slow_definition(name: str):
    case = Case(*MIXED)
    assert float(value(name, case)) == pytest.approx(reference(name, case), abs=1e-5)
    assert reference(name, case) > 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_values(name: str):
    case, window = Case(of_all_kinds((16, 16)), double=True), np.s_[..., 7:11, 7:11]
    case.targets = Targets(**{f.name: getattr(case.targets, f.name)[window] for f in fields(Targets)})
    case.batch = replace(case.batch, labels_BHW=case.batch.labels_BHW[window])
    assert case.batch.labels_BHW.unique().tolist() == [0, 1, 2, 3, 4]
    logits, embedding = case.logits[window], case.embedding[window]
    if name.startswith("semantic"):
        assert torch.autograd.gradcheck(lambda x: value(name, case, x, embedding), logits.clone().requires_grad_())
    else:
        assert torch.autograd.gradcheck(lambda x: value(name, case, logits, x), embedding.clone().requires_grad_())


@pytest.mark.parametrize("prediction", ["zero", "ideal", "random", "huge"])
@pytest.mark.parametrize(("size", "kind"), ODD, ids=str)
def test_losses_and_gradients_stay_finite(size: tuple[int, int], kind: str, prediction: str):
    case = Case(odd(size)[kind])
    ideal = case.targets.embedding_BEHW
    embedding = {"zero": 0 * ideal, "ideal": ideal, "random": case.embedding, "huge": 1e4 * case.embedding}[prediction]
    logits = case.logits * {"zero": 0, "huge": 1e4}.get(prediction, 1)
    embedding, logits = embedding.clone().requires_grad_(), logits.clone().requires_grad_()
    for name in LOSSES:
        found = value(name, case, logits, embedding)
        assert found.isfinite(), name
        grads = torch.autograd.grad(found, (logits, embedding), allow_unused=True)
        assert all(g.isfinite().all() for g in grads if g is not None), name


def test_a_perfect_embedding_costs_nothing():
    case = Case(*MIXED)
    for name in ("instance", "squared"):
        assert float(value(name, case, embedding=case.targets.embedding_BEHW)) < 1.1e-4  # the root's epsilon


def test_dice_is_nearly_0_on_the_perfect_embedding_of_far_instances():
    labels_HW = torch.zeros(32, 32, dtype=torch.int).numpy()
    labels_HW[2:12, 3:13], labels_HW[20:30, 18:28] = 1, 2
    case = Case(example_of(labels_HW, [THING, Segment(0, BOX, True)]), config=GeneralistConfig())
    assert 0 <= float(value("dice", case, embedding=case.targets.embedding_BEHW)) < 0.005
    assert float(value("dice", case, embedding=torch.zeros_like(case.embedding))) > 0.99


@pytest.mark.parametrize("kind", ["only void", "only stuff", "only a crowd"])
def test_dice_without_things_is_0_and_changes_nothing(kind: str):
    case = Case(odd((9, 12))[kind])
    embedding = case.embedding.clone().requires_grad_()
    found = value("dice", case, embedding=embedding)
    found.backward()
    assert found.detach() == 0
    assert not embedding.grad.any()


def test_images_without_things_do_not_dilute_dice():
    alone, beside = Case(scene(1, (16, 16))), Case(scene(1, (16, 16)), whole(STUFF, (16, 16)), whole(None, (16, 16)))
    embedding = torch.cat([alone.embedding, beside.embedding[1:]])
    assert float(value("dice", alone)) == pytest.approx(float(value("dice", beside, embedding=embedding)), abs=1e-6)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_dice_makes_no_tensor_of_instances_by_pixels_by_channels():
    case = Case(*scenes(6, (40, 40)), config=GeneralistConfig())
    embedding = case.embedding.clone().requires_grad_()
    with Largest() as largest:
        value("dice", case, embedding=embedding).backward()
    (images, rows, channels), pixels = case.codes.shape, 40 * 40
    assert rows > 4
    assert largest.elements <= images * pixels * max(rows, channels)
