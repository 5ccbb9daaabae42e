"""A run that is being disturbed: its driver's process, and all that was heard of it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from infra import processes
from infra.errors import TesseraError
from infra.store import Store
from tests.chaos.machine import Machine
from tests.chaos.plan import STEPS, Job
from tests.chaos.whereabouts import PAUSE, Worker, workers

_ROOT = Path(__file__).parents[2]
_PATIENCE = 240  # seconds without a row before a run counts as hung
_TOLD = ("going on", "stopped", "does not answer", "answers again")
Event = dict[str, Any]
"""A line of a driver: {"step", "time", "loss", "workers"}, {"log", "time"} or {"run", "time"}."""


@dataclass(frozen=True)
class Mark:
    """A moment at which something was done to the run."""

    time: float
    """Seconds since 1970."""
    did: str
    step: int
    """The highest that was heard of by then."""
    end: float | None = None
    """Of what lasts a while."""


@dataclass
class Scene:
    """One case while it runs."""

    name: str
    machine: Machine
    job: Job
    store: Store
    environ: dict[str, str]
    say: Callable[[str], None]
    events: list[Event] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    expected: int | None = None
    """Step of the checkpoint that the run must go on from, where a case knows it."""
    _driver: subprocess.Popen[bytes] = field(init=False)
    _drivers: int = 0
    _heard: int = 0
    """Bytes of the driver's output that were read."""
    _said: float = 0.0

    @property
    def folder(self) -> Path:
        """Where the case keeps its files on this machine."""
        return self.machine.folder / self.name

    @property
    def step(self) -> int:
        """The newest that was heard of; 0 before the first, and after a restart."""
        return next((e.get("step", 0) for e in reversed(self.events) if "step" in e or goes_on(e) is not None), 0)

    @property
    def highest(self) -> int:
        """The highest step that was heard of."""
        return max((e["step"] for e in self.events if "step" in e), default=0)

    def start(self) -> None:
        """Start the driver; a second time is the same command again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        Path(self.job.whereabouts).mkdir(exist_ok=True)
        self._drivers, self._heard = self._drivers + 1, 0
        command = [sys.executable, "-m", "tests.chaos.driver", self.job.to_json()]
        self._driver = processes.start(command, os.environ | self.environ, _ROOT, self._log)

    def stop(self) -> None:
        """End the driver, whatever it does."""
        processes.stop(self._driver)

    def kill_driver(self) -> None:
        """SIGKILL it."""
        os.kill(self._driver.pid, signal.SIGKILL)
        self._driver.wait()

    def workers(self) -> dict[int, Worker]:
        """By rank, as they said last."""
        return workers(Path(self.job.whereabouts))

    def worker(self, rank: int) -> Worker:
        """One of them. TesseraError if there is none of that rank."""
        found = self.workers()
        if rank not in found:
            raise TesseraError(f"{self.name}: no worker {rank} among {len(found)}")
        return found[rank]

    def rest(self, seconds: float) -> None:
        """Have the workers rest for so long at each checkpoint from now on."""
        partial = self.folder / "pause.part"
        partial.write_text(str(seconds))
        partial.replace(Path(self.job.whereabouts) / PAUSE)

    def mark(self, did: str) -> None:
        """Note that something is done now."""
        self.marks.append(Mark(time.time(), did, self.highest))
        self.say(f"{did} at step {self.highest}")

    def marked_until_now(self) -> None:
        """What the last mark says ends now."""
        self.marks[-1] = replace(self.marks[-1], end=time.time())

    def pass_seconds(self, seconds: float) -> None:
        """Listen for so long."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > end)

    def until(self, happened: Callable[[], bool]) -> None:
        """Listen until it happened. TesseraError if the driver ends before, or nothing is heard for too long."""
        since, count = time.monotonic(), len(self.events)
        while not happened():
            ended = self._driver.poll() is not None
            self._listen()
            if len(self.events) > count:
                since, count = time.monotonic(), len(self.events)
            if happened():
                return
            if ended or time.monotonic() > since + _PATIENCE:
                what = f"ended with {self._driver.returncode}" if ended else f"silent for {_PATIENCE} s"
                raise TesseraError(f"{self.name}: the driver {what}; its last words:\n{self._tail()}")
            time.sleep(0.05)

    def until_end(self) -> None:
        """Listen until the run is finished and the driver gone."""
        self.until(lambda: self._driver.poll() is not None and self._finished())

    def _finished(self) -> bool:
        self._listen()
        return any("run" in event for event in self.events)

    @property
    def _log(self) -> Path:
        return self.folder / f"driver-{self._drivers}.log"

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def _listen(self) -> None:
        with self._log.open("rb") as file:
            file.seek(self._heard)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._heard += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith("{"):
                self._hear(json.loads(line))

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        if "log" in event and any(text in event["log"] for text in _TOLD):
            self.say(event["log"])
        if "step" in event and time.monotonic() > self._said + 5:
            self._said = time.monotonic()
            self.say(f"step {event['step']} of {STEPS}, {event['workers']} workers")


def goes_on(event: Event) -> int | None:
    """The step of the checkpoint from which the run goes on, if a line of the log says so."""
    words = str(event.get("log", "")).split()
    if words[:3] == ["going", "on", "from"]:
        return int(words[words.index("step") + 1]) if "step" in words else 0
    return None
