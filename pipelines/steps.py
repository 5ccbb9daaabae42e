"""What a step of a flow is: a Prefect task that is tried again where that may help."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

from infra.errors import TesseraError

P = ParamSpec("P")
R = TypeVar("R")


def step(function: Callable[P, R]) -> Task[P, R]:
    """A step of a flow; done work is known by what it left on the store, so Prefect caches nothing."""
    return task(retries=2, retry_delay_seconds=5, retry_condition_fn=worth_a_retry, cache_policy=NO_CACHE)(function)


def worth_a_retry(_task: Any, _run: Any, state: Any) -> bool:
    """Retry what may pass by itself; a TesseraError stays the same."""
    return not isinstance(state.result(raise_on_failure=False), TesseraError)
