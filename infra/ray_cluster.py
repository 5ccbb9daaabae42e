"""Ray: connecting, and running many small tasks so that they can be watched and cancelled."""

import logging
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray._private import ray_constants  # these three: Ray has no public way to withdraw a hook
from ray._private.runtime_env.setup_hook import _encode_function_key
from ray.experimental.internal_kv import internal_kv_get_gcs_client

from infra import interrupt, ray_address, ray_local
from infra.errors import TesseraError
from infra.text import sentence
from infra.version import SHIPPED, code_version

T = TypeVar("T")
log = logging.getLogger("tessera.ray")

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # before it asks again, perhaps for fewer workers
    # these two ask the dashboard's State API, which a local cluster does without (a gigabyte of memory)
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
}
_ROOT = Path(__file__).parents[1]
_CODE = ("evaluation", "infra", "pipelines", "preprocessing", "training")
_PASSED_ON = ("NUMBA_", "RAY_TRAIN_", "TESSERA_", "NCCL_", "TORCH_", "PYTORCH_", "OMP_")
_SECRET = ("AWS_", "HF_")  # some are, and which ones is for boto3 and the hub to say
_WITHDRAW_SECONDS = 5.0
_LOOK_SECONDS = 1.0  # between questions how large the cluster is: each costs half a millisecond


@contextmanager
def session(address: str = ray_address.LOCAL, gpus: int = 0, cpus: int = 0) -> Iterator[None]:
    """Connect to `address` (infra.ray_address; "local" starts a cluster in this process' care).

    On the way out the connection is shut down and with it all work this process has submitted. Raises TesseraError for
    any other address, when no cluster answers, and when this machine alone has fewer GPUs or CPUs than that: work that
    asks for them would wait for ever. (Another cluster may grow.)
    """
    address = ray_address.checked(address)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        with _own_sigterm():
            _connect(address)
        for kind, asked in (("GPU", gpus), ("CPU", cpus)):
            found = int(ray.cluster_resources().get(kind, 0))
            if address == ray_address.LOCAL and found < asked:
                raise TesseraError(
                    f"{asked} {kind}s are asked for, this machine has {found}: ask for fewer, or join a cluster"
                )
        yield
    finally:
        _withdraw_hook()
        ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """ray.init takes SIGTERM for itself; Prefect cancels a flow by SIGTERM, so it gets the signal back."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _connect(address: str) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    code = code_version()  # as it is now: by the end of a long run the checkout may be another
    try:
        if address == ray_address.LOCAL:
            os.environ[SHIPPED] = code  # its processes inherit it
            ray_local.start(include_dashboard=False, object_store_memory=200 << 20, **options)
            return
        # workers of a cluster have the environment and the code of their raylet, if any, not ours
        options["runtime_env"] = {
            "env_vars": _environment(_PASSED_ON) | {SHIPPED: code},
            "worker_process_setup_hook": _hook(_environment(_SECRET)),
            "py_modules": [str(_ROOT / name) for name in _CODE],
            "excludes": ["__pycache__"],
        }
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise TesseraError(
            f"Ray at {address!r} does not answer ({error}); start it, make this machine a node of it (ray start "
            "--address=<head>:6379 --num-cpus=0), or check RAY_AUTH_MODE and the token"
        ) from error
    finally:
        os.environ.pop(SHIPPED, None)


def _environment(prefixes: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


def _hook(variables: dict[str, str]) -> Callable[[], None]:
    """What every worker process of this session calls first, also a restarted one on a new node.

    env_vars stand in Ray's logs, on its dashboard and on command lines; of a hook only the name of its pickle does.
    The pickle is in the memory of the cluster's head.
    """

    def set_environment(_session: str = uuid.uuid4().hex) -> None:  # equal pickles would be one to two sessions
        os.environ.update(variables)

    return set_environment


def _withdraw_hook() -> None:
    """Have the cluster's head forget the hook; Ray itself keeps it until the cluster ends."""
    if not ray.is_initialized():
        return
    variables = ray.get_runtime_context().runtime_env.get("env_vars", {})
    name = variables.get(ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR)
    if name is not None:
        with suppress(ray.exceptions.RayError):  # a head that is gone has forgotten it
            table = ray_constants.KV_NAMESPACE_FUNCTION_TABLE
            internal_kv_get_gcs_client().internal_kv_del(_encode_function_key(name), False, table, _WITHDRAW_SECONDS)


def map_tasks(
    function: Callable[..., T],
    arguments: Iterable[tuple[Any, ...]],
    on_done: Callable[[T], None],
    **options: Any,
) -> list[T]:
    """Run `function(*arguments)` as Ray tasks; results in order of completion.

    Keeps a window of twice the cluster's CPUs in flight, so that a driver with a million samples holds only a few
    tasks' arguments; the window follows the cluster, which may grow because tasks wait. Polls, so that a cancelled flow
    gets its signal; whatever ends this call, no task stays behind. An exception of a task is raised as the task raised
    it; its warnings are logged here, with the machine's name.
    """
    remote = ray.remote(_heard(function)).options(num_cpus=1, max_retries=2, name=function.__name__, **options)
    waiting, pending, results = iter(arguments), list[Any](), list[T]()
    window, looks = 0, 0.0
    try:
        while True:
            interrupt.look()
            if time.monotonic() >= looks:
                window, looks = _window(), time.monotonic() + _LOOK_SECONDS
            pending += [remote.remote(*a) for a in islice(waiting, max(0, window - len(pending)))]
            if not pending:
                return results
            with _signals_pass():
                done, pending = ray.wait(pending, timeout=1.0)
            for result, node, lines in _results(done):
                for line in lines:
                    log.warning("%s: %s", node, line)
                results.append(result)
                on_done(result)
    finally:
        for task in pending:
            ray.cancel(task, force=True)


def _heard(function: Callable[..., T]) -> Callable[..., tuple[T, str, list[str]]]:
    """The function as a task: (its result, the machine's name, warnings of our loggers meanwhile)."""

    def task(*arguments: Any) -> tuple[T, str, list[str]]:
        lines, ours = list[str](), logging.getLogger("tessera")
        ours.addHandler(handler := Warnings(lines.append))
        try:
            return function(*arguments), platform.node(), lines
        finally:
            ours.removeHandler(handler)

    return task


class Warnings(logging.Handler):
    """Passes warnings on, as text: a worker's own log stays on its machine."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """One of them."""
        self.tell(sentence(record.getMessage()))


def _window() -> int:
    return 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))


def wait_for(task: Any, watch: Callable[[], None]) -> Any:
    """Result of one long task, polled so that a cancelled flow gets its signal; cancelled on the way out.

    `watch` is called about once a second, and once after the end.
    """
    done: list[Any] = []
    try:
        while not done:
            interrupt.look()
            with _signals_pass():
                done, _ = ray.wait([task], timeout=1.0)
                watch()
    finally:
        if not done:
            ray.cancel(task, force=False)
    return _results(done)[0]


@contextmanager
def _signals_pass() -> Iterator[None]:
    """Let through what a signal handler raises, as Prefect's does on cancelling: Ray wraps it as an error."""
    try:
        yield
    except SystemError as error:
        raise error.__cause__ or error from None


def _results(done: list[Any]) -> list[Any]:
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, TesseraError):
            raise cause from None
        raise
