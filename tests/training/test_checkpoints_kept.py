"""Which checkpoints are kept on either store, that the newest whole one is taken, and what becomes of the best."""

import io
import itertools
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load

from infra import artifacts
from infra.errors import TesseraError
from infra.store import Store, open_store
from preprocessing.synthetic import CATEGORIES
from tests.support.checkpoint_states import RUN, key, same, state_of, write_all
from tests.support.examples import batch_of, scenes
from tests.training.ranks import recipe_of, trainer_of
from training.checkpoints import Damaged, State, best_step, best_weights, newest, read_state, steps_of
from training.metrics import Row, read_metrics, write_metrics
from training.run import WEIGHTS, finish_best


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_a_state_comes_back_as_it_was_from_either_store(store: Store):
    trainer = trainer_of(recipe_of(ema=0.5), CATEGORIES, 8)
    batches = itertools.repeat(batch_of(*scenes(4)))
    for step in range(2):
        trainer.take_step(batches)
        trainer.row(16, False)[0].figures["pq"] = 40.0 + step
    state = trainer.state()
    assert state is not None
    write_all(store, [state], 2)
    found = newest(store, RUN)
    assert found is not None
    assert same(found, read_state(store, RUN, 2))
    plain = pickle.loads(pickle.dumps(state))
    assert same({**found, "recipe": None}, {**plain, "recipe": None})
    assert found["recipe"] == plain["recipe"]
    assert [Row(**row) for row in found["rows"]] == trainer.rows
    assert sum(bool(value.any()) for row in found["optimizer"]["state"].values() for value in row.values()) > 50
    again = trainer_of(recipe_of(ema=0.5), CATEGORIES, 8)
    again.restore(found)
    assert same(again.state(), state)


def test_the_newest_is_taken(store: Store):
    assert newest(store, RUN) is None
    assert steps_of(store, RUN) == []
    write_all(store, [state_of(step) for step in (9, 10, 123456789)], 5)
    assert steps_of(store, RUN) == [9, 10, 123456789]
    found = newest(store, RUN)
    assert found is not None
    assert found["step"] == 123456789


def test_other_files_are_no_checkpoints(store: Store):
    for name in ("notes.txt", "12.pt.bak", "x12.pt", "-3.pt", "last.pt", "12/weights.bin", ".pt"):
        store.write(f"{RUN}/checkpoints/{name}", b"?")
    store.write("train/01234/checkpoints/00000007.pt", b"of another run")
    assert steps_of(store, RUN) == []
    assert newest(store, RUN) is None
    others = {entry.key for entry in store.list()}
    write_all(store, [state_of(step) for step in (1, 2, 3)], 1)
    assert {entry.key for entry in store.list()} == others | {key(3)}


KEPT: dict[str, tuple[int, dict[int, float], list[list[int]]]] = {
    "the last two": (2, {}, [[1], [1, 2], [2, 3], [3, 4], [4, 5]]),
    "the last one": (1, {}, [[1], [2], [3], [4], [5]]),
    "the best beside them": (2, {2: 50.0, 4: 40.0}, [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]),
    "a better one in its place": (1, {2: 50.0, 4: 60.0}, [[1], [2], [2, 3], [4], [4, 5]]),
    "of equals the latest": (1, {2: 50.0, 3: 50.0, 4: 50.0}, [[1], [2], [3], [4], [4, 5]]),
    "the best among the last": (2, {5: 50.0}, [[1], [1, 2], [2, 3], [3, 4], [4, 5]]),
}


@pytest.mark.parametrize(("keep", "pq", "expected"), KEPT.values(), ids=KEPT)
def test_so_many_are_kept(folder: Store, keep: int, pq: dict[int, float], expected: list[list[int]]):
    states = [state_of(step, {s: v for s, v in pq.items() if s <= step}) for step in range(1, 6)]
    assert write_all(folder, states, keep) == expected


def test_the_best_is_kept_on_s3(s3_env: Any, tmp_path: Path):
    store = open_store(f"s3://{s3_env.bucket}/{tmp_path.name}")
    assert write_all(store, [state_of(step, {1: 9.0}) for step in range(1, 5)], 2)[-1] == [1, 3, 4]


def test_a_best_one_that_was_never_written_keeps_none_from_being_the_best(folder: Store):
    """Of states that pile up only the newest is written, so that a step with a row may have no checkpoint."""
    pq = {1: 30.0, 2: 50.0, 3: 20.0}
    states = [state_of(1, pq), state_of(3, pq), state_of(4, pq)]
    assert write_all(folder, states, 1) == [[1], [1, 3], [1, 4]]
    rows = states[-1]["rows"]
    assert [best_step(rows, steps) for steps in ([1, 4], [1, 2, 3], {3, 4}, [4], [])] == [1, 2, 3, None, None]


def test_checkpoints_after_the_one_that_a_run_goes_on_from_crowd_none_out(folder: Store):
    """They were damaged; the run overwrites them, or passes and then deletes them."""
    for step in (7, 8):
        folder.write(key(step), b"damaged")
    assert write_all(folder, [state_of(step) for step in (4, 5, 6, 8, 10)], 2) == [
        [4, 7, 8],
        [4, 5, 7, 8],
        [5, 6, 7, 8],
        [7, 8],
        [8, 10],
    ]


class Harm:
    """Pickled code, that shows in `ran`."""

    ran: ClassVar[list[int]] = []

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return run_harm, ()


def run_harm() -> None:
    Harm.ran.append(1)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "its end lost": lambda data: data[:-1],
    "empty": lambda data: b"",
    "garbage": lambda data: b"\x93" * len(data),
    "another step": lambda data: saved(state_of(2)),
    "no state": lambda data: saved([1, 2]),
    "without a step": lambda data: saved({"method": {}}),
    "code": lambda data: saved({"step": 3, "rows": Harm()}),
    "bare code": lambda data: pickle.dumps(Harm(), 2),
}


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_one_is_passed_over_with_a_warning(
    folder: Store, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
):
    write_all(folder, [state_of(step) for step in (1, 2, 3)], 3)
    folder.write(key(3), damage(folder.read(key(3))))
    with caplog.at_level(logging.WARNING):
        found = newest(folder, RUN)
    assert found is not None
    assert found["step"] == 2
    (record,) = caplog.records
    told = f"{folder.url}/{key(3)}: expected a checkpoint of step 3: "
    assert record.getMessage().startswith(told)
    assert record.getMessage().endswith("; trying the one before")
    assert not Harm.ran
    with pytest.raises(Damaged, match="expected a checkpoint of step 3"):
        read_state(folder, RUN, 3)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(folder: Store, caplog: pytest.LogCaptureFixture):
    for step in (1, 2):
        folder.write(key(step), b"?")
    with pytest.raises(TesseraError, match=r"all of \[1, 2\] are damaged; delete them"):
        newest(folder, RUN)
    assert len(caplog.records) == 2


def test_the_weights_that_evaluation_uses_are_the_average_where_there_is_one():
    plain, averaged = (trainer_of(recipe_of(ema=ema), CATEGORIES, 8) for ema in (0.0, 0.5))
    batches = itertools.repeat(batch_of(*scenes(4)))
    for trainer in (plain, averaged):
        for _ in range(3):
            trainer.take_step(batches)
        state = trainer.state()
        assert state is not None
        found = best_weights(state)
        assert same(found, dict(trainer.best.state_dict()))
        assert same(found, dict(state["method"])) is (trainer is plain)


def finished(store: Store, pq: dict[int, float], steps: int = 6) -> tuple[dict[str, Any] | None, list[State]]:
    """(what finish_best says of a run with a checkpoint after each step, those checkpoints)."""
    states = [state_of(step, {s: v for s, v in pq.items() if s <= step}) for step in range(1, steps + 1)]
    write_all(store, states, 2)
    write_metrics(store, RUN, [Row(**row) for row in states[-1]["rows"]])
    return finish_best(store, RUN, {"steps": steps, "seconds": 1.0}), states


def test_the_best_checkpoint_becomes_a_run_of_its_own(store: Store):
    found, states = finished(store, {2: 30.0, 4: 50.0, 6: 40.0})
    assert found is not None
    assert (found["step"], found["pq"]) == (4, 50.0)
    assert found["run"] != RUN
    assert same(load(store.read(f"{found['run']}/{WEIGHTS}")), states[3]["method"])
    assert [row.step for row in read_metrics(store, found["run"])] == [1, 2, 3, 4]
    assert artifacts.read_manifest(store, found["run"]) == {"steps": 4, "seconds": 1.0, "best_of": RUN}


def test_the_last_step_can_be_the_best_and_without_checks_there_is_none(folder: Store):
    assert finished(folder, {})[0] is None
    assert finished(folder, {2: 30.0, 6: 40.0})[0] == {"step": 6, "pq": 40.0, "run": RUN}


def test_a_best_step_without_a_checkpoint_does_not_spoil_the_run(folder: Store):
    """It was passed over while the store was slow; the best of those that were written takes its place."""
    finished(folder, {2: 30.0, 4: 50.0})
    folder.delete(key(4))
    write_metrics(folder, RUN, [Row(**row) for row in state_of(6, {2: 30.0, 4: 50.0, 5: 20.0})["rows"]])
    found = finish_best(folder, RUN, {"steps": 6, "seconds": 1.0})
    assert found is not None
    assert (found["step"], found["pq"]) == (5, 20.0)
