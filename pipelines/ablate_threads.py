"""Work of a flow in threads: their log lines carry a name, and they end when the flow is cancelled."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

from infra import interrupt

T = TypeVar("T")
_name: ContextVar[str] = ContextVar("name of the work", default="")


def side_by_side(works: Sequence[Callable[[], T]], most: int) -> list[T]:
    """Results in the order of the works, at most so many of them at once, each in a thread with the caller's context.

    Whatever ends this call early, as the signal that cancels a flow does, or the first exception of a work, ends the
    others as well: each is interrupted where it waits and cleans up, which cancels what it waits for in Ray.
    """
    busy, ends = set[threading.Thread](), threading.Event()

    def run(work: Callable[[], T]) -> T:
        busy.add(threading.current_thread())  # first said, then looked, as below: no thread is missed
        interrupt.interruptible(ends)
        try:
            interrupt.look()
            return work()
        finally:
            busy.discard(threading.current_thread())

    pool = ThreadPoolExecutor(most)
    try:
        futures = [pool.submit(copy_context().run, run, work) for work in works]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()  # raises at once what one of them met, however long those before it take
        return [future.result() for future in futures]
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        ends.set()
        for thread in [*busy]:
            thread.join()  # the pool does not know a thread during whose start the signal came
        raise
    finally:
        pool.shutdown()


@contextmanager
def named(name: str) -> Iterator[None]:
    """Log lines of ours that are written here start with the name, within `named_lines`."""
    token = _name.set(name)
    try:
        yield
    finally:
        _name.reset(token)


@contextmanager
def named_lines() -> Iterator[None]:
    """Where `named` is heeded."""
    plain = logging.getLogRecordFactory()

    def with_name(*arguments: Any, **more: Any) -> logging.LogRecord:
        record = plain(*arguments, **more)
        if record.name.startswith("tessera") and _name.get():
            record.msg, record.args = f"[{_name.get()}] {record.getMessage()}", ()
        return record

    logging.setLogRecordFactory(with_name)
    try:
        yield
    finally:
        logging.setLogRecordFactory(plain)
