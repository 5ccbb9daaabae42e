"""What runs on the three machines: a Ray node each on the first two, the store and the Prefect server on the third."""

import json
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

import httpx

from infra.errors import TesseraError
from pipelines.server import settings as server_settings
from tests.day.chronicle import Chronicle
from tests.machines.net import OWN, Machine, put_code
from tests.support.waiting import healthy, until

ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
ACTIONS = {"tessera": ["Admin", "Read", "Write", "List", "Tagging"], "reader": ["Read", "List"]}
"""What each user of the store may do."""


@dataclass
class Stage:
    """The machines, and how to look at them from the host."""

    first: Machine
    second: Machine
    third: Machine
    url: str
    """Of the Prefect server."""
    secrets: dict[str, str]
    """By user of the store."""

    def api(self, path: str, asked: dict[str, Any] | None = None) -> Any:
        """What the Prefect server says."""
        url = f"{self.url}/api/{path}"
        login = tuple(self.first.environ["PREFECT_API_AUTH_STRING"].split(":"))
        answer = httpx.request("GET" if asked is None else "POST", url, json=asked, timeout=60, auth=login)
        return answer.raise_for_status().json()

    def logs(self, run: str) -> list[dict[str, Any]]:
        """All lines of a flow run."""
        found: list[dict[str, Any]] = []
        while True:
            asked = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "offset": len(found)}
            page = self.api("logs/filter", asked | {"limit": 200})
            found += page
            if not page:
                return found

    def line(self, run: str, pattern: str, seconds: float, after: int = 0) -> tuple[int, str]:
        """Wait for a line of a flow run's log behind the first `after` of them: (its number from 1, its text)."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for number, line in enumerate(self.logs(run)[after:], after + 1):
                if re.search(pattern, line["message"]):
                    return number, line["message"]
            if self.api(f"flow_runs/{run}")["state_type"] in ENDED:
                break
            time.sleep(1)
        raise TesseraError(f"flow run {run} has not said {pattern!r}")

    def doctor(self, machine: Machine, name: str, **environ: str) -> tuple[int, str]:
        """(exit code, the lines that are not ok) of the doctor there; all it says goes to doctor-<name>.txt."""
        code, told = machine.run("python", "-m", "pipelines.doctor", **environ)
        (machine.folder / f"doctor-{name}.txt").write_text(told)
        return code, "\n".join(" ".join(line.split()) for line in told.splitlines() if not line.startswith("ok"))


def environ(names: list[str]) -> dict[str, str]:
    """What all machines are told: where the others are, no key of the store and no token of Ray."""
    first, _, third = names
    return {
        **server_settings(f"http://{third}:4200/api"),
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_UI_STATIC_DIRECTORY": str(OWN / "ui"),
        "OMP_NUM_THREADS": "1",
        "NUMBA_CACHE_DIR": "/tmp/numba",
        "PYTHONDONTWRITEBYTECODE": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_HEAD": f"{first}:6379",
    }


def set_up(first: Machine, second: Machine, third: Machine, tell: Chronicle) -> Stage:
    """Start everything. The first machine, the driver's, has our code; the second one has packages alone."""
    stage = Stage(first, second, third, f"http://{third.address}:4200", {u: secrets.token_hex(20) for u in ACTIONS})
    with tell.chapter("three machines start"):
        put_code(first)
        _start_store(stage)
        page = f"PREFECT_SERVER_UI_API_URL={stage.url}/api"  # the host's browser does not know the machines' names
        third.start("prefect", "env", page, "prefect", "server", "start", "--host", "0.0.0.0")
        first.environ["RAY_AUTH_TOKEN"] = second.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        _start_ray(stage)
        first.environ |= keys(stage, "tessera") | {"AWS_ENDPOINT_URL": f"http://{third.name}:8333"}
        first.environ |= {"TESSERA_RAY": f"{first.name}:6379", "TESSERA_STORAGE": "s3://tessera/runs"}
        until(lambda: healthy(stage.url), 180, "the Prefect server")
        _, told = second.run("python", "-c", "import preprocessing")
        tell.expect("No module named 'preprocessing'" in told, f"{second.name} has packages, and none of our code")
        pool = "prefect work-pool create tessera --type process && prefect deploy --all"
        first.start("worker", "bash", "-c", f"{pool} && exec prefect worker start --pool tessera")
        until(lambda: stage.api("deployments/filter", {}), 180, "the deployments")
        until(lambda: stage.api("work_pools/tessera/workers/filter", {}), 180, "the worker")
    return stage


def keys(stage: Stage, user: str) -> dict[str, str]:
    """The environment of a user of the store."""
    return {"AWS_ACCESS_KEY_ID": user, "AWS_SECRET_ACCESS_KEY": stage.secrets[user], "AWS_REGION": "us-east-1"}


def _start_store(stage: Stage) -> None:
    identities = [
        {"name": user, "credentials": [{"accessKey": user, "secretKey": secret}], "actions": ACTIONS[user]}
        for user, secret in stage.secrets.items()
    ]
    third = stage.third
    (third.folder / "identities.json").write_text(json.dumps({"identities": identities}))
    flags = f"-dir={OWN}/store -ip={third.address} -ip.bind=0.0.0.0 -bucket=tessera -s3.config={OWN}/identities.json"
    flags += " -s3.port.iceberg=0 -s3.port.lance=0 -webdav=false -admin.ui=false -master.telemetry=false"
    third.start("store", "env", "GOMEMLIMIT=300MiB", "weed", "mini", *flags.split(), "-volume.preStopSeconds=0")


def _start_ray(stage: Stage) -> None:
    """The second node is started anew whenever it ends, as a service or a pod would be, with what is in node.env."""
    first, second = stage.first, stage.second
    plain = f"--block --num-cpus=1 --object-store-memory={150 << 20} --node-ip-address"
    head = f"ray start --head --port=6379 --include-dashboard=false {plain}={first.address}"
    node = f"ray start --address=$RAY_HEAD {plain}={second.address}"
    (second.folder / "node.env").touch()
    first.start("ray", *head.split())
    second.start("ray", "bash", "-c", f"while :; do (. {OWN}/node.env; {node}); sleep 1; done")
