"""Checkpoints of a run on the store: each one object, so it is there whole or not at all.

`<run>/checkpoints/<step>.pt` holds a State. The newest few are kept, and the one with the best PQ.
"""

import io
import logging
import re
import struct
import zipfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from infra import checksums
from infra.errors import DamagedObject, TesseraError
from infra.store import Store
from training.backbones.weights import load_plain

State = dict[str, Any]
"""What a run goes on from; tensors and plain values only, the same for any number of workers.

step: steps done. With the recipe it says which images come next, the learning rate, and the noise to come: a step's
    random draws follow from seed, step and rank.
method, ema, optimizer: their state dicts, whole tensors on the CPU; ema is None without an average.
rows: metrics.Row as dicts, of all steps so far.
recipe, code: the config, and the version of the code that wrote it.
"""

_KINDS: dict[str, Any] = {"step": int, "rows": list, "method": dict, "ema": dict | None, "optimizer": dict}
_FOLDER = "checkpoints"
_LENGTHS = 26
"""Where in the header of a zip's part the lengths of its name and extra field stand, which its content follows."""
log = logging.getLogger("tessera.train")


def steps_of(store: Store, run: str) -> list[int]:
    """The steps of which there are checkpoints, the newest last."""
    names = (entry.key.rpartition("/")[2] for entry in store.list(f"{run}/{_FOLDER}/"))
    return sorted(int(name.removesuffix(".pt")) for name in names if re.fullmatch(r"\d+\.pt", name))


class Damaged(DamagedObject):
    """The store holds something else than the checkpoint."""


def newest(store: Store, run: str) -> State | None:
    """The newest checkpoint that is whole, or None if there is none at all. Damaged ones are passed over, with a
    warning.

    TesseraError where all are damaged or the store does not answer: a run must not begin again for that.
    """
    steps = steps_of(store, run)
    for step in reversed(steps):
        try:
            return read_state(store, run, step)
        except DamagedObject as error:
            log.warning("%s; trying the one before", error)
    if steps:
        raise TesseraError(f"{store.url_for(run)}/{_FOLDER}: all of {steps} are damaged; delete them to start anew")
    return None


def read_state(store: Store, run: str, step: int) -> State:
    """The checkpoint of a step. DamagedObject, or TesseraError if it cannot be had at all."""
    key = _key(run, step)
    data = store.read(key)
    try:
        _check(data)
        state = load_plain(data)
        _check_kinds(state)
        if state["step"] != step:
            raise ValueError(f"it is of step {state['step']}")
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise Damaged(f"{store.url_for(key)}: expected a checkpoint of step {step}: {error}") from error
    return state


def _check_kinds(state: Any) -> None:
    """ValueError for what is no State."""
    if not isinstance(state, dict):
        raise ValueError(f"it is a {type(state).__name__}")
    for name, kind in _KINDS.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"its {name} is a {type(state.get(name)).__name__}")


def best_step(rows: list[dict[str, Any]], steps: Collection[int]) -> int | None:
    """Of these steps the one with the highest PQ on the fixed val images; of equals the latest, None without any."""
    measured = [row for row in rows if "pq" in row["figures"] and row["step"] in steps]
    return max(measured, key=lambda row: (row["figures"]["pq"], row["step"]))["step"] if measured else None


def best_weights(state: State) -> dict[str, Tensor]:
    """The weights of a state that evaluation uses: the average where there is one."""
    if state["ema"] is None:
        return dict(state["method"])
    averaged = state["ema"].items()
    return {name.removeprefix("module."): value for name, value in averaged if name.startswith("module.")}


class Writer:
    """Writes checkpoints in a thread of its own, and then whatever is told of them.

    Training never waits for the store, nor ends for it: of states that pile up while it is slow or away only the newest
    is written, and what fails is a warning.
    """

    def __init__(self, store: Store, run: str, keep: int, publish: Callable[[State], None]) -> None:
        """publish: called after each write, in the same thread."""
        self.store, self.run, self.keep, self.publish = store, run, keep, publish
        self._thread, self._lock = ThreadPoolExecutor(1, "checkpoints"), Lock()
        self._next: State | None = None
        self._busy = False
        self._error: Exception | None = None

    def save(self, state: State) -> None:
        """Take a state that nobody changes any more."""
        with self._lock:
            self._next = state
            if not self._busy:
                self._busy = True
                self._thread.submit(self._drain)

    def do(self, work: Callable[[], None]) -> None:
        """Something else to write, in turn."""
        self._thread.submit(_warning_of, work)

    def close(self) -> None:
        """Wait until all is written. Raises what went wrong with the newest state."""
        self._thread.shutdown(wait=True)
        if self._error is not None:
            raise self._error

    def _drain(self) -> None:
        while (state := self._take()) is not None:
            self._error = _warning_of(partial(self._write, state))
            if self._error is None:
                _warning_of(partial(self._prune, state))
                _warning_of(partial(self.publish, state))

    def _take(self) -> State | None:
        with self._lock:
            state, self._next = self._next, None
            self._busy = state is not None
            return state

    def _write(self, state: State) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.store.write(_key(self.run, state["step"]), buffer.getvalue())

    def _prune(self, state: State) -> None:
        # newer ones are damaged, so that the run went on before them; its steps come to them again
        steps = [step for step in steps_of(self.store, self.run) if step <= state["step"]]
        best = best_step(state["rows"], steps)
        for step in steps[: -self.keep]:
            if step != best:
                self.store.delete(_key(self.run, step))


def _warning_of(work: Callable[[], None]) -> Exception | None:
    """What the work raises, if anything."""
    try:
        work()
    except Exception as error:  # noqa: BLE001  # the next state may fare better
        log.warning("%s: %s", type(error).__name__, error)
        return error
    return None


def _check(data: bytes) -> None:
    """DamagedObject unless all parts of the zip that torch wrote have their checksums, which torch does not look at."""
    with zipfile.ZipFile(io.BytesIO(data)) as parts:
        for part in parts.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                continue  # as torch writes none: load_plain says so
            names = part.header_offset + _LENGTHS
            start = names + 4 + sum(struct.unpack("<HH", data[names : names + 4]))
            content = memoryview(data)[start : start + part.compress_size]
            checksums.require(checksums.crc32(content) == part.CRC, part.filename)


def _key(run: str, step: int) -> str:
    return f"{run}/{_FOLDER}/{step:08d}.pt"
