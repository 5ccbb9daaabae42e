import copy
import io
import itertools
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Dinov2Config, Dinov2Model

from infra.errors import TesseraError
from infra.store import Store
from preprocessing.shards import ShardSet
from preprocessing.source import Index
from preprocessing.synthetic import CATEGORIES
from tests.support.examples import batch_of, scenes
from tests.training.conftest import Maker
from tests.training.ranks import Recorder, noisy, recipe_of, spoiled, train_alone, trainer_of
from training.checkpoints import State
from training.loop import NonFiniteLoss, train
from training.metrics import Row
from training.parallel import Place
from training.reader import BatchStream, ReaderConfig
from training.recipe import Recipe
from training.recipes.generalist import debug


def run(recipe: Recipe, shards: ShardSet, store: Store, state: State | None = None):
    """(weights, rows, states at checkpoints, steps told)."""
    recorder = Recorder()
    weights, rows = train(recipe, shards, store.url, Place(), state, recorder)
    return weights, rows, recorder.states, [row.step for row in recorder.rows]


def losses(history: list[Row]) -> list[float]:
    return [value for row in history for value in row.losses.values()]


def through_a_file(state: State) -> State:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.fixture(params=[False, True], ids=["float32", "bf16"])
def bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Emulated where this machine has no instructions for it."""
    monkeypatch.setattr("training.precision.multiplies_bf16", lambda kind: True)
    return request.param


def test_the_debug_recipe_learns(images_of_16: ShardSet, shard_store: Store, bf16: bool):
    _, history, _, _ = run(recipe_of(epochs=12, bf16=bf16), images_of_16, shard_store)
    assert len(history) == 48
    for name in ("semantic", "instance", "dice"):
        found = [row.losses[name] for row in history if name in row.losses]
        assert sum(found[-4:]) / 4 < found[0], name


@pytest.mark.parametrize("keep", [lambda state: state, through_a_file], ids=["in memory", "through a file"])
def test_a_resumed_run_goes_on_as_if_undisturbed(images_of_16: ShardSet, shard_store: Store, keep, bf16: bool):
    recipe = recipe_of(epochs=3, bf16=bf16)
    weights, history, states, _ = run(recipe, images_of_16, shard_store)
    assert [state["step"] for state in states] == [4, 8, 12]
    for state in states:
        again, resumed, _, told = run(recipe, images_of_16, shard_store, keep(state))
        assert told == list(range(state["step"] + 1, 13))
        assert losses(resumed) == pytest.approx(losses(history), abs=1e-6)
        assert [row.lr for row in resumed] == [row.lr for row in history]
        for name, value in weights.items():
            torch.testing.assert_close(again[name], value, atol=1e-6, rtol=0)


def test_a_resume_in_the_middle_of_an_epoch_and_of_a_task_cycle(make_set: Maker, index: Index, shard_store: Store):
    shards, recipe = make_set(index.records[:13], 3), recipe_of(epochs=4, upkeep={"checkpoints": 13})
    _, history, states, _ = run(recipe, shards, shard_store)
    for state in states[::4]:
        _, resumed, _, _ = run(recipe, shards, shard_store, through_a_file(state))
        assert losses(resumed) == pytest.approx(losses(history), abs=1e-6)


def test_the_last_step_is_always_saved(images_of_16: ShardSet, shard_store: Store):
    for checkpoints in (1, 5, 100):
        _, history, states, told = run(
            recipe_of(epochs=1.7, upkeep={"checkpoints": checkpoints}), images_of_16, shard_store
        )
        assert states[-1]["step"] == told[-1] == history[-1].step == 7
        assert len(states) == min(checkpoints, 7)


def test_the_rate_warms_up_and_then_falls(images_of_16: ShardSet, shard_store: Store):
    recipe = recipe_of(epochs=5, warmup_epochs=1, lr=1e-3)
    rates = [row.lr for row in run(recipe, images_of_16, shard_store)[1]]
    half_wave = [0.5e-3 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    assert rates == pytest.approx([min(1, (step + 1) / 4) * value for step, value in enumerate(half_wave)])


def layer(name: str) -> int:
    """Layers of the debug recipe's ViT of depth 4 by name: embeddings 0, blocks 1 to 4, all else above."""
    parts = name.split(".")
    if "embeddings" in parts:
        return 0
    if "layer" in parts:
        return int(parts[parts.index("layer") + 1]) + 1
    return 4 if parts[1] == "backbone" else 5


@pytest.mark.parametrize("layer_decay", [1.0, 0.6])
def test_every_layer_learns_at_its_own_share_of_the_rate(layer_decay: float):
    recipe = recipe_of(epochs=2, warmup_epochs=0.5, lr=1e-3, layer_decay=layer_decay)
    trainer = trainer_of(recipe, CATEGORIES, 8)
    batches, seen = itertools.repeat(batch_of(*scenes(4, (32, 32)))), []
    for _ in range(8):
        trainer.take_step(batches)
        seen.append({id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]})
    for step, rates in enumerate(seen):
        share = min(1, (step + 1) / 2) * (1 + math.cos(math.pi * step / 8)) / 2
        for name, parameter in trainer.method.named_parameters():
            expected = 1e-3 * share * layer_decay ** (5 - layer(name))
            assert rates[id(parameter)] == pytest.approx(expected, rel=1e-9), name
    assert {layer(name) for name, _ in trainer.method.named_parameters()} == set(range(6))


def test_the_reported_rate_is_that_of_the_heads(images_of_16: ShardSet, shard_store: Store):
    rows = [run(recipe_of(epochs=1, layer_decay=decay), images_of_16, shard_store)[1] for decay in (1.0, 0.6)]
    assert [row.lr for row in rows[1]] == [row.lr for row in rows[0]]


def test_lower_layers_move_less_where_their_rate_is_lower(images_of_16: ShardSet, shard_store: Store):
    def moved(layer_decay: float) -> dict[int, float]:
        recipe = recipe_of(epochs=1.5, lr=1e-3, layer_decay=layer_decay, upkeep={"checkpoints": 6}, weight_decay=0.0)
        states = [state["method"] for state in run(recipe, images_of_16, shard_store)[2]]
        far: dict[int, float] = {}
        for name, value in states[0].items():
            far[layer(name)] = max(far.get(layer(name), 0), float((states[-1][name] - value).abs().max()))
        return far

    alike, decayed = moved(1.0), moved(0.3)
    assert decayed[5] == pytest.approx(alike[5], rel=0.5)
    for below in range(5):
        assert decayed[below] == pytest.approx(alike[below] * 0.3 ** (5 - below), rel=0.5)


def weights_of(state: State) -> dict[str, Tensor]:
    return {name: value.double() for name, value in state["method"].items()}


def test_the_moving_average_is_the_recursion_over_the_weights_of_each_step(images_of_16: ShardSet, shard_store: Store):
    """It starts at the weights after the first step."""
    weights, _, states, _ = run(recipe_of(epochs=2, ema=0.7, upkeep={"checkpoints": 8}), images_of_16, shard_store)
    assert [state["step"] for state in states] == list(range(1, 9))
    average = weights_of(states[0])
    for state in states:
        average = {name: 0.7 * average[name] + 0.3 * value for name, value in weights_of(state).items()}
        for name, value in average.items():
            torch.testing.assert_close(state["ema"][f"module.{name}"].double(), value, atol=1e-6, rtol=0)
    for name, value in weights.items():
        torch.testing.assert_close(value.double(), average[name], atol=1e-6, rtol=0)
    assert any((value - states[-1]["method"][name]).abs().max() > 1e-4 for name, value in average.items())


def test_the_moving_average_changes_nothing_in_training(images_of_16: ShardSet, shard_store: Store):
    plain, averaged = (run(recipe_of(epochs=2, ema=ema), images_of_16, shard_store) for ema in (0.0, 0.9))
    assert losses(plain[1]) == losses(averaged[1])
    assert all(torch.equal(averaged[2][-1]["method"][name], value) for name, value in plain[0].items())


def test_by_default_there_is_no_average_and_the_last_weights_are_returned(images_of_16: ShardSet, shard_store: Store):
    weights, _, states, _ = run(recipe_of(epochs=1), images_of_16, shard_store)
    assert states[-1]["ema"] is None
    assert all(torch.equal(states[-1]["method"][name], value) for name, value in weights.items())


def test_an_average_through_a_file_goes_on_as_if_undisturbed(images_of_16: ShardSet, shard_store: Store):
    recipe = recipe_of(epochs=3, ema=0.8)
    weights, _, states, _ = run(recipe, images_of_16, shard_store)
    for state in states[:2]:
        again = run(recipe, images_of_16, shard_store, through_a_file(state))[0]
        for name, value in weights.items():
            torch.testing.assert_close(again[name], value, atol=1e-6, rtol=0)


def test_noise_follows_from_seed_and_step_alone(images_of_16: ShardSet, shard_store: Store):
    """Not from what was drawn before: a method that draws resumes to the bit, from any step."""
    recipe = noisy(recipe_of(epochs=3, upkeep={"checkpoints": 12}, micro_batch=2))
    torch.manual_seed(1234)
    _, history, states, _ = run(recipe, images_of_16, shard_store)
    draws = [row.losses["draw"] for row in history]
    assert len(set(draws)) == 12
    for state in states[:-1:3]:
        torch.rand(7)
        weights, resumed, _, _ = run(recipe, images_of_16, shard_store, through_a_file(state))
        assert losses(resumed) == losses(history)
        assert all(torch.equal(states[-1]["method"][name], value) for name, value in weights.items())
    other = replace(recipe, train=replace(recipe.train, seed=1))
    assert not {row.losses["draw"] for row in run(other, images_of_16, shard_store)[1]} & set(draws)


def test_two_fine_tunings_have_the_same_weights_just_where_they_have_the_same_seed(
    images_of_16: ShardSet, shard_store: Store
):
    """They begin with the same weights, of which the seed draws none, and nothing draws in the network."""
    torch.manual_seed(5)
    init = recipe_of().build(images_of_16.labels).state_dict()

    def tuned(seed: int) -> dict[str, Tensor]:
        recipe = recipe_of(epochs=1, warmup_epochs=0, seed=seed)
        return train(recipe, images_of_16, shard_store.url, Place(), None, Recorder(), init)[0]

    first, again, other = (tuned(seed) for seed in (1, 1, 2))
    assert first.keys() == init.keys()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not any(torch.equal(other[name], value) for name, value in first.items() if value.ndim > 1)


def test_two_steps_of_three_are_instance_and_one_is_semantic(images_of_16: ShardSet, shard_store: Store):
    history = run(recipe_of(epochs=3), images_of_16, shard_store)[1]
    kinds = [(sum("semantic" in n for n in row.losses), sum("instance" in n for n in row.losses)) for row in history]
    assert len(kinds) == 12
    for at in range(10):
        assert sorted(kinds[at : at + 3]) == [(0, 2), (0, 2), (2, 0)]


def test_both_tasks_of_a_joint_recipe_are_in_every_step(images_of_16: ShardSet, shard_store: Store):
    recipe = replace(recipe_of(epochs=1), method=replace(debug().method, tasks="joint"))
    for row in run(recipe, images_of_16, shard_store)[1]:
        assert row.losses.keys() == {"semantic", "semantic_tv", "instance", "instance_tv", "dice"}


@pytest.fixture
def published(tmp_path: Path) -> tuple[Dinov2Model, Path]:
    """A model of the library in the debug recipe's shape, and its file."""
    torch.manual_seed(99)
    shape = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, patch_size=8, image_size=32)
    model = Dinov2Model(shape)
    for parameter in model.parameters():  # what is 0 or 1 at the start would be so without the file, too
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    return model, tmp_path / "model.safetensors"


def pretrained(weights: Path, **changes) -> Recipe:
    recipe = recipe_of(**changes)
    return replace(
        recipe, method=replace(recipe.method, backbone=replace(recipe.method.backbone, weights=str(weights)))
    )


def backbone_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "network.backbone.net."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def test_training_starts_from_the_published_weights(
    images_of_16: ShardSet, shard_store: Store, published: tuple[Dinov2Model, Path]
):
    model, file = published
    recipe = pretrained(file, epochs=0.25, lr=1e-12, weight_decay=0.0)
    weights, history, _, _ = run(recipe, images_of_16, shard_store)
    assert len(history) == 1
    theirs = model.state_dict()
    ours = backbone_of(weights)
    assert theirs.keys() - ours.keys() == {"embeddings.mask_token"}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=0)


def test_a_resumed_run_does_not_read_the_published_weights(
    images_of_16: ShardSet, shard_store: Store, published: tuple[Dinov2Model, Path]
):
    file = published[1]
    recipe = pretrained(file, epochs=3)
    weights, history, states, _ = run(recipe, images_of_16, shard_store)
    file.unlink()
    again, resumed, _, _ = run(recipe, images_of_16, shard_store, through_a_file(states[0]))
    assert losses(resumed) == pytest.approx(losses(history), abs=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=0)
    with pytest.raises(TesseraError, match=r"model\.safetensors"):
        run(recipe, images_of_16, shard_store)


def poisoned(state: State, name: str) -> State:
    state = copy.deepcopy(state)
    state["method"][name][..., 0] = float("nan")
    return state


@pytest.mark.parametrize("micro_batch", [32, 1], ids=["one pass", "four passes"])
@pytest.mark.parametrize(
    ("name", "step"),
    [("network.decoder.ups.0.0.weight", 4), ("network.instance_head.bias", 4), ("network.semantic_head.bias", 5)],
)
def test_a_loss_that_is_not_finite_stops_before_the_step(
    images_of_16: ShardSet, shard_store: Store, name: str, step: int, micro_batch: int
):
    """Steps 4 and 5 serve the instance and the semantic task."""
    recipe = recipe_of(epochs=3, micro_batch=micro_batch)
    state = run(recipe, images_of_16, shard_store)[2][0]
    batches = BatchStream(images_of_16, shard_store.url, ReaderConfig(), 4, start_step=step)
    keys, taken = next(iter(batches)).keys, []
    hook = register_optimizer_step_pre_hook(lambda *_: taken.append(1))
    try:
        with pytest.raises(NonFiniteLoss, match=f"^step {step}: .*samples {', '.join(keys)}$") as caught:
            run(recipe, images_of_16, shard_store, poisoned(state, name))
    finally:
        hook.remove()
    assert len(taken) == step - 4
    assert caught.value.own


@pytest.mark.parametrize("silent", [False, True], ids=["the loss", "only its gradient"])
def test_what_is_not_finite_is_told_apart(images_of_16: ShardSet, shard_store: Store, silent: bool):
    """own: the worker's losses were at fault."""
    recipe = recipe_of(epochs=3)
    keys = next(iter(BatchStream(images_of_16, shard_store.url, recipe.reader, 4, start_step=3))).keys
    with pytest.raises(NonFiniteLoss, match=f"^step [0-3]: gradient norm nan, .*samples .*{keys[2]}") as caught:
        run(spoiled(recipe, keys[2], silent), images_of_16, shard_store)
    assert caught.value.own is not silent


def test_the_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(NonFiniteLoss(3, math.nan, {"dice": math.inf}, ("1", "2"))))
    assert str(error) == "step 3: gradient norm nan, losses {'dice': inf}, samples 1, 2"
    assert (error.step, error.keys, error.own) == (3, ("1", "2"), True)


METHODS = {
    "the paper's": {},
    "joint": {"tasks": "joint"},
    "without void, squared": {"tasks": "joint", "void_kept": False, "squared": True},
    "direct": {"tasks": "joint", "encoding": "direct", "boundaries": "panoptic"},
    "classes": {"tasks": "joint", "encoding": "classes", "cells": 8, "void_kept": False},
}


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())
def test_losses_do_not_depend_on_the_split_into_passes(of_all_kinds: ShardSet, shard_store: Store, options: dict):
    """On images with void and crowds, one of them without things: all losses are means of equal parts."""
    found = []
    for size in (4, 2, 1):
        recipe = recipe_of(epochs=6, micro_batch=size)
        recipe = replace(recipe, method=replace(recipe.method, **options))
        found.append(losses(run(recipe, of_all_kinds, shard_store)[1]))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize("options", [m | {"tasks": "joint"} for m in METHODS.values()][1:], ids=list(METHODS)[1:])
def test_gradients_do_not_depend_on_the_split_into_passes(of_all_kinds: ShardSet, shard_store: Store, options: dict):
    found = []
    for size in (4, 2, 1):
        recipe = recipe_of(epochs=1, micro_batch=size, clip=1e9)
        recipe = replace(recipe, method=replace(recipe.method, **options))
        found.append(train_alone(recipe, of_all_kinds, shard_store.url).gradients)
    assert any(value.abs().max() > 0.01 for value in found[0].values())
    for parts in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(parts[name], value, atol=2e-6, rtol=1e-4)
