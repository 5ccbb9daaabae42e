"""What a step of a flow is: a Prefect task that is tried again where that may help."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.utilities.annotations import quote

from infra.errors import TesseraError

P = ParamSpec("P")
R = TypeVar("R")


class Step(Task[P, R]):
    """A task whose arguments Prefect leaves alone: it would look for futures in each record of a data set, twice."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run it, as a Task; `return_state` and `wait_for` are Prefect's."""
        options = {name: named.pop(name) for name in ("return_state", "wait_for") if name in named}
        quoted = {name: quote(value) for name, value in named.items()}
        return super().__call__(*map(quote, arguments), **quoted, **options)  # type: ignore[arg-type]


def step(function: Callable[P, R], task_run_name: str | None = None) -> Step[P, R]:
    """A step of a flow; done work is known by what it left on the store, so Prefect caches nothing.

    task_run_name: as prefect.task takes it.
    """
    return Step(
        function,
        task_run_name=task_run_name,
        retries=2,
        retry_delay_seconds=5,
        retry_condition_fn=worth_a_retry,
        cache_policy=NO_CACHE,
    )


def worth_a_retry(_task: Any, _run: Any, state: Any) -> bool:
    """Retry what may pass by itself; a TesseraError stays the same."""
    return not isinstance(state.result(raise_on_failure=False), TesseraError)
