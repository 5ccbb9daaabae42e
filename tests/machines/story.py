"""Two machines with a Ray node each, a third with store and Prefect server; one of the two leaves and comes back."""

import json
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any

import httpx

from infra.errors import TesseraError
from tests.day.chronicle import Chronicle
from tests.machines.net import OWN, Machine, put_code

JOB = {
    "workers": 2,
    "least_workers": 1,
    "synthetic": {"train": 1600, "val": 100},
    "epochs": 16,
    "options": {"upkeep.minutes": 0.3},
}
_KEYS = {"AWS_ACCESS_KEY_ID": "tessera", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20), "AWS_REGION": "us-east-1"}
_SHUT = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass
class Traffic:
    """Bytes sent and received so far, by machine, about once a second."""

    machines: list[Machine]
    rows: list[tuple[float, dict[str, tuple[int, int]]]] = field(default_factory=list)

    def watch(self, over: Event) -> None:
        """Until it is over."""
        while not over.wait(1.0):
            self.rows.append((time.time(), {machine.name: machine.traffic for machine in self.machines}))


@dataclass
class Stage:
    """What runs on the machines, and how to look at it from the host."""

    first: Machine
    second: Machine
    third: Machine
    url: str

    def api(self, path: str, asked: dict[str, Any] | None = None) -> Any:
        """What the Prefect server says."""
        url = f"{self.url}/api/{path}"
        answer = httpx.get(url, timeout=60) if asked is None else httpx.post(url, json=asked, timeout=60)
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

    def line(self, run: str, pattern: str, seconds: float, after: int = 0) -> int:
        """Wait for a line of a flow run's log after the first `after` of them; how many there are up to it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for number, line in enumerate(self.logs(run)[after:], after + 1):
                if re.search(pattern, line["message"]):
                    return number
            if self.api(f"flow_runs/{run}")["state_type"] in _SHUT:
                break
            time.sleep(1)
        raise TesseraError(f"flow run {run} has not said {pattern!r}")


def environ(parts: list[str]) -> dict[str, str]:
    """What all machines are told: where the others are, no key and no token."""
    first, _, third = parts
    return {
        "PREFECT_API_URL": f"http://{third}:4200/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_UI_STATIC_DIRECTORY": str(OWN / "ui"),
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "NUMBA_CACHE_DIR": "/tmp/numba",
        "PYTHONDONTWRITEBYTECODE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_HEAD": f"{first}:6379",
    }


def set_up(first: Machine, second: Machine, third: Machine, tell: Chronicle) -> Stage:
    """Start everything. The driver's machine has our code; the second one has packages alone."""
    with tell.chapter("three machines start"):
        put_code(first)
        weed = f"mini -dir={OWN}/store -ip={third.address} -ip.bind=0.0.0.0 -bucket=tessera -master.telemetry=false"
        weed += " -s3.port.iceberg=0 -s3.port.lance=0 -webdav=false -admin.ui=false -volume.preStopSeconds=0"
        third.environ |= _KEYS | {"GOMEMLIMIT": "300MiB"}
        third.start("store", "weed", *weed.split())
        for name in _KEYS:
            del third.environ[name]
        third.start("prefect", "prefect", "server", "start", "--host", "0.0.0.0")
        token = secrets.token_hex(32)
        for machine in (first, second):
            machine.environ["RAY_AUTH_TOKEN"] = token
        head = "--head --block --port=6379 --num-cpus=1 --include-dashboard=false"
        first.start("ray", "ray", "start", *head.split(), f"--node-ip-address={first.address}", _objects())
        node = f"ray start --block --address=$RAY_HEAD --num-cpus=1 --node-ip-address={second.address} {_objects()}"
        second.start("ray", "bash", "-c", f"while :; do {node}; date; sleep 1; done")  # as a service or a pod would
        stage = Stage(first, second, third, f"http://{third.address}:4200")
        first.environ |= _KEYS | {"AWS_ENDPOINT_URL": f"http://{third.name}:8333"}
        first.environ |= {"TESSERA_RAY": f"{first.name}:6379", "TESSERA_STORAGE": "s3://tessera/runs"}
        _until(lambda: httpx.get(f"{stage.url}/api/health", timeout=5).is_success, 180, "the Prefect server")
        _, told = second.run("python", "-c", "import preprocessing")
        tell.expect("No module named 'preprocessing'" in told, f"{second.name} has packages, and none of our code")
        first.start("worker", "bash", "-c", _WORKER)
        _until(lambda: stage.api("deployments/filter", {}), 180, "the deployments")
    return stage


_WORKER = """
prefect work-pool create tessera --type process && prefect deploy --all && exec prefect worker start --pool tessera
"""


def _objects() -> str:
    return f"--object-store-memory={150 << 20}"


def play(stage: Stage, tell: Chronicle) -> str:
    """All that happens; the id of the flow run of train-coco."""
    with tell.chapter("doctor"):
        code, told = stage.first.run("python", "-m", "pipelines.doctor")
        (stage.first.folder / "doctor.txt").write_text(told)
        tell.expect(code == 0, f"doctor on {stage.first.name}, of both nodes: exit code {code}")
    with tell.chapter("without the token"):
        bare = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "token", "TESSERA_RAY": f"{stage.first.name}:6379"}
        code, told = stage.first.run("python", "-m", "pipelines.doctor", **bare)
        line = next((line for line in told.splitlines() if "token" in line.lower()), told)
        tell.expect(code == 1 and "token" in line, f"doctor: {' '.join(line.split())}")
    with tell.chapter("from a machine that is no node"):
        put_code(stage.third)
        code, told = stage.third.run("python", "-m", "pipelines.doctor", **stage.first.environ)
        line = next((line for line in told.splitlines() if line.startswith("bad")), told)
        tell.expect(code == 1 and "ray start --address" in line, f"doctor: {' '.join(line.split())}")
    with tell.chapter("train-coco on both machines"):
        job = f"job={json.dumps(JOB)}"
        _, told = stage.first.run("prefect", "deployment", "run", "train-coco/train-coco", "--param", job)
        found = re.search(r"UUID: ([0-9a-f-]{36})", told)
        if found is None:
            raise TesseraError(f"no flow run: {told}")
        run = found[1]
        both = stage.line(
            run, rf"2 workers: .*{stage.first.name}.*{stage.second.name}|2 workers: .*{stage.second.name}", 400
        )
        lines = [line["message"] for line in stage.logs(run)]
        shards = {m[1] for line in lines if (m := re.search(r"s CPU on (\S+),", line))}
        tell.expect(
            shards == {stage.first.name, stage.second.name}, f"shards were computed on {', '.join(sorted(shards))}"
        )
        tell.note(lines[both - 1])
        both = stage.line(run, r"step (1[5-9]\d|[2-9]\d\d) of", 300, both)
        tell.note(stage.logs(run)[both - 1]["message"])
    with tell.chapter(f"the cable of {stage.second.name} is pulled"):
        stage.second.cable(False)
        begin = time.monotonic()
        alone = stage.line(run, r"with 1 workers", 400, both)
        tell.note(f"after {time.monotonic() - begin:.0f} s: {stage.logs(run)[alone - 1]['message']}")
        alone = stage.line(run, r"step \d+ of", 200, alone)
        tell.note(stage.logs(run)[alone - 1]["message"])
    with tell.chapter("and plugged in again"):
        stage.second.cable(True)
        begin = time.monotonic()
        back = stage.line(run, r"with 2 workers", 400, alone)
        tell.note(f"after {time.monotonic() - begin:.0f} s: {stage.logs(run)[back - 1]['message']}")
        back = stage.line(run, r"2 workers: ", 100, back - 1)
        tell.expect(stage.second.name in stage.logs(run)[back - 1]["message"], stage.logs(run)[back - 1]["message"])
    with tell.chapter("the report"):
        _until(lambda: stage.api(f"flow_runs/{run}")["state_type"] in _SHUT, 600, "the end")
        state = stage.api(f"flow_runs/{run}")["state_name"]
        tell.expect(state == "Completed", f"the flow run ended as {state}")
        tell.note(next(line["message"] for line in reversed(stage.logs(run)) if "report: " in line["message"]))
    return run


def _until(happened: Callable[[], Any], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if happened():
                return
        except httpx.HTTPError:
            pass
        if time.monotonic() > end:
            raise TesseraError(f"after {seconds:.0f} s still waiting for {what}")
        time.sleep(0.5)


def watching(parts: list[Machine]) -> tuple[Traffic, Event]:
    """Count bytes from now on, until the event is set."""
    traffic, over = Traffic(parts), Event()
    Thread(target=traffic.watch, args=(over,), daemon=True).start()
    return traffic, over
