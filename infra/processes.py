"""Servers as child processes that never outlive this one."""

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

_STOP_SECONDS = 10
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Loaded here because between fork and exec only the call itself is safe.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def start(command: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start a server in a session of its own, all that it prints going to `log`.

    On Linux it dies with the thread that called, even a killed one: call from the main thread.
    """
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and all that it started: asked first, killed when it takes longer than 10 s."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(_STOP_SECONDS)
            return


def free_ports(count: int) -> list[int]:
    """Free ports on loopback, below the range that the kernel gives to outgoing connections."""
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            candidate = held.enter_context(socket.socket())
            with suppress(OSError):
                candidate.bind(("127.0.0.1", random.randrange(10_000, 32_768)))
                ports.append(candidate.getsockname()[1])
    return ports


def _die_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
