"""A Ray of this process' own: on loopback alone, with a token, in a folder that only this user can enter.

Ray itself turns 127.0.0.1 into the machine's address, listens on all of them, writes its token for everybody to read
and makes its folders writable by all.
"""

import errno
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants  # only a variable of the environment, read once on import, says the same

from infra.errors import TesseraError
from infra.opening import own_folder
from infra.text import shown

log = logging.getLogger("tessera.ray")

_TRIES = 3
_SOCKET_BYTES = 107  # of a socket's path: Linux' sun_path, less its end
_RAYS_PART = "/session_2026-11-30_22-51-44_154543_4194304/sockets/plasma_store"  # with the largest process id
_PYTHONS_PART = "/pymp-12345678/listener-12345678"  # multiprocessing's: loader processes
_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
_SETTINGS = {
    ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",  # no cluster: its processes listen on loopback
    "GLOO_SOCKET_IFNAME": _LOOPBACK,
    "NCCL_SOCKET_IFNAME": _LOOPBACK,
}
_TOKEN = secrets.token_hex(32)
_REMEDIES = {
    errno.EMFILE: "allow more open files (ulimit -n 65536)",
    errno.ENFILE: "this machine has too many open files: close other programs",
    errno.EAGAIN: "allow more processes (ulimit -u), or close other programs",
    errno.ENOMEM: "close other programs, or take a machine with more memory",
    errno.ENOSPC: "free some space there, or set RAY_TMPDIR to a folder on another disk",
}


def start(**options: Any) -> None:
    """ray.init of a Ray of this machine, tried again where it took too long. TesseraError if it does not come up."""
    folder = _folder()
    with _on_loopback():
        for attempt in range(1, _TRIES + 1):
            before = {*psutil.Process().children(recursive=True)}
            try:
                ray.init(address="local", _node_ip_address="127.0.0.1", _temp_dir=str(folder), **options)
                return
            except Exception as error:  # Ray says "timed out" with a bare one
                _clear(before, str(folder))
                told = f"Ray did not start on this machine: {shown(error, 300)}"
                if isinstance(error, OSError) and not isinstance(error, ConnectionError):
                    todo = _REMEDIES.get(error.errno or 0, f"make {folder} writable, or set RAY_TMPDIR")
                    raise TesseraError(f"{told}; {todo}") from error
                if attempt == _TRIES:
                    raise TesseraError(
                        f"{told} (tried {_TRIES} times); is the machine very busy, or short of memory, of processes "
                        f"(ulimit -u) or of open files (ulimit -n)? Ray's own account: {folder}/session_latest/logs"
                    ) from error
                log.warning("%s; once more", told)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """What Ray's processes inherit, and this one's Ray goes by; afterwards a cluster may be joined as before."""
    kept, as_before = {name: os.environ.get(name) for name in _SETTINGS}, ray_constants.ENABLE_RAY_CLUSTER
    os.environ |= _SETTINGS
    os.environ.setdefault("RAY_AUTH_TOKEN", _TOKEN)  # stays: this process asks with it
    os.environ.pop("RAY_AUTH_MODE", None)  # then Ray asks for a token; `disabled` is meant for clusters
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = as_before
        for name, value in kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _folder() -> Path:
    """Where Ray keeps sessions and sockets: below RAY_TMPDIR or the folder for temporary files."""
    named = [name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    base = Path(os.environ[named[0]] if named else "/tmp").absolute()
    own = base / f"ray-{os.getuid()}"
    for path, names in ((f"{own}/ray{_RAYS_PART}", "TMPDIR or RAY_TMPDIR"), (_sockets(), "TMPDIR")):
        if len(os.fsencode(path)) > _SOCKET_BYTES:
            raise TesseraError(
                f"{path} is too long for a socket ({len(os.fsencode(path))} bytes, at most {_SOCKET_BYTES}); set "
                f"{names} to a folder with a shorter path, /tmp say"
            )
    try:
        return own_folder(own) / "ray"
    except OSError as error:
        told = str(error) if str(own) in str(error) else f"{own}: {error}"
        raise TesseraError(f"Ray cannot keep its files: {told}; set RAY_TMPDIR to a folder of your own") from error


def _sockets() -> str:
    try:
        return f"{tempfile.gettempdir()}{_PYTHONS_PART}"
    except FileNotFoundError as error:
        raise TesseraError(f"{error}; set TMPDIR to a folder that this user may write to") from error


def _clear(before: set[psutil.Process], folder: str) -> None:
    """Ray leaves what it had started when something failed."""
    ray.shutdown()
    for process in {*psutil.Process().children(recursive=True)} - before:
        with suppress(psutil.NoSuchProcess):
            if folder in " ".join(process.cmdline()):
                process.kill()
