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
        made = create_progress_artifact(0.0, key="training", description="starting the workers")
        assert isinstance(made, UUID)  # a coroutine only where an event loop runs
        self.artifact = made
        self.first: tuple[int, float] | None = None
        self.told = 0.0

    def __call__(self, row: Row, steps: int) -> None:
        first, began = self.first = self.first or (row.step, row.time)
        if time.monotonic() - self.told < _SECONDS and row.step < steps:
            return
        self.told = time.monotonic()
        left = (row.time - began) / max(row.step - first, 1) * (steps - row.step)
        description = f"step {row.step} of {steps}, about {left / 60:.0f} min left: {row}"
        try:
            update_progress_artifact(self.artifact, 100 * row.step / steps, description=description)
        except (PrefectException, httpx.HTTPError) as error:  # a server that restarts must not end a week of training
            log.warning("the flow run's progress cannot be shown: %s", error)
