"""What the day stands on: SeaweedFS, a Prefect server with its UI, a Ray head and a worker, all real."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from infra import processes
from infra.errors import TesseraError
from infra.seaweed import S3Server, seaweed
from infra.store import Store, open_store
from pipelines.server import settings as server_settings
from tests.support.waiting import healthy, until

ROOT = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent
_ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
Run = dict[str, Any]
"""A flow run as the Prefect API gives it."""


@dataclass
class Stage:
    """Running parts, and how a user reaches them."""

    folder: Path
    server: S3Server
    url: str
    """Of the Prefect server, without /api."""
    environ: dict[str, str]
    """Of the worker and of every command."""
    say: Callable[[str], None]

    def api(self, method: str, path: str, asked: dict[str, Any] | None = None) -> httpx.Response:
        """What the Prefect server answers."""
        login = tuple(self.environ["PREFECT_API_AUTH_STRING"].split(":"))
        return httpx.request(method, f"{self.url}/api/{path}", json=asked, timeout=120, auth=login)

    @property
    def store(self) -> Store:
        """What TESSERA_STORAGE names."""
        return open_store(self.environ["TESSERA_STORAGE"])

    def command(self, *arguments: str, ok: bool = True) -> str:
        """Run `prefect ...` or `python -m ...` as a user would; its output. TesseraError if it fails."""
        program = str(_BIN / arguments[0])
        done = subprocess.run([program, *arguments[1:]], cwd=ROOT, env=self.environ, capture_output=True, text=True)
        if ok and done.returncode:
            raise TesseraError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def start(self, deployment: str, job: dict[str, Any] | None = None) -> str:
        """`prefect deployment run`; the id of the flow run."""
        parameters = [] if job is None else ["--param", f"job={json.dumps(job)}"]
        output = self.command("prefect", "deployment", "run", deployment, *parameters)
        found = re.search(r"UUID: ([0-9a-f-]{36})", output)
        if found is None:
            raise TesseraError(f"no flow run in {output!r}")
        return found[1]

    def run(self, run_id: str) -> Run:
        """One flow run as it is now."""
        return self.api("GET", f"flow_runs/{run_id}").raise_for_status().json()

    def runs(self) -> list[Run]:
        """All flow runs, in the order in which they were made."""
        asked = {"sort": "EXPECTED_START_TIME_ASC", "limit": 200}
        found = self.api("POST", "flow_runs/filter", asked).raise_for_status().json()
        return [run for run in found if run["state_type"] != "SCHEDULED" or run["state_name"] != "Scheduled"]

    def wait(self, run_id: str, seconds: float = 900) -> Run:
        """The flow run when it has ended."""
        until(lambda: self.run(run_id)["state_type"] in _ENDED, seconds, f"the end of flow run {run_id}")
        return self.run(run_id)

    @contextmanager
    def scheduled(self, deployment: str, seconds: int) -> Iterator[None]:
        """`prefect deployment schedule create`; on the way out it is gone, and those of prefect.yaml stay."""
        self.command("prefect", "deployment", "schedule", "create", deployment, "--interval", str(seconds))
        try:
            yield
        finally:
            found = self.api("GET", f"deployments/name/{deployment}").raise_for_status().json()
            for schedule in found["schedules"]:
                if "interval" in schedule["schedule"]:
                    gone = self.api("DELETE", f"deployments/{found['id']}/schedules/{schedule['id']}")
                    gone.raise_for_status()

    def flow(self, name: str, code: str, storage: str | None = None) -> subprocess.Popen[bytes]:
        """A flow in a process of its own, beside the worker's; its output goes to `<folder>/<name>.log`."""
        environ = self.environ | ({} if storage is None else {"TESSERA_STORAGE": storage})
        return processes.start([sys.executable, "-c", code], environ, ROOT, self.folder / f"{name}.log")


@contextmanager
def stage(folder: Path, say: Callable[[str], None], worker_limit: int = 4) -> Iterator[Stage]:
    """Start all parts; on the way out they are gone. From the main thread only (processes.start)."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        server = stack.enter_context(seaweed(folder / "objects", "day"))
        port, ray_port = processes.free_ports(2)
        url = f"http://127.0.0.1:{port}"
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PREFECT_", "RAY_"))}
        environ = mine | server.environ() | _settings(folder, url, ray_port)
        os.environ |= server.environ()  # for our own look at the store
        parts = Stage(folder, server, url, environ, say)
        prefect = [str(_BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        head = [str(_BIN / "ray"), "start", "--head", "--block", f"--port={ray_port}", "--num-cpus=2"]
        head += ["--min-worker-port=0", "--max-worker-port=0"]  # Ray's own choice holds ports that are free
        head += ["--include-dashboard=false", f"--object-store-memory={200 << 20}", f"--temp-dir={folder / 'ray'}"]
        worker = [str(_BIN / "prefect"), "worker", "start", "--pool", "tessera", "--type", "process"]
        worker += ["--limit", str(worker_limit)]
        _start(stack, prefect, environ, folder / "server.log")
        _start(stack, head, environ, folder / "ray.log")
        until(lambda: healthy(url), 180, "the Prefect server")
        _start(stack, worker, environ, folder / "worker.log")
        until(lambda: "tessera" in parts.command("prefect", "work-pool", "ls"), 120, "the worker")
        parts.command("prefect", "deploy", "--all")
        yield parts


def _settings(folder: Path, url: str, ray_port: int) -> dict[str, str]:
    return {
        **server_settings(f"{url}/api"),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_UI_STATIC_DIRECTORY": str(folder / "ui"),
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "RAY_AUTH_MODE": "disabled",
        "TESSERA_STORAGE": "s3://day/tessera",
        "TESSERA_RAY": f"127.0.0.1:{ray_port}",
        "OMP_NUM_THREADS": "1",
    }


def _start(stack: ExitStack, command: list[str], environ: dict[str, str], log: Path) -> None:
    process = processes.start(command, environ, ROOT, log)
    stack.callback(processes.stop, process)
