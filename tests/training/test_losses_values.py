"""The generalist's losses and their gradients equal slow definitions; what costs something and what does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from preprocessing.panoptic_map import Segment
from tests.support.examples import BOX, STUFF, THING, batch_of, example_of, odd, of_all_kinds, scene, scenes, whole
from tests.support.loss_cases import CONFIGS, MIXED, Case, config_of
from tests.training import slow_losses
from training.methods.generalist import loss
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.targets import InstanceTargets, SemanticTargets

ODD = [(size, name) for size in ((1, 1), (1, 7), (7, 1), (9, 12)) for name in odd(size)]
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


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
