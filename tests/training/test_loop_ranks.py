from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infra.store import Store
from preprocessing.shards import ShardSet
from tests.training.ranks import Trained, noisy, spoiled, train_alone, train_ranks
from training.backbones import StemVitConfig
from training.reader import BatchStream
from training.recipe import Recipe
from training.recipes.generalist import debug


def recipe_of(micro_batch: int, epochs: float = 6, **options) -> Recipe:
    base = debug()
    train = replace(base.train, bf16=False, micro_batch=micro_batch, epochs=epochs, clip=1e9)
    return replace(base, method=replace(base.method, **options), train=train)


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
    return next(iter(BatchStream(of_all_kinds, shard_store.url, debug().reader, 2, 1, 2))).keys[0]


@pytest.fixture(scope="module")
def spoilt(spoilt_key: str) -> dict[str, Recipe]:
    base = recipe_of(32, backbone=STEM, tasks="joint")
    return {"spoilt loss": spoiled(base, spoilt_key), "spoilt gradient": spoiled(base, spoilt_key, silent=True)}


@pytest.fixture(scope="module")
def ranks(
    of_all_kinds: ShardSet, shard_store: Store, tmp_path_factory: pytest.TempPathFactory, spoilt: dict[str, Recipe]
) -> dict[str, list[Trained]]:
    """Each recipe as two ranks train it: two shards of two images, so that a step of either run sees all four."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    return train_ranks({**RECIPES, "noisy": NOISY, **spoilt}, of_all_kinds, shard_store.url, 2, folder)


@pytest.fixture(scope="module")
def alone(of_all_kinds: ShardSet, shard_store: Store) -> dict[str, Trained]:
    return {name: train_alone(recipe, of_all_kinds, shard_store.url) for name, recipe in RECIPES.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_have_the_losses_of_one(ranks: dict[str, list[Trained]], alone: dict[str, Trained], name: str):
    """On images with void and crowds, one of them without things."""
    assert len(alone[name].losses) == RECIPES[name].train.epochs
    for *shares, expected in zip(*(rank.losses for rank in ranks[name]), alone[name].losses, strict=True):
        mean = {name: sum(share[name] for share in shares) / 2 for name in shares[0]}
        assert mean == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_have_the_gradients_of_one(ranks: dict[str, list[Trained]], alone: dict[str, Trained], name: str):
    """Those of the last step; of the only one where it says so, when the weights are still the same to the bit."""
    assert len(alone[name].gradients) > 20
    for rank in ranks[name]:
        assert {name: value.shape for name, value in rank.gradients.items() if value.any()} == {
            name: value.shape for name, value in alone[name].gradients.items() if value.any()
        }
        if name.startswith("one step"):
            for parameter, value in alone[name].gradients.items():
                torch.testing.assert_close(rank.gradients[parameter], value, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [*RECIPES, "noisy"])
def test_all_ranks_have_the_same_weights(ranks: dict[str, list[Trained]], name: str):
    first, second = (rank.weights for rank in ranks[name])
    assert first.keys() == second.keys()
    for parameter, value in first.items():
        assert torch.equal(second[parameter], value), parameter


def test_all_ranks_serve_the_same_task_at_each_step(ranks: dict[str, list[Trained]]):
    tasks = [["semantic" in losses for losses in rank.losses] for rank in ranks["alternating tasks in two passes"]]
    assert tasks[0] == tasks[1] == [False, False, True] * 2


def test_ranks_draw_different_noise(ranks: dict[str, list[Trained]], of_all_kinds: ShardSet, shard_store: Store):
    """A rank's draws follow from seed, step and rank: rank 0 of two draws what it draws alone."""
    draws = [[losses["draw"] for losses in rank.losses] for rank in ranks["noisy"]]
    assert len(set(draws[0] + draws[1])) == 12
    half = replace(NOISY, train=replace(NOISY.train, batch=2, epochs=3))
    assert [losses["draw"] for losses in train_alone(half, of_all_kinds, shard_store.url).losses] == draws[0]


def test_a_sample_of_one_rank_stops_all_of_them_and_one_is_at_fault(ranks: dict[str, list[Trained]], spoilt_key: str):
    first, second = ranks["spoilt loss"]
    assert (first.own, second.own) == (False, True)
    assert first.failure.startswith("step 0: gradient norm nan")
    assert spoilt_key in second.failure
    assert spoilt_key not in first.failure


def test_a_gradient_alone_is_no_ranks_fault_but_stops_all(ranks: dict[str, list[Trained]]):
    for rank in ranks["spoilt gradient"]:
        assert rank.failure.startswith("step 0: gradient norm nan")
        assert not rank.own
