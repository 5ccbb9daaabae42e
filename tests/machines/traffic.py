"""Bytes on the machines' cables over time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread

from tests.machines.net import Machine


@dataclass
class Traffic:
    """Bytes sent and received so far, by machine, about once a second."""

    machines: list[Machine]
    rows: list[tuple[float, dict[str, tuple[int, int]]]] = field(default_factory=list)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count until the way out."""
        over = Event()

        def watch() -> None:
            while not over.wait(1.0):
                self.rows.append((time.time(), {machine.name: machine.traffic for machine in self.machines}))

        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
