"""The optimizer's step, and what the device leaves out of it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from preprocessing.synthetic import CATEGORIES
from tests.support.examples import batch_of, scenes
from tests.training.ranks import recipe_of, trainer_of
from training.backbones import StemVitConfig
from training.loop import Trainer, _Guard
from training.methods.base import Method

STEM = StemVitConfig(widths=(8, 16, 16, 32), depth=1)


def tiny_run(**changes) -> Trainer:
    """A run so long that its rate does not change within a few steps."""
    torch.manual_seed(0)
    recipe = recipe_of(warmup_epochs=0, layer_decay=0.7, **changes)
    recipe = replace(recipe, method=replace(recipe.method, backbone=STEM, tasks="joint"))
    return trainer_of(recipe, CATEGORIES, 10**12)


def take(run: Trainer, norm: float, seed: int = 0) -> None:
    """A step with gradients of a scene; where the norm is not finite, with such gradients, as clipping leaves them."""
    method: Method = run.method
    run.optimizer.zero_grad()
    torch.stack(list(method.losses(batch_of(*scenes(2, first=seed)), 0).values())).sum().backward()
    if not math.isfinite(norm):
        for parameter in method.parameters():
            parameter.grad.mul_(float("nan"))
    run.advance(torch.tensor(norm))


def everything(run: Trainer) -> dict[str, Tensor]:
    """Weights and the optimizer's moments and counts."""
    moments = run.optimizer.state_dict()["state"]
    return {name: value.clone() for name, value in run.method.state_dict().items()} | {
        f"{i} {name}": value.clone() for i, row in moments.items() for name, value in row.items()
    }


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
def test_the_optimizer_itself_leaves_a_step_out_that_is_not_finite(norm: float):
    """On a GPU the host learns of it one step later."""
    run = tiny_run()
    take(run, 1.0)
    before = everything(run)
    assert sum(name.endswith("exp_avg") for name in before) == len(list(run.method.parameters()))
    take(run, norm)
    after = everything(run)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert run.step == 2


def test_the_very_first_step_can_be_left_out():
    run = tiny_run()
    before = {name: value.clone() for name, value in run.method.state_dict().items()}
    take(run, math.nan)
    assert all(torch.equal(run.method.state_dict()[name], value) for name, value in before.items())
    assert all(not value.any() for name, value in everything(run).items() if "exp_avg" in name or "step" in name)


def test_after_a_step_that_was_left_out_training_goes_on_as_without_it():
    left, plain = tiny_run(), tiny_run()
    for norm, seed in ((1.0, 0), (math.nan, 3), (1.0, 5)):
        take(left, norm, seed)
    for seed in (0, 5):
        take(plain, 1.0, seed)
    expected = everything(plain)
    assert all(torch.equal(value, expected[name]) for name, value in everything(left).items())


def test_a_step_that_was_left_out_does_not_move_the_average_away_from_finite_weights():
    run = tiny_run(ema=0.5)
    for norm in (1.0, math.nan, 1.0):
        take(run, norm)
    assert all(value.isfinite().all() for value in run.best.state_dict().values())
    assert run.best is not run.method


@pytest.mark.parametrize(("device", "lag"), [("cpu", 0), ("cuda", 1)])
def test_the_host_looks_at_a_norm_when_it_is_there(device: str, lag: int):
    assert _Guard(torch.device(device)).lag == lag
