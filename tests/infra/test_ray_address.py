"""No job says whose code runs here: Ray is where the worker's environment has it, and never behind a URL."""

import pytest
from pydantic import ValidationError

from infra import ray_cluster, ray_health
from infra.errors import TesseraError
from infra.ray_address import checked, chosen, host_and_port
from pipelines.doctor import Doctor
from pipelines.evaluate_job import Evaluate
from pipelines.job import TrainCoco
from pipelines.predict_job import Predict
from pipelines.retrain_job import Retrain

URLS = [
    "ray://127.0.0.1:1",
    "RAY://127.0.0.1:1",
    " ray://127.0.0.1:1",
    "ray:/\t/h:1",
    "anyscale://x",
    "os://",
    "x://h:1",
]
ODD = [
    "",
    " ",
    "local ",
    "LOCAL",
    "Auto",
    "h",
    "h:",
    "h:0",
    "h:65536",
    "h:1 ",
    "h:1\n",
    "h\0:1",
    "u@h:1",
    "h/x:1",
    "ray:1:2",
]
ELSEWHERE = ["127.0.0.1:6379", "evil.example:6379", "[::1]:6379"]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch):
    for name in ("RAY_ADDRESS", "TESSERA_RAY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("address", [*URLS, *ODD, *ELSEWHERE], ids=repr)
def test_a_job_of_any_flow_may_not_name_a_cluster(address: str):
    for kind, others in (
        (TrainCoco, {}),
        (Doctor, {}),
        (Retrain, {}),
        (Predict, {"run": "r", "images": "i", "out": "o"}),
        (Evaluate, {"run": "r", "data": "d", "split": "s"}),
    ):
        refused = "a cluster elsewhere is named by TESSERA_RAY|expected printable characters on one line"
        with pytest.raises((TesseraError, ValidationError), match=refused):
            kind.model_validate({"ray": address, **others})


def test_a_job_may_name_the_workers_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TESSERA_RAY", "head:6379")
    assert [TrainCoco(ray=a).ray for a in ("local", "auto", "head:6379")] == ["local", "auto", "head:6379"]
    assert TrainCoco().ray == "head:6379"
    with pytest.raises(TesseraError, match="expected local or auto, or 'head:6379'"):
        chosen("head:6380")


@pytest.mark.parametrize("address", [*URLS, *ODD], ids=repr)
@pytest.mark.parametrize("where", ["TESSERA_RAY", "RAY_ADDRESS"])
def test_nor_may_the_environment_name_a_url(address: str, where: str, monkeypatch: pytest.MonkeyPatch):
    if not address or "\0" in address:
        pytest.skip("no such environment, or none said")
    monkeypatch.setenv(where, address)
    asked = "auto" if where == "RAY_ADDRESS" else address
    with pytest.raises(TesseraError):
        chosen(asked)
    for connect in (lambda: ray_cluster.session(asked), lambda: ray_health.connected(asked, 5)):
        with pytest.raises(TesseraError, match="expected local, auto or host:port"), connect():
            pass


def test_auto_is_what_ray_address_says(monkeypatch: pytest.MonkeyPatch):
    assert checked("auto") == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert checked("auto") == "head:6379"
    assert [host_and_port(a) for a in ("local", "h:1", "[::1]:2")] == [None, ("h", 1), ("::1", 2)]
