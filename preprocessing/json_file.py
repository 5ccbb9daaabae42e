"""Reading the annotation JSON of a data set: of any size that fits into memory, refused by name where it does not."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from infra.memory import memory_left
from infra.opening import MOST, Unfit
from preprocessing.files import File

_COSTS = ((b"{", 128), (b"[", 64), (b",", 40), (b":", 24))
"""Bytes that CPython's objects take for each of these, a little more than they do; measured on rows of COCO's."""
_STRING = 52
"""Bytes of a text that is no key; keys are kept once."""
_TEXT = 3
"""Bytes for each byte: as it is read, as text, and in the strings of the result."""


def read_json(file: File) -> Any:
    """What a file's JSON holds. Raises OSError; Unfit for what would take more memory than is left; ValueError and
    RecursionError for what is no JSON."""
    left = memory_left()
    data = file.read(MOST if left is None else left // _TEXT)
    needed = _needed(data)
    if left is not None and needed > left:
        raise Unfit(f"its {len(data)} bytes would take {needed / 1e9:.1f} GB of memory, {left / 1e9:.1f} GB are left")
    with without_collector():
        return json.loads(data)


def _needed(data: bytes) -> int:
    """Bytes of memory that reading it takes at most: of COCO's, 9 for each byte, where it is 7."""
    strings = max(0, data.count(b'"') // 2 - data.count(b":"))
    return _TEXT * len(data) + _STRING * strings + sum(cost * data.count(sign) for sign, cost in _COSTS)


@contextmanager
def without_collector() -> Iterator[None]:
    """Without looking for circles in what is being made, which holds none: that would take most of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
