"""No secret in the repository, and none in anything that a run leaves behind or shows while it runs."""

import base64
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from infra import processes
from infra.store import open_store
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.pipelines.test_deployment import prefect, until  # noqa: F401

CHECKOUT = Path(__file__).parents[2]
CREDENTIALS = {
    "AWS access key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "secret": rb"(?i)(?:secret|token|password|api_?key)\w*[\"']?\s*[:=]\s*[\"']?"
    rb"(?:[0-9a-f]{32,}|[A-Za-z0-9/+]{40})(?![\w/+])",
    "private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}\b",
    "GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,})\b",
}
STATE = ("actors", "tasks", "workers", "jobs", "runtime_envs")
PAGES = {"api/jobs/", "logical/actors", "nodes?view=summary"}
PAGES |= {f"api/v0/{kind}?detail=true&limit=1000" for kind in STATE}
LOGS = {"prefect.db", "server.log", "worker.log", "runtime_env_agent.log", "raylet.out", "gcs_server.out"}
KEPT = """
import sys, ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list
ray.init(sys.argv[1], log_to_driver=False)
for key in _internal_kv_list(b"", namespace="fun"):
    sys.stdout.buffer.write(b"key " + key + _internal_kv_get(key, namespace="fun"))
"""


def credentials_in(data):
    """What looks like one, with its kind."""
    return [(kind, found.decode()) for kind, pattern in CREDENTIALS.items() for found in re.findall(pattern, data)]


def test_what_credentials_look_like_is_known():
    shown = ["AKIA" + "Q" * 16, f"aws_secret_access_key = {'aB3/' * 10}", f'"HF_TOKEN": "hf_{"x" * 34}"']
    shown += [f"AWS_SECRET_ACCESS_KEY='{secrets.token_hex(20)}'", "-----BEGIN OPENSSH " + "PRIVATE KEY-----"]
    assert all(credentials_in(text.encode()) for text in shown)
    assert credentials_in(b"aws_secret_access_key=self.secret_key, sha256 = " + b"0" * 64) == []


def test_no_file_of_the_repository_holds_a_credential():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, check=True).stdout
    files = [CHECKOUT / name.decode() for name in listed.split(b"\0") if name]
    assert len(files) > 100
    found = {str(path): credentials_in(path.read_bytes()) for path in files if path.is_file()}
    assert not {path: what for path, what in found.items() if what}


def spellings(secret):
    """As text, and what of it is the same in base64 wherever it starts."""
    text = secret.encode()
    return [text, *(base64.b64encode(b"-" * before + text)[4:-4] for before in range(3))]


class Watched:
    """What can be seen of a machine from outside while a run is on it: command lines, and Ray's dashboard."""

    def __init__(self, dashboard, marks):
        self.dashboard, self.marks, self.seen, self.leaks = dashboard, marks, set(), set()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()

    def watch(self):
        while not self.ended.wait(1.0):
            for process in psutil.process_iter(["cmdline"]):
                self.look("command lines", " ".join(process.info["cmdline"] or []).encode())
            for page in PAGES if self.dashboard else ():
                with suppress(OSError), urllib.request.urlopen(f"{self.dashboard}/{page}", timeout=10) as answer:
                    self.look(page, answer.read())

    def look(self, place, data):
        self.seen.add(place)
        if any(mark in data for mark in self.marks):
            self.leaks.add(place)


@pytest.fixture
def own_secrets(s3_env, monkeypatch):
    """The S3 server's and one for the hub, in the environment of all that is started from now on."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + secrets.token_hex(17))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return [s3_env.secret_key, os.environ["HF_TOKEN"]]


@pytest.fixture
def ray_folder(monkeypatch):
    """Where Ray keeps its sessions; short, since a socket's path may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def head(own_secrets, ray_folder, monkeypatch):
    """A cluster whose nodes know no key, TESSERA_RAY from now on: (its address, that of the dashboard)."""
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = dict(zip(names, processes.free_ports(len(names)), strict=True))
    options = {**ports, "min-worker-port": 0, "max-worker-port": 0}  # any: the default range holds some of ours
    options |= {"node-ip-address": "127.0.0.1", "num-cpus": 2, "temp-dir": ray_folder}
    options |= {"object-store-memory": 200 << 20, "include-dashboard": "true", "dashboard-host": "127.0.0.1"}
    start = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command = [*start, *(f"--{name}={value}" for name, value in options.items())]
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "HF_"))}
    bare |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    process = processes.start(command, bare, ray_folder, ray_folder / "ray-start.log")
    dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"

    def answers():
        with suppress(OSError), urllib.request.urlopen(f"{dashboard}/nodes?view=summary", timeout=5):
            return True

    try:
        until(answers, 60)
        monkeypatch.setenv("TESSERA_RAY", f"127.0.0.1:{ports['port']}")
        yield os.environ["TESSERA_RAY"], dashboard
    finally:
        processes.stop(process)


def run_and_look(prefect, own_secrets, folders, storage, ray, dashboard=None):  # noqa: F811
    """Run train-coco on the worker, and look everywhere; gives what was looked at."""
    coco = write_set(folders[0], SyntheticConfig(train=24, val=8, size=(48, 48), seed=5))
    job = {"data": str(coco), "storage": storage, "recipe": "debug", "ray": ray}
    own_secrets = [*own_secrets, os.environ["PREFECT_API_AUTH_STRING"].partition(":")[2]]
    with Watched(dashboard, [spelling for secret in own_secrets for spelling in spellings(secret)]) as watched:
        said = prefect("deployment", "run", "train-coco/train-coco", "--watch", "--param", f"job={json.dumps(job)}")
    watched.look("stdout", said.encode())
    store = open_store(storage)
    for entry in store.list():
        watched.look(entry.key, store.read(entry.key))
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        watched.look(str(path), path.read_bytes())
    assert any(place.endswith("report.html") for place in watched.seen)
    assert {place.rpartition("/")[2] for place in watched.seen} >= LOGS
    return watched


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_secret_is_left_or_shown_by_a_run_on_a_cluster(head, prefect, own_secrets, tmp_path, ray_folder, s3_env):  # noqa: F811
    address, dashboard = head
    storage, folders = f"s3://{s3_env.bucket}/{tmp_path.name}", (tmp_path, ray_folder)
    watched = run_and_look(prefect, own_secrets, folders, storage, address, dashboard)
    kept = subprocess.run([sys.executable, "-c", KEPT, address], capture_output=True, check=True).stdout
    assert kept.startswith(b"key ")
    watched.look("memory of the cluster's head", kept)
    assert watched.seen >= PAGES
    assert not watched.leaks


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_secret_is_left_or_shown_by_a_local_run(own_secrets, ray_folder, prefect, tmp_path, s3_env):  # noqa: F811
    storage = f"s3://{s3_env.bucket}/{tmp_path.name}"
    assert not run_and_look(prefect, own_secrets, (tmp_path, ray_folder), storage, "local").leaks
