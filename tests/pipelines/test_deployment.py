"""Server, worker, `prefect deploy --all` and `prefect deployment run`, all real."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra import processes
from infra.store import open_store
from pipelines.server import prefect_server
from preprocessing.synthetic import SyntheticConfig, write_set

CHECKOUT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def prefect(tmp_path, s3_env, monkeypatch):
    """A server and a worker with the deployments; gives a function that runs `prefect ...`."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("PREFECT_API_URL", None)
    command = str(Path(sys.executable).parent / "prefect")
    with prefect_server(tmp_path / "prefect"):
        os.environ |= {"PREFECT_CLI_PROMPT": "false", "PREFECT_WORKER_QUERY_SECONDS": "1", "RAY_AUTH_MODE": "disabled"}

        def run(*arguments):
            done = subprocess.run([command, *arguments], cwd=CHECKOUT, env=os.environ, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        run("work-pool", "create", "tessera", "--type", "process", "--overwrite")  # in the order of README
        run("deploy", "--all")
        start = [command, "worker", "start", "--pool", "tessera"]
        worker = processes.start(start, os.environ, CHECKOUT, tmp_path / "worker.log")
        try:
            yield run
        finally:
            processes.stop(worker)


def until(ready, timeout):
    end = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.5)


@pytest.fixture
def job(tmp_path, s3_env):
    coco = write_set(tmp_path, SyntheticConfig(train=24, val=8, size=(48, 48), seed=5))
    return {"data": str(coco), "storage": f"s3://{s3_env.bucket}/{tmp_path.name}", "recipe": "debug"}


def test_a_deployment_run_writes_its_report_to_s3_and_watch_ends_with_it(prefect, job):
    said = prefect("deployment", "run", "train-coco/train-coco", "--watch", "--param", f"job={json.dumps(job)}")
    keys = [e.key for e in open_store(job["storage"]).list("evaluate/")]
    (report,) = [key for key in keys if key.endswith("report.html")]
    assert f"{job['storage']}/{report}" in "".join(line.strip() for line in said.splitlines())
    assert re.search(r"\| all +\|", said), said
    checked = subprocess.run(
        [sys.executable, "-m", "pipelines.doctor"], cwd=CHECKOUT, env=os.environ, capture_output=True
    )
    rows = [line.split() for line in checked.stdout.decode().splitlines()]
    assert {row[1]: row[0] for row in rows if row[1] in ("deployments", "work")} == {"deployments": "ok", "work": "ok"}


def train_workers():
    """Those of flows of this server: other clusters may run on the machine."""
    named = [(p, " ".join(p.info["cmdline"] or [])) for p in psutil.process_iter(["cmdline"])]
    found = [p for p, command in named if "RayTrainWorker" in command]
    return [p for p in found if p.environ().get("PREFECT_API_URL") == os.environ["PREFECT_API_URL"]]


def test_cancelling_the_flow_run_stops_the_ray_work(prefect, job):
    long_job = {**job, "epochs": 5000}
    output = prefect("deployment", "run", "train-coco/train-coco", "--param", f"job={json.dumps(long_job)}")
    run_id = re.search(r"UUID: ([0-9a-f-]{36})", output)[1]
    until(train_workers, 120)
    ours = train_workers()
    prefect("flow-run", "cancel", run_id)
    until(lambda: "CANCELLED" in prefect("flow-run", "inspect", run_id), 60)
    _, alive = psutil.wait_procs(ours, timeout=20)
    assert not alive
