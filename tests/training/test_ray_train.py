"""Training through Ray: how it ends when it cannot go on, and what it says meanwhile."""

import json
import logging
from dataclasses import replace

import pytest
import ray

from infra.errors import TesseraError
from infra.store import Store
from preprocessing.shards import ShardSet
from tests.support.ray_local import ray_local  # noqa: F401
from tests.training.ranks import recipe_of, spoiled
from training import checkpoints, ray_train
from training.board import ATTEMPTS, CREWS, Board
from training.metrics import Row, read_metrics
from training.ray_train import run_training
from training.reader import BatchStream
from training.shares import Crew


def test_three_attempts_from_one_checkpoint_are_the_end_with_the_last_reason():
    board = Board()
    assert not board.begins(0, 2)
    for _ in range(ATTEMPTS):
        assert not board.begins(20, 2)
        board.stumbles("worker 1: the store is full")
    assert board.begins(20, 2)
    assert (
        board.failure()
        == f"{ATTEMPTS} attempts got no further than the checkpoint of step 20: worker 1: the store is full"
    )
    assert board.begins(20, 2)


def test_every_new_checkpoint_gives_new_attempts_and_forgets_old_reasons():
    board = Board()
    for step in range(0, 4000, 20):
        board.stumbles("an old story")
        for _ in range(ATTEMPTS):
            assert not board.begins(step, 2)
    assert board.begins(3980, 2)
    assert "an old story" not in board.failure()
    assert "lack of memory" in board.failure()


def test_nodes_that_come_and_go_are_no_failures_but_not_without_end():
    board = Board()
    board.begins(40, 2)
    for change in range(CREWS):
        assert not board.begins(40, 1 + change % 2)
    assert board.begins(40, 1 + CREWS % 2)
    assert board.failure().startswith(f"{CREWS} changes of workers got no further than the checkpoint of step 40")


def test_a_final_failure_ends_all_later_attempts_and_the_worker_at_fault_is_heard():
    board = Board()
    board.fails("step 3: gradient norm nan", own=False)
    board.fails("step 3: losses nan, samples 7", own=True)
    board.fails("step 3: gradient norm nan", own=False)
    assert board.begins(0, 1)
    assert board.failure() == "step 3: losses nan, samples 7"


def row(step: int, time: float, **figures: float) -> Row:
    return Row(step, 0.0, {"a": 1.0}, 1e-3, 1.0, 10.0, 0.0, 1.0, 1, time, figures)


def test_the_log_has_some_fifty_lines_of_a_fast_run_one_a_minute_of_a_slow_one_and_every_check():
    fast, slow = Board(), Board()
    for step in range(1, 1001):
        fast.row(row(step, step * 0.1), 1000)
    assert len(fast.take()[0]) == 51  # with the first step
    assert fast.take() == ([], None)
    for step in range(1, 11):
        slow.row(row(step, step * 45.0), 100_000)
    assert len(slow.take()[0]) == 5
    slow.row(row(11, 451.0, pq=5.0), 100_000)
    (line,), latest = slow.take()
    assert line.startswith("step 11 of 100000")
    assert "pq 5.0" in line
    assert latest == (row(11, 451.0, pq=5.0), 100_000)


@pytest.mark.usefixtures("ray_local")
def test_silence_is_explained_by_what_the_workers_do(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(ray_train, "_SILENT_SECONDS", -1.0)
    board = ray.remote(Board).options(num_cpus=0).remote()

    def told() -> str:
        caplog.clear()
        ray_train._Listener(board, lambda row, steps: None)()
        (line,) = [r.getMessage() for r in caplog.records]
        return line.partition(": ")[2]

    assert told().startswith("the workers are starting")  # their places are there, they import
    group = ray.util.placement_group([{"CPU": 1e6}])
    assert told().startswith("the workers wait for nodes")
    ray.get(board.begins.remote(0, 1))
    assert told().startswith("the workers are starting")  # whatever others wait for
    ray.get(board.row.remote(row(1, 1.0), 10))
    ray.get(board.take.remote())
    assert told() == "the workers wait for the store or for each other"
    ray.get(board.stumbles.remote("a node is gone"))
    ray.get(board.take.remote())
    assert told().startswith("the workers wait for nodes")
    ray.util.remove_placement_group(group)


@pytest.mark.timeout(300)
def test_a_loss_that_is_not_finite_leaves_its_samples_and_the_last_good_checkpoint(
    images_of_16: ShardSet,
    shard_store: Store,
    ray_local,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
):
    """Two workers; the sample comes in the third step, the checkpoint is of the second."""
    caplog.set_level(logging.INFO, "tessera")
    plain = recipe_of(epochs=0.75, upkeep={"checkpoints": 12})
    batches = iter(BatchStream(images_of_16, shard_store.url, plain.reader, plain.train.batch))
    first, second, last = (next(batches).keys for _ in range(3))
    assert last[0] not in first + second
    recipe = spoiled(plain, last[0])
    with pytest.raises(TesseraError, match=rf"step 2: gradient norm nan, .*samples .*{last[0]}"):
        run_training(recipe, images_of_16, shard_store.url, Crew(2))
    run = recipe.run_path(images_of_16.path)
    told = [json.loads(shard_store.read(e.key)) for e in shard_store.list(f"{run}/non_finite/")]
    assert len(told) == 2
    assert {facts["step"] for facts in told} == {2}
    assert sorted(key for facts in told for key in facts["samples"]) == sorted(last)
    assert checkpoints.newest(shard_store, run)["step"] == 2
    assert [r.step for r in read_metrics(shard_store, run)] == [1, 2]
    assert "4 images = 2 workers x (1 x 2 images)" in caplog.text
    assert "dry run: a pass of 2 images of 32 x 32 fits" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_shard_that_is_damaged_ends_the_run_after_three_attempts_by_name(
    images_of_16: ShardSet,
    shard_store: Store,
    ray_local,  # noqa: F811
):
    shard = images_of_16.shards[0]
    damaged = shard_store.read(shard.key)
    shard_store.write(shard.key, damaged[:-1])
    recipe = replace(recipe_of(seed=77), upkeep=replace(recipe_of().upkeep, checkpoints=1))
    try:
        with pytest.raises(TesseraError, match=rf"{ATTEMPTS} attempts got no further .* step 0: .*{shard.key}"):
            run_training(recipe, images_of_16, shard_store.url, Crew(1))
    finally:
        shard_store.write(shard.key, damaged)
    assert run_training(recipe, images_of_16, shard_store.url, Crew(1)).steps == 24
