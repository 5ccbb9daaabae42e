"""Checks while a run is trained: at their steps, each with a checkpoint, and without a trace in the training."""

import itertools
import time
from dataclasses import dataclass

import pytest
import torch

from infra.store import Store
from preprocessing.shards import ShardSet
from preprocessing.source import Index
from tests.training.conftest import Maker
from tests.training.ranks import Recorder, noisy, recipe_of
from training.checkpoints import State
from training.loop import train
from training.methods.base import Method
from training.metrics import Row
from training.parallel import Place
from training.recipe import Recipe


def run(
    recipe: Recipe, shards: ShardSet, store: Store, recorder: Recorder | None = None, state: State | None = None
) -> tuple[Recorder, dict[str, torch.Tensor], list[Row]]:
    """(what was heard, weights, rows)."""
    recorder = recorder or Recorder()
    weights, rows = train(recipe, shards, store.url, Place(), state, recorder)
    return recorder, weights, rows


def checking(every: float | None, epochs: float = 3, checkpoints: int = 1, **changes) -> Recipe:
    """Of 16 images and batches of 4 an epoch has four steps."""
    return recipe_of(upkeep={"check_epochs": every, "checkpoints": checkpoints}, epochs=epochs, **changes)


STEPS: dict[str, tuple[float | None, float, list[int]]] = {
    "never": (None, 3, []),
    "every epoch": (1, 3, [4, 8, 12]),
    "every second": (2, 3, [8, 12]),
    "every half": (0.5, 2, [2, 4, 6, 8]),
    "every 0.75": (0.75, 3, [3, 6, 9, 12]),
    "every 0.6": (0.6, 1.5, [3, 5, 6]),
    "oftener than steps": (0.1, 1, [1, 2, 3, 4]),
    "a tenth of an epoch, 0.1 + 0.1 + 0.1 is not 0.3": (0.3, 3, [2, 3, 4, 5, 6, 8, 9, 10, 11, 12]),
    "beyond the end": (50, 1.5, [6]),
    "and at the end": (1, 1.5, [4, 6]),
}


@pytest.mark.parametrize(("every", "epochs", "expected"), STEPS.values(), ids=STEPS)
def test_checks_are_so_many_epochs_apart_and_one_is_at_the_end(
    images_of_16: ShardSet, shard_store: Store, every: float | None, epochs: float, expected: list[int]
):
    heard, _, rows = run(checking(every, epochs), images_of_16, shard_store, Recorder(figures={"pq": 30.0}))
    assert heard.checked == expected
    assert [row.step for row in rows if row.figures] == expected
    assert all(row.figures == {"pq": 30.0} for row in rows if row.figures)
    assert [row.figures for row in heard.rows] == [row.figures for row in rows]


def test_epochs_need_not_be_whole_steps(make_set: Maker, index: Index, shard_store: Store):
    """13 images and batches of 4: an epoch ends within the fourth step, within the seventh, and with the tenth."""
    shards = make_set(index.records[:13], 3)
    assert run(checking(1, 4), shards, shard_store)[0].checked == [4, 7, 10, 13]


def test_every_checked_step_has_a_checkpoint_that_knows_its_figures(images_of_16: ShardSet, shard_store: Store):
    heard, _, _ = run(checking(0.75, 3, checkpoints=2), images_of_16, shard_store, Recorder(figures={"pq": 30.0}))
    assert [state["step"] for state in heard.states] == [3, 6, 9, 12]
    heard, _, _ = run(checking(1.25, 3, checkpoints=3), images_of_16, shard_store, Recorder(figures={"pq": 30.0}))
    assert [state["step"] for state in heard.states] == [4, 5, 8, 10, 12]
    for state in heard.states:
        assert state["rows"][-1]["step"] == state["step"]
        assert [row["step"] for row in state["rows"] if row["figures"]] == [
            s for s in (5, 10, 12) if s <= state["step"]
        ]


@dataclass
class Rude(Recorder):
    """A check that draws noise, and looks at what it is given."""

    def check(self, method: Method, step: int) -> dict[str, float]:
        torch.rand(step)
        assert not any(module.training for module in method.modules())
        assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())
        method.predict(torch.zeros(2, 3, *method.grid, dtype=torch.uint8))
        return super().check(method, step)


@pytest.mark.parametrize("ema", [0.0, 0.9], ids=["last weights", "average"])
@pytest.mark.parametrize(
    "make", [checking, lambda *at, **options: noisy(checking(*at, **options))], ids=["plain", "noisy"]
)
def test_a_run_with_checks_is_to_the_bit_the_one_without(images_of_16: ShardSet, shard_store: Store, make, ema: float):
    heard, weights, rows = run(make(0.5, ema=ema), images_of_16, shard_store, Rude())
    assert heard.checked == [2, 4, 6, 8, 10, 12]
    without, expected, plain = run(make(None, ema=ema), images_of_16, shard_store, Rude())
    assert not without.checked
    assert [(row.losses, row.grad_norm, row.lr) for row in rows] == [
        (row.losses, row.grad_norm, row.lr) for row in plain
    ]
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    for mine, theirs in zip(
        heard.states[-1]["optimizer"]["state"].values(), without.states[-1]["optimizer"]["state"].values(), strict=True
    ):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@dataclass
class Modes(Recorder):
    """Keeps the method that was checked."""

    method: Method | None = None

    def check(self, method: Method, step: int) -> dict[str, float]:
        self.method = method
        return super().check(method, step)

    def row(self, row: Row, steps: int) -> None:
        super().row(row, steps)
        assert self.method is None or all(module.training for module in self.method.modules())


def test_after_a_check_the_method_is_in_training_mode(images_of_16: ShardSet, shard_store: Store):
    heard = Modes()
    run(checking(0.5, 1), images_of_16, shard_store, heard)
    assert heard.method is not None
    assert heard.checked == [2, 4]


def test_what_is_checked_is_what_evaluation_uses(images_of_16: ShardSet, shard_store: Store):
    """Its weights at the end are those that are returned."""
    for ema in (0.0, 0.9):
        heard = Modes()
        _, weights, _ = run(checking(1, 1, ema=ema), images_of_16, shard_store, heard)
        assert heard.method is not None
        found = heard.method.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in weights.items())


def test_a_resumed_run_checks_at_the_same_steps(images_of_16: ShardSet, shard_store: Store):
    recipe = checking(0.75, 3, checkpoints=3)
    heard, _, rows = run(recipe, images_of_16, shard_store, Recorder(figures={"pq": 30.0}))
    state = next(state for state in heard.states if state["step"] == 6)
    again, _, resumed = run(recipe, images_of_16, shard_store, Recorder(figures={"pq": 40.0}), state)
    assert again.checked == [9, 12]
    assert [row.figures.get("pq") for row in resumed if row.figures] == [30.0, 30.0, 40.0, 40.0]
    for found, expected in zip(resumed, rows, strict=True):
        assert found.losses == pytest.approx(expected.losses, abs=1e-6)


def test_a_checkpoint_that_is_wanted_is_written_after_the_next_row(images_of_16: ShardSet, shard_store: Store):
    answers = iter([False, True, False, False, True, *[False] * 7])
    heard, _, _ = run(checking(None), images_of_16, shard_store, Recorder(wants=lambda: next(answers)))
    assert [state["step"] for state in heard.states] == [2, 5, 12]
    assert next(answers, None) is None  # asked once a row


def test_wanting_always_does_not_write_a_step_twice(images_of_16: ShardSet, shard_store: Store):
    heard, _, _ = run(checking(1), images_of_16, shard_store, Recorder(wants=lambda: True))
    assert [state["step"] for state in heard.states] == [*range(1, 13)]


@dataclass
class Slow(Recorder):
    """A check that takes a while by the clock that rows are measured with."""

    clock: "Clock | None" = None

    def check(self, method: Method, step: int) -> dict[str, float]:
        assert self.clock is not None
        self.clock.now += 1000
        return super().check(method, step)


class Clock:
    """A second at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_time_in_a_check_is_none_of_the_trainings(
    images_of_16: ShardSet, shard_store: Store, monkeypatch: pytest.MonkeyPatch
):
    found = []
    for every in (0.5, None):
        clock = Clock()
        monkeypatch.setattr(time, "perf_counter", clock)
        found.append(run(checking(every), images_of_16, shard_store, Slow(clock=clock))[2])
        assert (clock.now > 6000) is (every is not None)
    checked, plain = ([(row.images_per_s, row.data_wait) for row in rows] for rows in found)
    assert checked == plain
    assert all(left < right for left, right in itertools.pairwise(row.time for row in found[0]))
