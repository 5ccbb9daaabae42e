"""The facts that infra.health judges: those of this process, and those of every node of a Ray cluster.

Nothing here waits without end. `python -m infra.ray_health ADDRESS` only connects: ray.init tries for minutes and
cannot be interrupted, so a process of its own finds out first whether that is worth it.
"""

import contextvars
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra import ray_address, ray_cluster
from infra.errors import TesseraError
from infra.health import MISSING, Clock, Disk, Facts, Place, StoreFacts
from infra.memory import memory_left
from infra.opening import check_owner
from infra.store import open_store

T = TypeVar("T")

_CODE = Path(__file__).parents[1] / "preprocessing"
_PACKAGES = ("ray", "torch", "numpy", "numba", "prefect")
PROBES = "probe"  # a folder of its own: to list the root of a large folder store takes long
_MIB = bytes(1 << 20)
_SECRET = re.compile(r"(SECRET|TOKEN|PASSWORD|KEY|AUTH_STRING)(?!.*_(PATH|FILE)$)")
_LEAST_SECRET = 8  # characters; what is shorter may be a word of any text
_PORT_SECONDS = 5.0
_CLOCK_SECONDS = 5.0
_CLOCK_TRIES = 3
_TOKEN = (
    "set RAY_AUTH_MODE=token and give this user the cluster's token, which `ray get-auth-token` on its head prints: "
    "~/.ray/auth_token or RAY_AUTH_TOKEN; or start all of Ray and this with RAY_AUTH_MODE=disabled"
)
_SIGNS = {  # what Ray prints: what that means, and what to do; the first that fits
    "InvalidAuthToken": ("Ray asks for a token, and none or a wrong one was given (InvalidAuthToken)", _TOKEN),
    "no authentication token was found": ("RAY_AUTH_MODE is token, and this user has no token", _TOKEN),
    "Version mismatch": ("Ray there is of another version, or runs another Python", "install the same ones here"),
}


def gather(storage: str, mark: str | None, gpus: bool, seconds: float) -> Facts:
    """The facts of this process. mark: a key that the driver has just written; seconds: for the store, for the disks.

    gpus: ask torch for them, whose import takes some seconds.
    """
    names, problem = _gpus() if gpus else (None, "")
    return Facts(
        versions=_versions(),
        variables=frozenset(n for n, v in os.environ.items() if v and n.startswith(("TESSERA_", "AWS_"))),
        store=_store(storage, mark, seconds),
        disks=_disks(storage, seconds),
        memory_gb=_memory_gb(),
        shm_gb=_free_gb(Path("/dev/shm")) if Path("/dev/shm").is_dir() else None,
        gpus=names,
        gpu_problem=problem,
        code=tuple(_code()),
        files=_files(),
    )


def masked(text: str) -> str:
    """The text on one line, without the values of this process' secrets and without passwords in URLs."""
    secrets = {v for name, v in os.environ.items() if _SECRET.search(name) and len(v) >= _LEAST_SECRET}
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, "***")
    return " ".join(re.sub(r"(?<=//)[^/@\s]+@", "***@", text).split())


def bounded(function: Callable[[], T], seconds: float, what: str) -> T:
    """What the function gives; TesseraError `what` when it takes longer; it then goes on in a thread of its own.

    For what cannot be interrupted: a mount whose server is gone, a library with retries of its own.
    """
    given: list[T] = []
    failed: list[BaseException] = []
    context = contextvars.copy_context()

    def work() -> None:
        try:
            given.append(context.run(function))
        except BaseException as error:  # noqa: BLE001 (raised below, in the thread that asked)
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not given:
        raise TesseraError(f"{what}: no answer within {seconds:g} s")
    return given[0]


@contextmanager
def connected(address: str, seconds: float) -> Iterator[None]:
    """ray_cluster.session for one who doubts: TesseraError, with the remedy after a semicolon, within `seconds`."""
    address = ray_address.checked(address)
    if address != ray_address.LOCAL:
        _knock(address)
        _try(address, seconds)
    with ray_cluster.session(address):
        yield


def look(storage: str, mark: str | None, gpus: bool, seconds: float) -> list[Place]:
    """Every living node of the connected cluster, in order of address; each has `seconds` to answer.

    storage, mark, gpus: see infra.health.gather.
    """
    nodes = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: (n["NodeManagerAddress"], n["NodeID"]))
    asked = [_on(node, gather).remote(storage, mark, gpus, seconds / 2) for node in nodes]
    deadline = time.monotonic() + seconds
    places = []
    for node, where, task in zip(nodes, _names(nodes), asked, strict=True):
        own: dict[str, Any] = {"where": where, "ray_gpus": node["Resources"].get("GPU", 0.0)}
        try:
            facts: Facts = _answer(task, deadline, f"no answer within {seconds:g} s")
        except TesseraError as error:
            places.append(Place(**own, problem=masked(str(error))))
        else:
            places.append(Place(**own, facts=facts, clock=_clock(node)))
    return places


def summary() -> str:
    """The connected cluster in a line."""
    alive = [node["Alive"] for node in ray.nodes()]
    has = ray.cluster_resources()
    told = f"nodes {sum(alive)}, CPUs {has.get('CPU', 0):g}, GPUs {has.get('GPU', 0):g}"
    return told if all(alive) else f"{told}; nodes that are gone: {len(alive) - sum(alive)}"


def _knock(address: str) -> None:
    """Raise TesseraError where the address names a port and nothing listens there."""
    place = ray_address.host_and_port(address)
    if place is None:
        return
    try:
        socket.create_connection(place, _PORT_SECONDS).close()
    except OSError as error:
        raise TesseraError(
            f"nothing answers at {address}: {error.strerror or error}; start Ray there (ray start --head "
            f"--port={place[1]}), open the port, or correct TESSERA_RAY"
        ) from error


def _try(address: str, seconds: float) -> None:
    """Raise TesseraError where a process of its own cannot connect in time."""
    command = [sys.executable, "-m", "infra.ray_health", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise TesseraError(
            f"Ray at {address!r}: no answer within {seconds:g} s; is this machine a node of that cluster (`ray start "
            f"--address={address} --num-cpus=0` makes it one), is this the port of Ray's head (6379 if nobody chose "
            "another), and does `ray status` on the head answer?"
        ) from error
    if done.returncode != 0:
        for sign, (meaning, remedy) in _SIGNS.items():
            if sign in done.stderr:
                raise TesseraError(f"{meaning}; {remedy}")
        said = done.stderr.strip().splitlines()
        raise TesseraError(masked(said[-1]) if said else f"Ray at {address!r}: exit code {done.returncode}")


def _on(node: dict[str, Any], function: Callable[..., Any]) -> Any:
    pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned)


def _names(nodes: Sequence[dict[str, Any]]) -> list[str]:
    addresses = [node["NodeManagerAddress"] for node in nodes]
    return [a if addresses.count(a) == 1 else f"{a}#{n['NodeID'][:6]}" for a, n in zip(addresses, nodes, strict=True)]


def _answer(task: Any, deadline: float, late: str) -> Any:
    """What a task gives; TesseraError with the last line of what became of it instead."""

    def watch() -> None:
        if time.monotonic() > deadline and not ray.wait([task], timeout=0)[0]:
            raise TesseraError(late)

    try:
        return ray_cluster.wait_for(task, watch)
    except RayError as error:
        raise TesseraError(str(error).strip().splitlines()[-1]) from error


def _clock(node: dict[str, Any]) -> Clock | None:
    """The node's time against ours, by the quickest of some questions; None if it no longer answers."""
    found = []
    with suppress(TesseraError):
        for _ in range(_CLOCK_TRIES):
            before, begun = time.time(), time.monotonic()
            there = _answer(_on(node, _now).remote(), begun + _CLOCK_SECONDS, "")
            half = (time.monotonic() - begun) / 2
            found.append(Clock(there - (before + half), half))
    return min(found, key=lambda clock: clock.within, default=None)


def _now() -> float:
    return time.time()


def _versions() -> tuple[tuple[str, str], ...]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = MISSING
    return tuple(found.items())


def _store(storage: str, mark: str | None, seconds: float) -> StoreFacts:
    try:
        return bounded(lambda: _use(storage, mark), seconds, storage)
    except TesseraError as error:
        told = re.sub(r"[0-9a-f]{32}", "*", str(error))  # a probe's name: equal findings share a row
        return StoreFacts(problem=masked(told))


def _use(storage: str, mark: str | None) -> StoreFacts:
    store, key = open_store(storage), f"{PROBES}/{uuid.uuid4().hex}"
    store.check()
    shared = None if mark is None else store.exists(mark)
    try:
        before = time.time()
        store.write(key, _MIB)
        after = time.time()
        entry = next((entry for entry in store.list(key)), None)
        begun = time.time()
        store.read(key)
        taken = time.time() - begun + after - before
    finally:
        with suppress(TesseraError):  # what it raised first says more
            store.delete(key)
    # S3 cuts its times to whole seconds: half of one is lost on average
    cut = 0.5 if storage.startswith("s3://") else 0.0
    within = cut + (after - before) / 2
    ahead = None if entry is None else entry.modified.timestamp() + cut - (before + after) / 2
    return StoreFacts(seconds=taken, shared=shared, clock=None if ahead is None else Clock(ahead, within))


def _disks(storage: str, seconds: float) -> tuple[Disk, ...]:
    folders = [] if storage.startswith("s3://") else [storage]
    folders += [os.environ["TESSERA_CACHE"]] if os.environ.get("TESSERA_CACHE") else []
    try:
        folders.append(tempfile.gettempdir())
    except FileNotFoundError as error:  # it tries to write there
        return (Disk((os.environ.get("TMPDIR", "/tmp"),), problem=masked(str(error))),)
    try:
        return bounded(lambda: _by_device(folders), seconds, ", ".join(folders))
    except (TesseraError, OSError) as error:
        return (Disk(tuple(folders), problem=masked(str(error))),)


def _by_device(folders: list[str]) -> tuple[Disk, ...]:
    grouped: dict[int, list[str]] = {}
    for folder in dict.fromkeys(folders):
        grouped.setdefault(_there(Path(folder)).stat().st_dev, []).append(folder)
    return tuple(Disk(tuple(found), _free_gb(_there(Path(found[0])))) for found in grouped.values())


def _there(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.expanduser().absolute()
    return next(above for above in (folder, *folder.parents) if above.exists())


def _free_gb(folder: Path) -> float:
    return shutil.disk_usage(folder).free / 1e9


def _memory_gb() -> float | None:
    left = memory_left()
    return None if left is None else left / 1e9


def _code() -> Iterator[tuple[str, str]]:
    """Where compiled kernels lie, which are unpickled and run: beside the code, or where NUMBA_CACHE_DIR says."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    for folder in [Path(named)] if named else [_CODE, _CODE / "__pycache__"]:
        if folder.exists():
            try:
                check_owner(folder.stat())
            except OSError as error:
                yield str(folder), masked(str(error))
            else:
                yield str(folder), ""


def _files() -> int | None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # Ray raises the soft one to it
    return None if hard == resource.RLIM_INFINITY else hard


def _gpus() -> tuple[tuple[str, ...], str]:
    try:
        import torch

        if not torch.cuda.is_available():
            return (), ""
        return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())), ""
    except (ImportError, OSError, RuntimeError) as error:
        return (), masked(str(error))


if __name__ == "__main__":
    try:
        with ray_cluster.session(sys.argv[1]):
            pass
    except TesseraError as problem:
        sys.exit(" ".join(str(problem).split()))
