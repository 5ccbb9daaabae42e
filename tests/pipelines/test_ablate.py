"""The flow ablate in a process of its own: a temporary Prefect server, a local Ray."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from infra.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1300)]
SCRIPT = """
import asyncio, json, sys
from pathlib import Path
from infra.errors import TesseraError
from pipelines.ablate_job import Ablate
from pipelines.server import prefect_server

with prefect_server(Path("prefect")):
    from prefect.client.orchestration import get_client
    from prefect.logging.handlers import APILogHandler
    from pipelines.ablate import ablate
    try:
        print("RESULT", json.dumps(ablate(Ablate.model_validate_json(sys.argv[1]))))
    except TesseraError as error:
        print("FAILED", error)
    async def told():
        async with get_client() as client:
            tables = [a.data for a in await client.read_artifacts() if a.key == "ablation"]
            return tables, [run.state.name for run in await client.read_flow_runs()]
    print("TOLD", json.dumps(asyncio.run(told())))
    APILogHandler().flush()
"""
SET = {"train": 16, "val": 4, "size": [40, 48], "seed": 7}


def start(folder: Path, job: dict) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_AUTH_MODE": "disabled"}
    env.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-c", SCRIPT, json.dumps(job)]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_flow(folder: Path, job: dict) -> tuple[str, dict[str, str]]:
    """All that it said, and the lines of SCRIPT by their first word."""
    started = start(folder, job)
    output, _ = started.communicate(timeout=900)
    assert started.returncode == 0, output
    return output, dict(re.findall(r"^([A-Z]+) (.*)$", output, re.MULTILINE))


def trainings(output: str) -> list[str]:
    """Names of the trials whose training began."""
    return sorted(re.findall(r"\[(.*?)\] recipe generalist/debug: \d+ steps", output))


def test_a_grid_with_one_more_value_runs_only_what_is_new_and_a_failing_trial_stops_no_other(tmp_path):
    store = open_store(str(tmp_path / "store"))
    common = {"recipe": "debug", "epochs": 2, "synthetic": SET, "storage": store.url, "budget": 2}
    grid = {"train.lr": [1e-3, 1e30]}  # the second one's losses are not finite after a step
    first, said = run_flow(tmp_path, common | {"grid": grid, "seeds": [0, 1]})
    everything = [f"lr={lr}, seed {seed}" for lr in ("0.001", "1e+30") for seed in (0, 1)]
    assert trainings(first) == everything
    assert "4 trials, 0 of them are there already; 2 at once" in first
    problem, _, url = said["FAILED"].partition(": ")
    assert problem == "2 of 4 trials failed, the table has the others"
    (table,), states = json.loads(said["TOLD"])
    assert states == ["Failed"]
    assert table.endswith(url)
    assert "**lr=1e+30, seed 1** failed: step 1: gradient norm nan" in table
    assert "Traceback" not in first
    html = Path(url).read_text()
    assert html.count("../../evaluate/") == 2
    (manifest,) = [json.loads(store.read(e.key)) for e in store.list("ablate/") if e.key.endswith("manifest.json")]
    finished = [e.key.removesuffix("/manifest.json") for e in store.list("train/") if e.key.endswith("manifest.json")]
    assert manifest["runs"] == sorted(finished)
    before = {e.key: e.modified for e in store.list() if e.key.startswith(("precompute/", *finished))}

    second, said = run_flow(tmp_path, common | {"grid": {"train.lr": [1e-3, 2e-3]}, "seeds": [0, 1]})
    assert trainings(second) == ["lr=0.002, seed 0", "lr=0.002, seed 1"]
    assert "4 trials, 2 of them are there already" in second
    assert {key: e.modified for e in store.list() if (key := e.key) in before} == before
    result = json.loads(said["RESULT"])
    assert [*result["pq"]] == ["lr=0.001", "lr=0.002"]
    folder = Path(result["report"]).parent
    rows = pq.read_table(io.BytesIO((folder / "table.parquet").read_bytes())).to_pylist()
    assert [(row["train.lr"], row["seed"], row["error"]) for row in rows] == [
        (lr, seed, None) for lr in (1e-3, 2e-3) for seed in (0, 1)
    ]
    assert (folder / "compare.html").exists()

    before = {e.key: e.modified for e in store.list()}
    third, said = run_flow(tmp_path, common | {"grid": {"train.lr": [1e-3, 2e-3]}, "seeds": [0, 1]})
    assert trainings(third) == []
    assert json.loads(said["RESULT"]) == result
    assert {e.key: e.modified for e in store.list()} == before


def test_a_flow_that_is_cancelled_ends_its_trials_and_goes_on_later(tmp_path):
    job = {"recipe": "debug", "epochs": 400, "synthetic": SET, "storage": str(tmp_path / "store"), "budget": 2}
    job |= {"grid": {"train.lr": [1e-3, 2e-3, 3e-3]}, "options": {"upkeep.minutes": 0.05}}
    started = start(tmp_path, job)
    until(lambda: len({key.parts[-3] for key in (tmp_path / "store").glob("train/*/checkpoints/*")}) == 2, 400, started)
    # Ray's agents give up on their own a minute later
    children = [p for p in psutil.Process(started.pid).children(recursive=True) if "Agent" not in p.name()]
    started.send_signal(signal.SIGTERM)
    began = time.monotonic()
    output, _ = started.communicate(timeout=60)
    assert started.returncode != 0
    assert "Exception in worker" not in output  # a thread of the pool that was between two trials
    assert time.monotonic() - began < 25  # Prefect's worker kills after 30 s
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, [p.cmdline() for p in alive]
    output, said = run_flow(tmp_path, job | {"grid": {"train.lr": [1e-3]}})
    assert "[lr=0.001, seed 0] going on from the checkpoint of step" in output
    assert "RESULT" in said


def until(ready, seconds: float, started: subprocess.Popen) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert started.poll() is None, started.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.2)
