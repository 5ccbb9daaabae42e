"""Learning rates and the numbers of a training config."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import TesseraError
from tests.training.ranks import recipe_of
from training.recipe import TrainConfig
from training.recipes.generalist import debug


@given(st.integers(1, 400), st.floats(0.1, 300), st.floats(0, 0.99))
def test_the_share_of_the_rate_is_the_formula_at_every_step(steps: int, epochs: float, warm: float):
    config = TrainConfig(batch=4, epochs=epochs, lr=1, warmup_epochs=warm * epochs)
    warmup = max(1, steps * config.warmup_epochs / epochs)
    for step in range(steps):
        share = config.lr_share(step, steps)
        wave = (1 + math.cos(math.pi * step / steps)) / 2
        assert 0 < share <= 1
        # whole steps of warm-up: half a step of doubt
        low, high = (min(1, (step + 1) / max(1, n)) * wave for n in (warmup + 0.5, warmup - 0.5))
        assert low - 1e-9 <= share <= high + 1e-9


@pytest.mark.parametrize("samples", [16, 1000, 118287])
def test_the_warm_up_ends_at_the_same_epoch_of_any_data_set(samples: int):
    config = TrainConfig(batch=4, epochs=20, warmup_epochs=3, lr=1)
    steps = config.steps(samples)
    shares = [config.lr_share(step, steps) for step in range(steps)]
    assert shares.index(max(shares)) * 4 / samples == pytest.approx(3, abs=5 / samples)


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert TrainConfig(batch=4, epochs=5, lr=1).lr_share(0, 20) == 1


@pytest.mark.parametrize(("epochs", "samples", "steps"), [(1, 16, 4), (0.5, 16, 2), (0.01, 16, 1), (2, 118287, 59144)])
def test_steps_follow_from_epochs(epochs: float, samples: int, steps: int):
    assert TrainConfig(batch=4, epochs=epochs, lr=1).steps(samples) == steps


@pytest.mark.parametrize("change", [{"batch": 0}, {"micro_batch": 0}, {"epochs": 0}, {"lr": -1.0}])
def test_numbers_that_must_be_positive_are(change: dict):
    with pytest.raises(TesseraError, match="must be positive"):
        recipe_of(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"warmup_epochs": -0.1},
        {"warmup_epochs": 6},
        {"layer_decay": 0.0},
        {"layer_decay": 1.1},
        {"ema": 1.0},
        {"ema": -0.1},
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(change: dict):
    with pytest.raises(TesseraError, match="train config"):
        recipe_of(**change)


def test_a_longer_run_keeps_the_share_of_its_warm_up():
    recipe = debug().lasting(60)
    assert (recipe.train.epochs, recipe.train.warmup_epochs) == (60, pytest.approx(1))
