"""doctor as people run it: the command, and the flow on a real server; a cluster with a sick node."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import prefect
import pytest
from ray.cluster_utils import Cluster

from infra import processes
from infra.health import Row, Verdict
from pipelines.doctor import ending, main, to_markdown, to_text
from pipelines.server import prefect_server
from pipelines.server_health import Held, Server, judge

CHECKOUT = Path(__file__).parents[2]
URL = "http://127.0.0.1:4200/api"
FLOW = """
import sys
from pipelines.doctor import Doctor, doctor
doctor(Doctor.model_validate_json(sys.argv[1]))
"""


def run(*command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, since this one may have a Ray already."""
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "RAY_AUTH_MODE": "disabled", **variables}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)


def rows_of(server: Server | None) -> dict[str, tuple[str, str]]:
    return {row.what: (str(row.verdict), row.todo) for row in judge(server)}


def test_what_the_server_says_is_judged():
    ours = prefect.__version__
    well = Server(URL, version=ours, pool=True, online=1)
    assert {verdict for verdict, _ in rows_of(well).values()} == {"ok"}
    assert rows_of(None)["Prefect"][0] == "ok"
    assert rows_of(Server(URL, problem="refused"))["Prefect"][0] == "bad"
    assert rows_of(Server(URL, version="3.0.0", pool=True, online=1))["Prefect"][0] == "bad"
    start = "prefect worker start --pool tessera --type process"
    assert rows_of(Server(URL, version=ours))["work pool"] == ("bad", f"{start} makes it")
    assert rows_of(Server(URL, version=ours, pool=True))["work pool"] == ("bad", start)
    paused = judge(Server(URL, version=ours, pool=True, paused=True, online=1))
    assert [row.verdict for row in paused if row.what == "work pool"] == ["warn", "ok"]


@pytest.mark.parametrize(
    ("found", "what", "verdict", "todo"),
    [
        ({"problem": "401", "refused": True}, "Prefect", "bad", "set PREFECT_API_AUTH_STRING to"),
        ({"login": False}, "Prefect's login", "warn", "PREFECT_SERVER_API_AUTH_STRING"),
        ({"pages": True}, "Prefect's pages", "warn", "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"),
        ({"missing": ("doctor/doctor",)}, "deployments", "bad", "prefect deploy --all"),
        ({"outdated": ("doctor/doctor",)}, "deployments", "warn", "prefect deploy --all"),
        ({"held": (Held("r/r", 1, "l", ()),)}, "deployments", "warn", "prefect gcl update l --active-slots 0"),
        ({"held": (Held("r/r", 1, "l", (("a", "Pending"),)),)}, "deployments", "warn", "prefect flow-run delete a"),
        ({"held": (Held("r/r", 1, "l", (("a", "Running"),)),)}, "deployments", "ok", "prefect flow-run delete a"),
    ],
)
def test_what_is_wrong_with_a_server_has_a_row(found: dict, what: str, verdict: str, todo: str):
    server = Server(URL, **{"version": prefect.__version__, "pool": True, "online": 1} | found)
    row = [row for row in judge(server) if row.what == what][-1]
    assert str(row.verdict) == verdict
    assert todo in row.todo


def test_the_table_is_aligned_and_its_last_line_counts():
    rows = [Row("store", "driver", Verdict.OK, "fine"), Row("disk", "10.0.0.2", Verdict.BAD, "a|b full", "free some")]
    assert to_text(rows).splitlines() == [
        "ok   store  driver    fine",
        "bad  disk   10.0.0.2  a|b full",
        "                      -> free some",
        "things to do: 1, of which bad: 1",
    ]
    assert ending(rows[:1]) == "all well"
    assert r"| bad | disk | 10\.0\.0\.2 | a\|b full | free some |" in to_markdown(rows)


def test_where_nothing_can_be_reached_all_of_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("TESSERA_RAY", f"127.0.0.1:{processes.free_ports(1)[0]}")
    monkeypatch.setenv("TESSERA_STORAGE", str(tmp_path / "file" / "store"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-very-secret-thing")
    (tmp_path / "file").touch()
    assert main([]) == 1
    told = capsys.readouterr().out
    lines = told.splitlines()
    assert {line.split()[1] for line in lines if line.startswith("bad")} == {"Ray", "store"}
    assert lines[-1] == f"things to do: {told.count('-> ')}, of which bad: 2"
    assert "a-very-secret-thing" not in told


@pytest.mark.parametrize("job", ['{"storge": "x"}', '{"least_free_gb": -1}', "{", '{"storage": "ftp://x"}'])
def test_a_job_that_is_none_is_refused_in_a_line(job, capsys):
    assert main([job]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_all_is_well_on_this_machine_and_the_flow_leaves_its_table(tmp_path, monkeypatch):
    job = {"storage": str(tmp_path / "store"), "ray": "local", "least_free_gb": 0}
    done = run("-m", "pipelines.doctor", json.dumps(job), folder=tmp_path, PREFECT_API_URL="")
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("PREFECT_API_URL", None)
    with prefect_server(tmp_path / "prefect"):
        done = run("-c", FLOW, json.dumps(job), folder=tmp_path)
        shown = run("-m", "prefect", "artifact", "inspect", "doctor", "--limit", "1", folder=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode != 0  # the server has no work pool yet
    assert "TesseraError: things to do: 1, of which bad: 1; the first: work pool" in said
    assert "### things to do: 1, of which bad: 1" in shown.stdout


@pytest.fixture
def two_nodes(tmp_path, monkeypatch):
    """A head, and a node with another Numba, a clock 100 s fast and a full disk: so its Python finds them."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    odd = tmp_path / "odd"
    (odd / "numba-9.9.dist-info").mkdir(parents=True)
    (odd / "numba-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numba\nVersion: 9.9\n")
    (odd / "sitecustomize.py").write_text(
        "import shutil, time\n"
        "real, free = time.time, shutil.disk_usage\n"
        "time.time = lambda: real() + 100\n"
        "shutil.disk_usage = lambda path: free(path)._replace(free=10**8)\n"
    )
    small = {"object_store_memory": 100 << 20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**small, "num_cpus": 1, "include_dashboard": False},
        shutdown_at_exit=False,
    )
    try:
        node = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": f"{odd}:{CHECKOUT}"}, **small)
        yield cluster, node
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_sick_node_and_a_silent_one_are_named(two_nodes, tmp_path):
    cluster, node = two_nodes
    job = {"storage": str(tmp_path / "store"), "least_free_gb": 0.5, "seconds": 100}
    done = run("-m", "pipelines.doctor", json.dumps(job), folder=tmp_path, TESSERA_RAY=cluster.address)
    assert done.returncode == 1, done.stderr
    bad = [line for line in done.stdout.splitlines() if line.startswith("bad")]
    (where,) = {line.split()[2] for line in bad}
    assert where.endswith(f"#{node.node_id[:6]}")
    assert [line.split()[1] for line in bad] == ["versions", "clock", "disk"]
    assert "numba 9.9, the driver has" in bad[0]
    assert " s ahead of the driver's" in bad[1]
    assert "0.10 GB free for" in bad[2]

    raylet = node.all_processes["raylet"][0].process.pid
    os.kill(raylet, signal.SIGSTOP)
    try:
        job |= {"seconds": 20}
        done = run("-m", "pipelines.doctor", json.dumps(job), folder=tmp_path, TESSERA_RAY=cluster.address)
    finally:
        os.kill(raylet, signal.SIGCONT)
    assert done.returncode == 1, done.stderr
    assert re.search(rf"^bad  node +{where} +no answer within 20 s$", done.stdout, re.MULTILINE), done.stdout
