"""Training never waits for its checkpoints to be written, also while the store is slow or fails."""

import itertools
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from infra.errors import TesseraError
from infra.store import FolderStore, Store, open_store
from preprocessing.synthetic import CATEGORIES
from tests.support.checkpoint_states import RUN, same, state_of, write_all
from tests.support.examples import batch_of, scenes
from tests.training.ranks import recipe_of, trainer_of
from training.checkpoints import Writer, newest, read_state, steps_of


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@dataclass(frozen=True)
class Troubled(FolderStore):
    """A folder whose writes wait for `free`, say `begun`, and can be made to fail; reads can be, too."""

    free: Event = field(default_factory=Event)
    begun: Event = field(default_factory=Event)
    fails: Event = field(default_factory=Event)
    away: Event = field(default_factory=Event)

    def write(self, key: str, data: bytes) -> None:
        self.begun.set()
        assert self.free.wait(20)
        if self.fails.is_set():
            raise TesseraError(f"cannot write {key}")
        super().write(key, data)

    def read(self, key: str) -> bytes:
        if self.away.is_set():
            raise TesseraError(f"cannot read {key}: it does not answer")
        return super().read(key)


@pytest.fixture
def troubled(folder: Store) -> Iterator[Troubled]:
    store = Troubled(folder.url)
    yield store
    store.free.set()  # no thread is left waiting


def test_a_store_that_does_not_answer_is_not_taken_for_one_without_checkpoints(troubled: Troubled):
    troubled.free.set()
    write_all(troubled, [state_of(1), state_of(2)], 2)
    troubled.away.set()
    with pytest.raises(TesseraError, match="does not answer"):
        newest(troubled, RUN)


def test_training_never_waits_and_of_states_that_pile_up_only_the_newest_is_written(troubled: Troubled):
    published: list[int] = []
    writer = Writer(troubled, RUN, 9, lambda state: published.append(state["step"]))
    writer.save(state_of(1))
    assert troubled.begun.wait(20)
    for step in range(2, 50):  # would never end if it waited
        writer.save(state_of(step))
    assert not published
    assert not steps_of(troubled, RUN)
    troubled.free.set()
    writer.close()
    assert published == [1, 49]
    assert steps_of(troubled, RUN) == [1, 49]


def test_states_and_other_work_are_written_in_turn(folder: Store):
    done: list[object] = []
    writer = Writer(folder, RUN, 2, lambda state: done.append(state["step"]))
    gates = [Event() for _ in range(3)]
    for step, gate in enumerate(gates):
        writer.save(state_of(step))

        def work(step: int = step, gate: Event = gate) -> None:
            done.append(f"work {step}")
            gate.set()

        writer.do(work)
        assert gate.wait(20)
    writer.close()
    assert done == [0, "work 0", 1, "work 1", 2, "work 2"]


def test_close_waits_for_all_that_was_taken(troubled: Troubled):
    done: list[object] = []
    writer = Writer(troubled, RUN, 2, lambda state: done.append(state["step"]))
    writer.save(state_of(1))
    assert troubled.begun.wait(20)
    writer.do(lambda: done.append("work"))
    writer.save(state_of(2))
    troubled.free.set()
    writer.close()
    assert {*done} == {1, 2, "work"}
    assert done.index(1) < done.index(2)
    assert newest(troubled, RUN) is not None
    writer.close()


def test_a_state_that_cannot_be_written_is_a_warning_and_the_next_one_is_written(
    troubled: Troubled, caplog: pytest.LogCaptureFixture
):
    writer = Writer(troubled, RUN, 2, lambda state: None)
    troubled.fails.set()
    troubled.free.set()
    writer.save(state_of(1))
    settled(writer)
    assert "cannot write" in caplog.text
    assert "00000001.pt" in caplog.text
    troubled.fails.clear()
    writer.save(state_of(2))
    writer.close()
    assert steps_of(troubled, RUN) == [2]


def settled(writer: Writer) -> None:
    """Wait until all so far is done."""
    done = Event()
    writer.do(done.set)
    assert done.wait(20)


def fail(*_: Any) -> None:
    raise ValueError("no room")


def test_close_raises_that_the_newest_state_was_not_written(troubled: Troubled):
    troubled.free.set()
    writer = Writer(troubled, RUN, 2, lambda state: None)
    writer.save(state_of(1))
    settled(writer)
    troubled.fails.set()
    writer.save(state_of(2))
    with pytest.raises(TesseraError, match=r"cannot write .*00000002\.pt"):
        writer.close()
    assert steps_of(troubled, RUN) == [1]


def test_what_else_cannot_be_written_is_a_warning_and_old_states_go_all_the_same(
    folder: Store, caplog: pytest.LogCaptureFixture
):
    writer = Writer(folder, RUN, 2, fail)
    for step in (1, 2, 3):
        writer.save(state_of(step))
        settled(writer)
    writer.do(fail)
    writer.close()
    assert steps_of(folder, RUN) == [2, 3]
    assert [record.message for record in caplog.records] == ["ValueError: no room"] * 4


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_state_is_written_as_it_was_when_it_was_given(troubled: Troubled, ema: float):
    """The run goes on meanwhile: further steps change weights, average, moments and rows, not the state."""
    trainer = trainer_of(recipe_of(ema=ema), CATEGORIES, 8)
    batches = itertools.repeat(batch_of(*scenes(4)))
    trainer.take_step(batches)
    trainer.row(16, False)
    state = trainer.state()
    assert state is not None
    expected = pickle.loads(pickle.dumps(state))
    writer = Writer(troubled, RUN, 2, lambda state: None)
    writer.save(state)
    assert troubled.begun.wait(20)
    writer.save(state)  # another one that waits, not yet bytes
    for _ in range(2):
        trainer.take_step(batches)
        trainer.row(16, False)[0].figures["pq"] = 1.0
    troubled.free.set()
    writer.close()
    found = read_state(troubled, RUN, 1)
    later = trainer.state()
    assert later is not None
    for part in ("step", "rows", "method", "ema", "optimizer"):
        assert same(found[part], expected[part])
        assert same(found[part], later[part]) is (part == "ema" and not ema)
