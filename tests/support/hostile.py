"""Data made to do harm: each case, read by the function that meets it first, is refused in one sentence that names it.

No case may take much memory, whatever it claims. docs/security.md lists them beside those that other tests hold.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.errors import TesseraError
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.coco_folder import CocoFolder

MOST = 300 << 20
"""Bytes by which no case may let the process grow."""
Act = Callable[[Path], object]


class Cases:
    """The cases of one file of tests. Called with a name and what the refusal tells, it decorates what reads it."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[Act, tuple[str, ...]]] = {}
        """By name: what reads it, given an empty folder, and what the refusal tells (regular expressions)."""

    def __call__(self, name: str, *told: str) -> Callable[[Act], Act]:
        def add(act: Act) -> Act:
            assert name not in self.known
            self.known[name] = act, told
            return act

        return add

    def check(self, name: str, folder: Path) -> None:
        """The case is refused by name, in little memory."""
        act, told = self.known[name]
        with little_memory(), pytest.raises(TesseraError) as caught:
            act(folder)
        sentence = str(caught.value)
        for pattern in told:
            assert re.search(pattern, sentence), sentence
        assert sentence.isprintable(), sentence
        assert len(sentence) < 2000
        assert not (folder / "ran").exists()


@contextmanager
def little_memory() -> Iterator[None]:
    """The most that is resident within; where there is no Linux to count it, nothing is checked."""
    before = _peak(anew=True)
    yield
    assert _peak() - before < MOST


def most_grown(do: Callable[[], object]) -> int:
    """Bytes by which the process is larger meanwhile."""
    before = _peak(anew=True)
    do()
    return _peak() - before


def _peak(anew: bool = False) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) << 10


def write_coco(folder: Path) -> CocoFolder:
    return CocoFolder(write_set(folder / "coco", SyntheticConfig(train=2, val=1, size=(24, 24), seed=1)))
