from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infra.store import Store
from preprocessing.shards import ShardSet
from tests.training.ranks import Ranks, Trained, noisy, spoiled, train_alone, train_ranks
from training.backbones import StemVitConfig
from training.checkpoints import State
from training.reader import BatchStream
from training.recipe import Recipe
from training.recipes.generalist import debug


def recipe_of(micro_batch: int, epochs: float = 6, **options) -> Recipe:
    base = debug()
    train = replace(base.train, bf16=False, micro_batch=micro_batch, epochs=epochs, clip=1e9)
    upkeep = replace(base.upkeep, checkpoints=1)
    return replace(base, method=replace(base.method, **options), train=train, upkeep=upkeep)


STEM = StemVitConfig(widths=(8, 16, 16, 32), depth=1)
RECIPES: dict[str, Recipe] = {
    "alternating tasks in two passes": recipe_of(1),
    "both tasks in one pass": recipe_of(32, backbone=STEM, tasks="joint"),
    "one step of both tasks": recipe_of(1, 1, tasks="joint"),
    "one step without void": recipe_of(1, 1, tasks="joint", void_kept=False, encoding="classes", cells=8),
}
NOISY = noisy(recipe_of(1))


@pytest.fixture(scope="module")
def spoilt_key(of_all_kinds: ShardSet, shard_store: Store) -> str:
    """A sample that rank 1 of 2 sees at the first step."""
    return next(iter(BatchStream(of_all_kinds, shard_store.url, debug().reader, 4, 1, 2))).keys[0]


@pytest.fixture(scope="module")
def spoilt(spoilt_key: str) -> dict[str, Recipe]:
    base = recipe_of(32, backbone=STEM, tasks="joint")
    return {"spoilt loss": spoiled(base, spoilt_key), "spoilt gradient": spoiled(base, spoilt_key, silent=True)}


WITH_AVERAGE = replace(RECIPES["alternating tasks in two passes"])
WITH_AVERAGE = replace(WITH_AVERAGE, train=replace(WITH_AVERAGE.train, ema=0.9, clip=1.0))


@pytest.fixture(scope="module")
def alone(of_all_kinds: ShardSet, shard_store: Store) -> dict[str, Trained]:
    recipes = {**RECIPES, "average": WITH_AVERAGE}
    return {name: train_alone(recipe, of_all_kinds, shard_store.url) for name, recipe in recipes.items()}


@pytest.fixture(scope="module")
def middle(of_all_kinds: ShardSet, shard_store: Store) -> State:
    """Of the run with an average, written by one worker after two of its six steps, when one head has no moments."""
    recipe = replace(WITH_AVERAGE, upkeep=replace(WITH_AVERAGE.upkeep, checkpoints=3))
    return train_alone(recipe, of_all_kinds, shard_store.url).states[0]


@pytest.fixture(scope="module")
def ranks(
    of_all_kinds: ShardSet,
    shard_store: Store,
    tmp_path_factory: pytest.TempPathFactory,
    spoilt: dict[str, Recipe],
    middle: State,
) -> dict[str, list[Trained]]:
    """Each recipe as two ranks train it: two shards of two images, so that a step of either run sees all four."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    runs = {name: Ranks(recipe) for name, recipe in {**RECIPES, "noisy": NOISY, **spoilt}.items()}
    for name, sharded in (("whole", False), ("sharded", True)):
        runs[f"{name}: average"] = Ranks(WITH_AVERAGE, sharded)
        runs[f"{name}: resumed"] = Ranks(WITH_AVERAGE, sharded, middle)
    runs |= {f"sharded: {name}": Ranks(recipe, True) for name, recipe in RECIPES.items()}
    runs |= {f"sharded: {name}": Ranks(recipe, True) for name, recipe in spoilt.items()}
    return train_ranks(runs, of_all_kinds, shard_store.url, 2, folder)


@pytest.mark.parametrize("how", ["", "sharded: "], ids=["whole", "sharded"])
@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_have_the_losses_of_one(
    ranks: dict[str, list[Trained]], alone: dict[str, Trained], name: str, how: str
):
    """On images with void and crowds, one of them without things; every rank tells the losses of all."""
    assert len(alone[name].losses) == RECIPES[name].train.epochs
    for first, second, expected in zip(*(rank.losses for rank in ranks[how + name]), alone[name].losses, strict=True):
        assert first == second
        assert first == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("how", ["", "sharded: "], ids=["whole", "sharded"])
@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("one step")])
def test_two_ranks_have_the_gradients_of_one(
    ranks: dict[str, list[Trained]], alone: dict[str, Trained], name: str, how: str
):
    """Of one step, when the weights are still the same to the bit."""
    found, expected = ranks[how + name][0].gradients, alone[name].gradients
    assert found.keys() == expected.keys()
    assert sum(bool(value.any()) for value in expected.values()) > 20
    for parameter, value in expected.items():
        torch.testing.assert_close(found[parameter], value, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["whole: average", "sharded: average", "whole: resumed", "sharded: resumed"])
def test_two_ranks_have_the_weights_of_one(ranks: dict[str, list[Trained]], alone: dict[str, Trained], name: str):
    """Also of a state that one worker wrote: the average, the moments and the weights lie where they belong."""
    expected, (found, other) = alone["average"], ranks[name]
    assert [row.step for row in found.rows] == [row.step for row in expected.rows]
    for mine, theirs in zip(found.losses, expected.losses, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    for parameter, value in expected.weights.items():
        torch.testing.assert_close(found.weights[parameter], value, atol=3e-5, rtol=0)
    assert not other.states
    assert expected.states[-1]["ema"].keys() == found.states[-1]["ema"].keys()
    for i, row in expected.states[-1]["optimizer"]["state"].items():
        for moment, value in row.items():
            torch.testing.assert_close(found.states[-1]["optimizer"]["state"][i][moment], value, atol=1e-3, rtol=1e-2)


def test_a_state_of_sharded_ranks_is_taken_up_by_one(
    ranks: dict[str, list[Trained]], alone: dict[str, Trained], of_all_kinds: ShardSet, shard_store: Store
):
    longer = replace(WITH_AVERAGE, train=replace(WITH_AVERAGE.train, epochs=7))
    found = [
        train_alone(longer, of_all_kinds, shard_store.url, state=run.states[-1])
        for run in (alone["average"], ranks["sharded: average"][0], ranks["whole: average"][0])
    ]
    assert [len(run.rows) for run in found] == [7, 7, 7]
    for run in found[1:]:
        assert run.losses[-1] == pytest.approx(found[0].losses[-1], abs=1e-4)
        for parameter, value in found[0].weights.items():
            torch.testing.assert_close(run.weights[parameter], value, atol=1e-4, rtol=0)


def test_ranks_draw_noise_of_their_own(ranks: dict[str, list[Trained]], of_all_kinds: ShardSet, shard_store: Store):
    """A rank's draws follow from seed, step and rank: rank 0 of two draws what it draws alone."""
    means = [losses["draw"] for losses in ranks["noisy"][0].losses]
    half = replace(NOISY, train=replace(NOISY.train, batch=2, epochs=3))
    first = [losses["draw"] for losses in train_alone(half, of_all_kinds, shard_store.url).losses]
    second = [2 * mean - draw for mean, draw in zip(means, first, strict=True)]
    assert len({round(draw, 4) for draw in first + second}) == 12
    assert all(0 < draw < 1 for draw in second)


@pytest.mark.parametrize("how", ["", "sharded: "], ids=["whole", "sharded"])
def test_a_sample_of_one_rank_stops_all_of_them_and_one_is_at_fault(
    ranks: dict[str, list[Trained]], spoilt_key: str, how: str
):
    first, second = ranks[how + "spoilt loss"]
    assert (first.own, second.own) == (False, True)
    assert first.failure.startswith("step 0: gradient norm nan")
    assert spoilt_key in second.failure
    assert spoilt_key not in first.failure


def test_a_gradient_alone_is_no_ranks_fault_but_stops_all(ranks: dict[str, list[Trained]]):
    for rank in ranks["spoilt gradient"]:
        assert rank.failure.startswith("step 0: gradient norm nan")
        assert not rank.own
