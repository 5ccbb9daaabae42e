"""Ending work that runs in threads: whoever waits looks here, and leaves by an exception when it is to end."""

from contextvars import ContextVar
from threading import Event

_ends: ContextVar[Event | None] = ContextVar("when the work of this context is to end", default=None)


class Interrupted(BaseException):
    """What work meets that is to end: no Exception, since nobody is to try again."""


def interruptible(ends: Event) -> None:
    """From here on, work of the current context ends once the event is set."""
    _ends.set(ends)


def look() -> None:
    """Raise Interrupted if the work of the current context is to end. For loops that wait; what cleans up goes on."""
    ends = _ends.get()
    if ends is not None and ends.is_set():
        raise Interrupted
