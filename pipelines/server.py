"""A temporary Prefect server for runs without one."""

import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError

from infra import processes
from infra.errors import TesseraError

_START_SECONDS, _ANSWER_SECONDS = 120, 5


def settings(url: str) -> dict[str, str]:
    """The environment of a server whose API is at `url`, and of all that use it; infra/env.sh says the same to a shell.

    It asks for a login (a new one), answers no page of another site, passes logs on to `--watch` and tells its makers
    nothing.
    """
    login = f"tessera:{secrets.token_hex(24)}"
    return {
        "PREFECT_API_URL": url,
        "PREFECT_API_AUTH_STRING": login,
        "PREFECT_SERVER_API_AUTH_STRING": login,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": url.removesuffix("/api"),
        "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",
        "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@contextmanager
def prefect_server(home: Path) -> Iterator[None]:
    """Serve on loopback, keeping runs in `home`, and set the environment to it; before Prefect is imported.

    Where PREFECT_API_URL names a server already, that one is used. Prefect's own ephemeral server is not:
    it stays behind when this process is killed. TesseraError if the server is not up within two minutes.
    """
    if "PREFECT_API_URL" in os.environ:
        yield
        return
    try:
        home.mkdir(parents=True, exist_ok=True)  # the database does not make it
        home.chmod(0o700)  # in it are the jobs and logs of all runs
    except OSError as error:
        raise TesseraError(
            f"the Prefect server cannot keep its files in {home}: {error}; start where you may write"
        ) from error
    (port,) = processes.free_ports(1)
    url = f"http://127.0.0.1:{port}/api"
    os.environ |= settings(url)
    os.environ |= {"PREFECT_HOME": str(home.resolve()), "PREFECT_SERVER_UI_ENABLED": "false"}
    application = ["--factory", "prefect.server.api.server:create_app"]
    command = [sys.executable, "-m", "uvicorn", *application, "--host", "127.0.0.1", "--port", str(port)]
    process = processes.start(command, os.environ, home, home / "server.log")
    try:
        _wait_until_ready(process, url, home / "server.log")
        yield
    finally:
        processes.stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with (
            suppress(URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(f"{url}/health", timeout=_ANSWER_SECONDS),
        ):
            return
        time.sleep(0.1)
    told = "did not come up" if process.returncode is None else f"ended with exit code {process.returncode}"
    raise TesseraError(f"the Prefect server at {url} {told}; see {log}")
