"""How far a training is, as an artifact of the flow run."""

import logging
import time
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

from training.metrics import Row

_SECONDS = 5.0  # between two updates
log = logging.getLogger("tessera.flow")


class TrainProgress:
    """ray_train.Watch: a bar, with what is left and the run's latest row beside it."""

    def __init__(self) -> None:
        self.artifact: UUID | None = None
        self.first: tuple[int, float] | None = None
        self.told = 0.0

    def __call__(self, row: Row, steps: int) -> None:
        first, began = self.first = self.first or (row.step, row.time)
        if time.monotonic() - self.told < _SECONDS and row.step < steps:
            return
        self.told = time.monotonic()
        left = (row.time - began) / max(row.step - first, 1) * (steps - row.step)
        try:
            self._show(100 * row.step / steps, f"step {row.step} of {steps}, about {left / 60:.0f} min left: {row}")
        except (PrefectException, httpx.HTTPError) as error:  # a server that restarts must not end a week of training
            log.warning("the flow run's progress cannot be shown: %s", error)

    def _show(self, percent: float, description: str) -> None:
        if self.artifact is None:
            made = create_progress_artifact(percent, key="training", description=description)
            assert isinstance(made, UUID)  # a coroutine only where an event loop runs
            self.artifact = made
        else:
            update_progress_artifact(self.artifact, percent, description=description)
