"""States of a run that differ by their step, written as checkpoints."""

from dataclasses import asdict
from typing import Any

import torch

from infra.store import Store
from tests.support.rows import course
from training.checkpoints import State, Writer, steps_of

RUN = "train/0123"


def state_of(step: int, pq: dict[int, float] | None = None) -> State:
    """Plain but for the step; pq: what checks have found so far, by step."""
    rows = [asdict(row) for row in course(min(step, 60))]
    for row in rows:
        row["figures"] = {"pq": pq[row["step"]]} if pq and row["step"] in pq else {}
    weights = {"bias": torch.full((3,), float(step))}
    return {"step": step, "rows": rows, "method": weights, "ema": None, "optimizer": {"state": {}}}


def key(step: int) -> str:
    return f"{RUN}/checkpoints/{step:08d}.pt"


def write_all(store: Store, states: list[State], keep: int) -> list[list[int]]:
    """Steps on the store after each; a new writer each time, as after a restart, so that none is passed over."""
    found = []
    for state in states:
        writer = Writer(store, RUN, keep, lambda state: None)
        writer.save(state)
        writer.close()
        found.append(steps_of(store, RUN))
    return found


def same(left: Any, right: Any) -> bool:
    """Equal trees; tensors to the bit, with their types."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[name]) for name, value in left.items())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right
