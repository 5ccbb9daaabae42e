"""What happened, when, and whether it was what was to happen."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from infra.errors import TesseraError

_STARTED = time.monotonic()


def say(text: str) -> None:
    """A line with the seconds since the program began."""
    sys.stdout.write(f"{time.monotonic() - _STARTED:6.0f} s  {text}\n")
    sys.stdout.flush()


def conclude(good: bool, out: Path) -> int:
    """Say how it went; the program's exit code."""
    say(f"{'all as it was to be' if good else 'NOT all as it was to be'}: {out}")
    return int(not good)


@dataclass
class Chapter:
    """A part of the day."""

    title: str
    begin: float
    """Seconds since 1970, as `end`."""
    end: float = 0.0
    seen: list[str] = field(default_factory=list)
    """What was to be, and was."""
    wrong: list[str] = field(default_factory=list)


@dataclass
class Chronicle:
    """All chapters so far."""

    say: Callable[[str], None]
    chapters: list[Chapter] = field(default_factory=list)

    @contextmanager
    def chapter(self, title: str) -> Iterator["Chronicle"]:
        """Note what happens inside; an error is noted, and the day goes on."""
        now = Chapter(title, time.time())
        self.chapters.append(now)
        self.say(f"== {title}")
        try:
            yield self
        except (TesseraError, AssertionError, KeyError) as error:
            now.wrong.append(f"{type(error).__name__}: {error}")
            self.say(f"WRONG {error}")
        now.end = time.time()

    def expect(self, true: object, told: str) -> None:
        """Note that it is so, or that it is not."""
        chapter = self.chapters[-1]
        (chapter.seen if true else chapter.wrong).append(told)
        self.say(f"{'ok   ' if true else 'WRONG'} {told}")

    def note(self, told: str) -> None:
        """Note what was seen, whatever it was."""
        self.chapters[-1].seen.append(told)
        self.say(f"      {told}")

    @property
    def good(self) -> bool:
        """Whether all was as it was to be."""
        return not any(chapter.wrong for chapter in self.chapters)
