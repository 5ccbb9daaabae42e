"""The train loop: it learns, resumes exactly, stops before it spoils the weights, and splits its batch."""

import io
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from infra.errors import TesseraError
from infra.processes import free_ports
from infra.store import open_store
from preprocessing.coco import read_index
from preprocessing.shards import commit, compute_shard, plan, read_set, set_path
from preprocessing.synthetic import SyntheticConfig, write_set
from training.loop import NonFiniteLoss, Place, train
from training.recipe import TrainConfig
from training.recipes import RECIPES, debug, recipe


def short(**changes):
    """The debug recipe in float32, for a few epochs of 16 images."""
    base = debug()
    return replace(base, train=replace(base.train, **{"epochs": 5, "bf16": False, "checkpoints": 4, **changes}))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    store = open_store(str(folder / "store"))
    index = read_index(write_set(folder, SyntheticConfig(train=16, val=1, size=(32, 32))), "train2017")
    config = debug().shards
    jobs = plan(index, config)
    return commit(
        store, set_path(index, config, jobs), index, config, [compute_shard(store.url, j) for j in jobs], 0
    ), store


def run(shards, recipe, state=None, place=None):
    """Weights, history, and the states that were reported, by step."""
    states = {}

    def report(progress, state):
        if state is not None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            states[progress.step] = buffer.getvalue()

    method, history = train(recipe, shards[0], shards[1].url, place or Place(), state, report)
    return method.state_dict(), history, states


def load(data):
    return torch.load(io.BytesIO(data), weights_only=True)


def test_it_learns(shards):
    _, history, _ = run(shards, short(epochs=40, lr=3e-3))
    seen = [row["losses"]["semantic"] for row in history if "semantic" in row["losses"]]
    assert np.mean(seen[-5:]) < 0.8 * np.mean(seen[:5])


def test_a_resumed_run_ends_where_an_undisturbed_one_does(shards):
    weights, history, states = run(shards, short())
    assert sorted(states) == [5, 10, 15, 20]
    for step in (5, 15):
        resumed, later, _ = run(shards, short(), load(states[step]))
        assert [row["step"] for row in later] == [row["step"] for row in history]
        for mine, theirs in zip(later, history, strict=True):
            assert mine["losses"] == pytest.approx(theirs["losses"], abs=1e-6)
        assert all(torch.allclose(resumed[name], weights[name], atol=1e-6) for name in weights)


def test_a_non_finite_loss_stops_before_the_step_and_names_the_samples(shards):
    state = load(run(shards, short())[2][10])
    name = next(name for name in state["method"] if name.endswith("semantic_head.weight"))
    state["method"][name][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"step \d+: .*samples 0000"):
        run(shards, short(), state)


def test_accumulation_equals_one_pass_where_images_weigh_the_same(shards):
    """Semantic losses are means over labelled pixels of a pass, so passes of unequal void differ a little."""
    whole, _, _ = run(shards, short(epochs=0.25))
    split, _, _ = run(shards, short(epochs=0.25, micro_batch=1))
    assert all(torch.allclose(whole[name], split[name], atol=2e-3) for name in whole)


def _rank(rank, port, folder, path, out):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    store = open_store(folder)
    weights, history, _ = run((read_set(store, path), store), short(epochs=3), place=Place(rank, 2))
    torch.save((weights, [row["step"] for row in history]), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_take_the_same_steps_and_end_with_the_same_weights(shards, tmp_path):
    mp.spawn(_rank, (free_ports(1)[0], shards[1].url, shards[0].path, str(tmp_path)), nprocs=2)
    (mine, steps), (theirs, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert steps == other
    assert steps[-1] == 12
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("batch", "micro", "workers", "expected"),
    [(8, 32, 1, (8, 1)), (8, 32, 2, (4, 1)), (256, 32, 8, (32, 1)), (256, 32, 1, (32, 8)), (12, 5, 1, (4, 3))],
)
def test_the_total_batch_is_kept_by_accumulation(batch, micro, workers, expected):
    config = TrainConfig(batch=batch, epochs=1, lr=1e-3, micro_batch=micro)
    images, passes = config.split_batch(workers)
    assert (images, passes) == expected
    assert images * passes * workers == batch


def test_a_batch_that_cannot_be_split_exactly_is_refused():
    with pytest.raises(TesseraError, match="total batch of 8 does not divide among 3 workers"):
        TrainConfig(batch=8, epochs=1, lr=1e-3).split_batch(3)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_should_reach_and_where_it_was_measured(name):
    text = RECIPES[name].__doc__
    assert all(word in text for word in ("Expected", "Hardware", "Measured"))
    assert RECIPES[name]().name == name


def test_an_unknown_recipe_is_named_with_the_known_ones():
    with pytest.raises(TesseraError, match="unknown recipe 'nope'; there are base_420, coco_mini, debug, demo"):
        recipe("nope")


def test_a_runs_path_depends_on_everything_but_decoding():
    base = debug()
    decoding = replace(base, method=replace(base.method, decode=replace(base.method.decode, reach=9.0)))
    others = [
        replace(base, method=replace(base.method, frequencies=3)),
        replace(base, train=replace(base.train, lr=2e-3)),
        replace(base, reader=replace(base.reader, flip=False)),
    ]
    assert decoding.run_path("x") == base.run_path("x")
    assert len({r.run_path("x") for r in [base, *others]} | {base.run_path("y")}) == 5


def test_a_radius_too_small_for_the_methods_weights_is_refused():
    with pytest.raises(TesseraError, match="needs distances up to 10 px, the shards are exact up to 9"):
        replace(debug(), shards=replace(debug().shards, radius=9))
