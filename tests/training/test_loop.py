import copy
import io
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
from tests.training.ranks import noisy, spoiled, train_alone
from training.backbones import StemVitConfig
from training.loop import NonFiniteLoss, Place, State, _Guard, _Run, train
from training.methods.base import Method
from training.reader import BatchStream, ReaderConfig
from training.recipe import Recipe, TrainConfig
from training.recipes.generalist import debug


def recipe_of(**changes) -> Recipe:
    """The debug recipe in float32, with other train options."""
    return replace(debug(), train=replace(debug().train, **{"bf16": False, **changes}))


def run(recipe: Recipe, shards: ShardSet, store: Store, state: State | None = None):
    """(method, history, states at checkpoints, steps reported)."""
    states, told = [], []

    def report(progress, state):
        told.append(progress.step)
        if state is not None:
            states.append(copy.deepcopy(state))

    method, history = train(recipe, shards, store.url, Place(), state, report)
    return method, history, states, told


def losses(history: list[dict]) -> list[float]:
    return [value for row in history for value in row["losses"].values()]


def through_a_file(state: State) -> State:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_the_debug_recipe_learns(images_of_16: ShardSet, shard_store: Store, bf16: bool):
    _, history, _, _ = run(recipe_of(epochs=12, bf16=bf16), images_of_16, shard_store)
    assert len(history) == 48
    for name in ("semantic", "instance", "dice"):
        found = [row["losses"][name] for row in history if name in row["losses"]]
        assert sum(found[-4:]) / 4 < found[0], name


@pytest.mark.parametrize("keep", [lambda state: state, through_a_file], ids=["in memory", "through a file"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_a_resumed_run_goes_on_as_if_undisturbed(images_of_16: ShardSet, shard_store: Store, keep, bf16: bool):
    recipe = recipe_of(epochs=3, bf16=bf16)
    method, history, states, _ = run(recipe, images_of_16, shard_store)
    assert [state["step"] for state in states] == [4, 8, 12]
    for state in states:
        again, resumed, _, told = run(recipe, images_of_16, shard_store, keep(state))
        assert told == list(range(state["step"] + 1, 13))
        assert losses(resumed) == pytest.approx(losses(history), abs=1e-6)
        assert [row["lr"] for row in resumed] == [row["lr"] for row in history]
        for name, value in method.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value, atol=1e-6, rtol=0)


def test_a_resume_in_the_middle_of_an_epoch_and_of_a_task_cycle(make_set: Maker, index: Index, shard_store: Store):
    shards, recipe = make_set(index.records[:13], 3), recipe_of(epochs=4, checkpoints=13)
    _, history, states, _ = run(recipe, shards, shard_store)
    for state in states[::4]:
        _, resumed, _, _ = run(recipe, shards, shard_store, through_a_file(state))
        assert losses(resumed) == pytest.approx(losses(history), abs=1e-6)


def test_the_last_step_is_always_saved(images_of_16: ShardSet, shard_store: Store):
    for checkpoints in (1, 5, 100):
        _, history, states, told = run(recipe_of(epochs=1.7, checkpoints=checkpoints), images_of_16, shard_store)
        assert states[-1]["step"] == told[-1] == history[-1]["step"] == 7
        assert len(states) == min(checkpoints, 7)


def test_the_rate_warms_up_and_then_falls(images_of_16: ShardSet, shard_store: Store):
    recipe = recipe_of(epochs=5, warmup_epochs=1, lr=1e-3)
    rates = [row["lr"] for row in run(recipe, images_of_16, shard_store)[1]]
    half_wave = [0.5e-3 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    assert rates == pytest.approx([min(1, (step + 1) / 4) * value for step, value in enumerate(half_wave)])


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


def layer(name: str) -> int:
    """Layers of the debug recipe's ViT of depth 4 by name: embeddings 0, blocks 1 to 4, all else above."""
    parts = name.split(".")
    if "embeddings" in parts:
        return 0
    if "layer" in parts:
        return int(parts[parts.index("layer") + 1]) + 1
    return 4 if parts[1] == "backbone" else 5


@pytest.mark.parametrize("layer_decay", [1.0, 0.6])
def test_every_layer_learns_at_its_own_share_of_the_rate(
    images_of_16: ShardSet, shard_store: Store, layer_decay: float
):
    recipe = recipe_of(epochs=2, warmup_epochs=0.5, lr=1e-3, layer_decay=layer_decay)
    seen: list[dict[int, float]] = []

    def look(optimizer: torch.optim.Optimizer, *_) -> None:
        seen.append({id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]})

    hook = register_optimizer_step_pre_hook(look)
    try:
        method = run(recipe, images_of_16, shard_store)[0]
    finally:
        hook.remove()
    assert len(seen) == 8
    for step, rates in enumerate(seen):
        share = min(1, (step + 1) / 2) * (1 + math.cos(math.pi * step / 8)) / 2
        for name, parameter in method.named_parameters():
            expected = 1e-3 * share * layer_decay ** (5 - layer(name))
            assert rates[id(parameter)] == pytest.approx(expected, rel=1e-9), name
    assert {layer(name) for name, _ in method.named_parameters()} == set(range(6))


def test_the_reported_rate_is_that_of_the_heads(images_of_16: ShardSet, shard_store: Store):
    rows = [run(recipe_of(epochs=1, layer_decay=decay), images_of_16, shard_store)[1] for decay in (1.0, 0.6)]
    assert [row["lr"] for row in rows[1]] == [row["lr"] for row in rows[0]]


def test_lower_layers_move_less_where_their_rate_is_lower(images_of_16: ShardSet, shard_store: Store):
    def moved(layer_decay: float) -> dict[int, float]:
        recipe = recipe_of(epochs=1.5, lr=1e-3, layer_decay=layer_decay, checkpoints=6, weight_decay=0.0)
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
    method, _, states, _ = run(recipe_of(epochs=2, ema=0.7, checkpoints=8), images_of_16, shard_store)
    assert [state["step"] for state in states] == list(range(1, 9))
    average = weights_of(states[0])
    for state in states:
        average = {name: 0.7 * average[name] + 0.3 * value for name, value in weights_of(state).items()}
        for name, value in average.items():
            torch.testing.assert_close(state["ema"][f"module.{name}"].double(), value, atol=1e-6, rtol=0)
    for name, value in method.state_dict().items():
        torch.testing.assert_close(value.double(), average[name], atol=1e-6, rtol=0)
    assert any((value - states[-1]["method"][name]).abs().max() > 1e-4 for name, value in average.items())


def test_the_moving_average_changes_nothing_in_training(images_of_16: ShardSet, shard_store: Store):
    plain, averaged = (run(recipe_of(epochs=2, ema=ema), images_of_16, shard_store) for ema in (0.0, 0.9))
    assert losses(plain[1]) == losses(averaged[1])
    assert all(torch.equal(averaged[2][-1]["method"][name], value) for name, value in plain[0].state_dict().items())


def test_by_default_there_is_no_average_and_the_last_weights_are_returned(images_of_16: ShardSet, shard_store: Store):
    method, _, states, _ = run(recipe_of(epochs=1), images_of_16, shard_store)
    assert states[-1]["ema"] is None
    assert all(torch.equal(states[-1]["method"][name], value) for name, value in method.state_dict().items())


def test_an_average_through_a_file_goes_on_as_if_undisturbed(images_of_16: ShardSet, shard_store: Store):
    recipe = recipe_of(epochs=3, ema=0.8)
    method, _, states, _ = run(recipe, images_of_16, shard_store)
    for state in states[:2]:
        again = run(recipe, images_of_16, shard_store, through_a_file(state))[0]
        for name, value in method.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value, atol=1e-6, rtol=0)


def test_noise_follows_from_seed_and_step_alone(images_of_16: ShardSet, shard_store: Store):
    """Not from what was drawn before: a method that draws resumes to the bit, from any step."""
    recipe = noisy(recipe_of(epochs=3, checkpoints=12, micro_batch=2))
    torch.manual_seed(1234)
    _, history, states, _ = run(recipe, images_of_16, shard_store)
    draws = [row["losses"]["draw"] for row in history]
    assert len(set(draws)) == 12
    for state in states[:-1:3]:
        torch.rand(7)
        method, resumed, _, _ = run(recipe, images_of_16, shard_store, through_a_file(state))
        assert losses(resumed) == losses(history)
        assert all(torch.equal(states[-1]["method"][name], value) for name, value in method.state_dict().items())
    other = replace(recipe, train=replace(recipe.train, seed=1))
    assert not {row["losses"]["draw"] for row in run(other, images_of_16, shard_store)[1]} & set(draws)


def test_two_steps_of_three_are_instance_and_one_is_semantic(images_of_16: ShardSet, shard_store: Store):
    history = run(recipe_of(epochs=3), images_of_16, shard_store)[1]
    kinds = [
        (sum("semantic" in n for n in row["losses"]), sum("instance" in n for n in row["losses"])) for row in history
    ]
    assert len(kinds) == 12
    for at in range(10):
        assert sorted(kinds[at : at + 3]) == [(0, 2), (0, 2), (2, 0)]


def test_both_tasks_of_a_joint_recipe_are_in_every_step(images_of_16: ShardSet, shard_store: Store):
    recipe = replace(recipe_of(epochs=1), method=replace(debug().method, tasks="joint"))
    for row in run(recipe, images_of_16, shard_store)[1]:
        assert row["losses"].keys() == {"semantic", "semantic_tv", "instance", "instance_tv", "dice"}


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
    method, history, _, _ = run(recipe, images_of_16, shard_store)
    assert len(history) == 1
    theirs = model.state_dict()
    ours = backbone_of(method.state_dict())
    assert theirs.keys() - ours.keys() == {"embeddings.mask_token"}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=0)


def test_a_resumed_run_does_not_read_the_published_weights(
    images_of_16: ShardSet, shard_store: Store, published: tuple[Dinov2Model, Path]
):
    file = published[1]
    recipe = pretrained(file, epochs=3)
    method, history, states, _ = run(recipe, images_of_16, shard_store)
    file.unlink()
    again, resumed, _, _ = run(recipe, images_of_16, shard_store, through_a_file(states[0]))
    assert losses(resumed) == pytest.approx(losses(history), abs=1e-6)
    for name, value in method.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-6, rtol=0)
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
    error = pickle.loads(pickle.dumps(NonFiniteLoss("step 3", own=True)))
    assert (str(error), error.own) == ("step 3", True)


STEM = StemVitConfig(widths=(8, 16, 16, 32), depth=1)


def tiny_run(**changes) -> _Run:
    """A run so long that its rate does not change within a few steps."""
    torch.manual_seed(0)
    recipe = recipe_of(warmup_epochs=0, layer_decay=0.7, **changes)
    method = replace(recipe, method=replace(recipe.method, backbone=STEM, tasks="joint")).build(CATEGORIES)
    return _Run(method, recipe.train, 10**12)


def take(run: _Run, norm: float, seed: int = 0) -> None:
    """A step with gradients of a scene; where the norm is not finite, with such gradients, as clipping leaves them."""
    method: Method = run.method
    run.optimizer.zero_grad()
    torch.stack(list(method.losses(batch_of(*scenes(2, first=seed)), 0).values())).sum().backward()
    if not math.isfinite(norm):
        for parameter in method.parameters():
            parameter.grad.mul_(float("nan"))
    run.advance(torch.tensor(norm))


def everything(run: _Run) -> dict[str, Tensor]:
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


@given(st.integers(1, 600), st.integers(1, 16), st.integers(1, 64))
def test_a_batch_is_split_exactly_or_refused(batch: int, workers: int, micro_batch: int):
    config = TrainConfig(batch=batch, micro_batch=micro_batch, epochs=1, lr=1)
    if batch % workers:
        with pytest.raises(TesseraError, match=f"total batch of {batch} does not divide among {workers} workers"):
            config.split_batch(workers)
        return
    images, passes = config.split_batch(workers)
    assert images * passes * workers == batch
    assert images <= micro_batch
    larger = [n for n in range(images + 1, micro_batch + 1) if batch // workers % n == 0]
    assert not larger


@pytest.mark.parametrize(("epochs", "samples", "steps"), [(1, 16, 4), (0.5, 16, 2), (0.01, 16, 1), (2, 118287, 59144)])
def test_steps_follow_from_epochs(epochs: float, samples: int, steps: int):
    assert TrainConfig(batch=4, epochs=epochs, lr=1).steps(samples) == steps


@pytest.mark.parametrize("change", [{"batch": 0}, {"micro_batch": 0}, {"checkpoints": 0}, {"epochs": 0}, {"lr": -1.0}])
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
