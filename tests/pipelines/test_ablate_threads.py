"""Work side by side: no more at once than asked for, named in the log, ended with the flow."""

import logging
import os
import subprocess
import sys
import threading
import time
from contextvars import ContextVar
from functools import partial
from pathlib import Path

import pytest

from infra.interrupt import Interrupted, look
from pipelines.ablate_threads import named, named_lines, side_by_side

VALUE: ContextVar[str] = ContextVar("VALUE", default="")


@pytest.mark.parametrize("most", [1, 3, 20])
def test_as_many_work_at_once_as_asked_for_and_results_keep_their_order(most: int):
    lock, now, seen = threading.Lock(), [0], [0]

    def work(number: int) -> int:
        with lock:
            now[0] += 1
            seen[0] = max(seen[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1
        return number

    assert side_by_side([partial(work, i) for i in range(12)], most) == [*range(12)]
    assert seen[0] <= most


def test_a_work_sees_the_callers_context_and_leaves_its_own():
    VALUE.set("caller's")

    def work() -> str:
        found = VALUE.get()
        VALUE.set("work's")
        return found

    assert side_by_side([work] * 4, 2) == ["caller's"] * 4
    assert VALUE.get() == "caller's"


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_exception_ends_what_runs_and_what_waits(first: int):
    ended: list[str] = []

    def waits() -> None:
        try:
            while True:
                time.sleep(0.01)
                look()
        except Interrupted:
            ended.append("interrupted")
            raise

    def fails() -> None:
        time.sleep(0.2)
        raise ValueError("mine")

    works = [waits] * 4
    works[first] = fails
    with pytest.raises(ValueError, match=r"^mine$"):
        side_by_side(works, 2)
    assert ended in (["interrupted"], ["interrupted"] * 2)  # the third may have begun where the first had been


SCRIPT = """
import os, signal, sys, threading, time
from infra.interrupt import look
from pipelines.ablate_threads import side_by_side

def end(*_): raise KeyboardInterrupt
signal.signal(signal.SIGTERM, end)
begun, start = threading.Semaphore(0), threading.Thread.start

def work():
    try:
        begun.release()
        while True:
            time.sleep(0.01)
            look()
    finally:
        if threading.current_thread().name.endswith("_1"): time.sleep(0.3)
        sys.stdout.write("cleaned up\\n")

def cancel():
    for _ in range(2): begun.acquire()
    os.kill(os.getpid(), signal.SIGTERM)

def start_and_cancel(thread):
    start(thread)
    if thread.name.endswith("_1"): cancel()

if sys.argv[1] == "as the second starts": threading.Thread.start = start_and_cancel
else: threading.Thread(target=cancel).start()
try: side_by_side([work] * 3, 2)
except KeyboardInterrupt: sys.stdout.write("cancelled\\n")
"""


@pytest.mark.parametrize("moment", ["as the second starts", "while it waits"])
def test_a_signal_ends_the_threads_and_each_cleans_up(moment: str):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    said = subprocess.run([sys.executable, "-c", SCRIPT, moment], env=env, capture_output=True, text=True, timeout=60)
    assert said.stdout.splitlines() == ["cleaned up", "cleaned up", "cancelled"], said.stderr


def test_lines_of_ours_carry_the_name_of_the_work(caplog: pytest.LogCaptureFixture):
    ours, other = logging.getLogger("tessera.x"), logging.getLogger("other")

    def work(name: str) -> None:
        with named(name):
            ours.warning("%d %% of %s", 3, "it")
            other.warning("as it is")
        ours.warning("outside")

    with named_lines():
        side_by_side([partial(work, "one"), partial(work, "two")], 1)
    with named("after"):
        ours.warning("plain")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["[one] 3 % of it", "as it is", "outside", "[two] 3 % of it", "as it is", "outside", "plain"]
