"""Rows from made-up facts of sick nodes; facts as real processes and a real local Ray find them."""

import re
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from infra import health, ray_health
from infra.errors import TesseraError
from infra.health import Clock, Demands, Disk, Facts, Place, Row, StoreFacts, Verdict, examine
from infra.ray_health import bounded, gather, masked
from infra.store import Store, open_store
from tests.support.ray_local import ray_local  # noqa: F401

ROOT = Path(__file__).parents[2]
VERSIONS = {
    "python": "3.11.7",
    "ray": "2.60.0",
    "torch": "2.13.0+cpu",
    "prefect": "3.8.8",
}
WELL = Facts(
    versions=tuple(VERSIONS.items()),
    store=StoreFacts(seconds=0.1, shared=True, clock=Clock(0.2, 0.6)),
    disks=(Disk(("/store", "/tmp"), 80.0),),
    memory_gb=12.0,
    shm_gb=8.0,
)
DRIVER = Place("driver", replace(WELL, store=replace(WELL.store, shared=None)))
NODE = Place("10.0.0.2", WELL, clock=Clock(0.01, 0.005))
FOLDER, S3 = Demands("/store", False, 5), Demands("s3://bucket", False, 5)
WITH_GPUS = Demands("/store", True, 5)


def with_versions(**other: str) -> Place:
    return replace(NODE, facts=replace(WELL, versions=tuple((VERSIONS | other).items())))


def with_facts(**other: object) -> Place:
    return replace(NODE, facts=replace(WELL, **other))


def of(rows: list[Row], node: Place = NODE) -> list[Row]:
    """The rows with something to do, which are about this node."""
    found = [row for row in rows if row.verdict is not Verdict.OK]
    assert all(node.where in row.where.split(", ") for row in found)
    assert all(bool(row.todo) == (row.verdict is not Verdict.OK) for row in rows)
    return found


def test_a_sound_cluster_has_nothing_to_do_and_equal_nodes_share_rows():
    nodes = [replace(NODE, where=f"10.0.0.{i}") for i in range(2, 7)]
    rows = examine(DRIVER, nodes, FOLDER)
    assert of(rows) == []
    (versions,) = [row for row in rows if row.what == "versions"]
    assert versions.where == "driver and 5 more"
    assert "torch 2.13.0+cpu" in versions.found


@pytest.mark.parametrize(
    ("node", "demands", "what", "verdict", "found", "todo"),
    [
        (
            with_versions(torch="2.9.0+cpu"),
            FOLDER,
            "versions",
            "bad",
            r"torch 2.9.0\+cpu, the driver has 2.13.0",
            "ins",
        ),
        (with_versions(python="3.12.7"), FOLDER, "versions", "bad", "python 3.12.7, the driver has 3.11.7", "install"),
        (with_versions(ray=health.MISSING), FOLDER, "versions", "bad", "ray missing, the driver has 2.60.0", "install"),
        (with_facts(versions=()), FOLDER, "versions", "bad", "python missing, .*; torch missing", "install"),
        (replace(NODE, facts=None, problem="no answer within 60 s"), FOLDER, "node", "bad", "no answer", "ray status"),
        (
            replace(NODE, facts=None, problem="ModuleNotFoundError: No module named 'numba'"),
            FOLDER,
            "node",
            "bad",
            "No module named",
            "install the packages of constraints.txt",
        ),
        (
            with_facts(store=StoreFacts("cannot write /store/x: Permission denied; choose a folder")),
            FOLDER,
            "store",
            "bad",
            "^cannot write /store/x: Permission denied$",
            "^choose a folder$",
        ),
        (
            with_facts(store=StoreFacts("cannot list /store")),
            FOLDER,
            "store",
            "bad",
            "cannot list",
            "route to the store",
        ),
        (
            with_facts(store=StoreFacts("cannot write x: too large (RequestTimeTooSkewed)")),
            FOLDER,
            "store",
            "bad",
            "RequestTimeTooSkewed",
            "set the clock",
        ),
        (with_facts(store=StoreFacts(shared=False)), FOLDER, "store", "bad", "/store is another one", "mount the same"),
        (replace(NODE, clock=Clock(7, 0.1)), FOLDER, "clock", "warn", "7 s ahead of the driver's", "chrony"),
        (replace(NODE, clock=Clock(-900, 0.1)), FOLDER, "clock", "bad", "900 s behind the driver's", "chrony"),
        (with_facts(disks=(Disk(("/tmp", "/c"), 0.5),)), FOLDER, "disk", "bad", "0.50 GB free for /tmp, /c", "TMPDIR"),
        (with_facts(disks=(Disk(("/s",), problem="no answer"),)), FOLDER, "disk", "bad", "^no answer$", "TMPDIR"),
        (with_facts(memory_gb=0.3), FOLDER, "memory", "warn", "0.30 GB", "close"),
        (with_facts(shm_gb=0.06), FOLDER, "/dev/shm", "warn", "0.06 GB", "shm-size"),
        (
            with_facts(variables=frozenset({"TESSERA_STORGE"})),
            FOLDER,
            "variables",
            "warn",
            "TESSERA_STORGE",
            "^write TESSERA_STORAGE$",
        ),
        (
            replace(with_facts(gpus=()), ray_gpus=4),
            WITH_GPUS,
            "GPUs",
            "bad",
            "torch sees 0; Ray has 4",
            "CUDA build",
        ),
        (
            replace(with_facts(gpus=("H100", "H100")), ray_gpus=1),
            WITH_GPUS,
            "GPUs",
            "warn",
            "torch sees 2: H100; Ray has 1",
            "--num-gpus=2",
        ),
        (
            replace(with_facts(gpus=(), gpu_problem="libcudart.so: cannot open"), ray_gpus=1),
            WITH_GPUS,
            "GPUs",
            "bad",
            "libcudart",
            "torch",
        ),
    ],
)
def test_a_sick_node_gets_one_row_that_says_what_and_what_to_do(node, demands, what, verdict, found, todo):
    (row,) = of(examine(DRIVER, [node], demands), node)
    assert (row.what, row.verdict) == (what, verdict)
    assert re.search(found, row.found)
    assert re.search(todo, row.todo)


@pytest.mark.parametrize(
    "node",
    [
        with_versions(prefect=health.MISSING),
        with_versions(torch="2.13.0+cu130"),
        with_versions(python="3.11.9"),
        replace(NODE, clock=Clock(8, 4)),  # a slow answer says little
        replace(NODE, clock=None),
        with_facts(variables=frozenset(health.VARIABLES)),
        with_facts(memory_gb=None, shm_gb=None, disks=()),
    ],
)
def test_what_is_no_trouble_is_no_row_with_something_to_do(node):
    assert of(examine(DRIVER, [node], FOLDER)) == []


def test_gpus_that_are_asked_for_must_be_somewhere():
    rows = examine(DRIVER, [with_facts(gpus=())], WITH_GPUS)
    assert [(row.where, row.found) for row in rows if row.verdict is Verdict.BAD] == [
        ("Ray", "Ray has none on any node")
    ]
    head, worker = with_facts(gpus=()), replace(with_facts(gpus=("H100",)), where="10.0.0.3", ray_gpus=1)
    assert of(examine(DRIVER, [head, worker], WITH_GPUS)) == []


def test_the_stores_clock_is_held_against_the_drivers():
    store = replace(WELL.store, shared=None, clock=Clock(-70, 0.6))
    rows = examine(replace(DRIVER, facts=replace(WELL, store=store)), [NODE], FOLDER)
    assert [(r.what, r.where) for r in rows if r.verdict is Verdict.BAD] == [("clock", "store")]


def test_of_keys_only_whether_they_are_set_is_told():
    keys = frozenset({"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"})
    driver = replace(DRIVER, facts=replace(DRIVER.facts, variables=keys))
    (row,) = of(examine(driver, [NODE], S3))
    assert row.found.startswith("AWS_ACCESS_KEY_ID not set, AWS_SECRET_ACCESS_KEY not set")


def test_facts_of_an_older_version_lack_some_and_are_judged_all_the_same():
    facts = Facts(versions=tuple(VERSIONS.items()))
    del facts.__dict__["shm_gb"]  # as pickled where there was no such field
    assert of(examine(DRIVER, [replace(NODE, facts=facts)], FOLDER)) == []


def test_all_variables_that_our_code_reads_are_known():
    read = set()
    for floor in ("infra", "preprocessing", "training", "evaluation", "pipelines"):
        for path in (ROOT / floor).rglob("*.py"):
            if path.name != "health.py":
                read |= {*re.findall(r"\"(TESSERA_[A-Z_]*[A-Z])\"", path.read_text())}
    assert read == {*health.VARIABLES}


def test_no_secret_passes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/somewhere/token")
    said = "no wJalrXUtnFEMI\n at https://me:pass@host/x\nor 0123456789abcdef in /somewhere/token"
    assert masked(said) == "no *** at https://***@host/x or *** in /somewhere/token"


def test_what_does_not_end_is_given_up():
    assert bounded(lambda: 3, 10, "x") == 3
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 // 0, 10, "x")
    with pytest.raises(TesseraError, match=r"^the mount: no answer within 0.1 s$"):
        bounded(lambda: time.sleep(5), 0.1, "the mount")


def test_a_process_knows_itself_and_leaves_nothing_on_the_store(store: Store, tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "not yet" / "there"))
    store.write("mark", b"")
    facts = gather(store.url, "mark", gpus=True, seconds=60)
    assert (facts.store.problem, facts.store.shared) == ("", True)
    assert abs(facts.store.clock.ahead) <= facts.store.clock.within + 1  # one machine, and a busy one
    assert [entry.key for entry in store.list()] == ["mark"]
    assert gather(store.url, "another", gpus=False, seconds=60).store.shared is False
    assert dict(facts.versions).keys() == {"python", "ray", "torch", "numpy", "numba", "prefect"}
    assert facts.gpus is not None
    assert all(disk.free_gb > 0 for disk in facts.disks)
    folders = [folder for disk in facts.disks for folder in disk.folders]
    assert str(tmp_path / "not yet" / "there") in folders
    assert (store.url in folders) == (not store.url.startswith("s3://"))


def test_wrong_keys_are_a_finding_without_the_keys(s3_env, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-right-one")
    facts = gather(f"s3://{s3_env.bucket}/x", None, gpus=False, seconds=60)
    assert "SignatureDoesNotMatch" in facts.store.problem
    assert "set AWS_SECRET_ACCESS_KEY" in facts.store.problem
    assert "not-the-right-one" not in repr(facts)
    again = gather(f"s3://{s3_env.bucket}/x", None, gpus=False, seconds=60)
    assert again.store == facts.store  # equal findings share a row


@pytest.mark.usefixtures("ray_local")
def test_every_node_of_a_real_ray_answers(tmp_path):
    store = open_store(str(tmp_path / "store"))
    store.write("mark", b"")
    (node,) = ray_health.look(store.url, "mark", False, 120)
    assert node.problem == ""
    assert node.facts.store.shared is True
    assert node.facts.versions == gather(store.url, None, False, 60).versions
    assert abs(node.clock.ahead) <= node.clock.within + 1
    assert re.fullmatch(r"nodes 1, CPUs \d+, GPUs \d+", ray_health.summary())


def test_nothing_at_the_address_is_found_at_once():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(TesseraError, match=r"nothing answers at 127.0.0.1:.*refused; start Ray there"):
            ray_health.connected(address, 1).__enter__()


def test_what_listens_and_is_no_ray_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(TesseraError, match="no answer within 3 s; is this machine a node of that cluster"):
            ray_health.connected(address, 3).__enter__()


def test_a_missing_token_is_told(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(TesseraError, match="this user has no token; set RAY_AUTH_MODE=token and give"):
            ray_health.connected(address, 120).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_code_that_another_user_could_write_and_too_few_files_are_told(tmp_path, monkeypatch):
    cache = tmp_path / "numba"
    cache.mkdir(mode=0o700)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(cache))
    facts = gather(str(tmp_path / "store"), None, gpus=False, seconds=60)
    assert facts.code == ((str(cache), ""),)
    cache.chmod(0o777)
    sick = replace(gather(str(tmp_path / "store"), None, gpus=False, seconds=60), files=256)
    rows = {row.what: row for row in health.examine(Place("driver", sick), [], FOLDER)}
    assert rows["compiled code"].verdict == "warn"
    assert "others may write it (mode 777)" in rows["compiled code"].found
    assert rows["open files"].todo.startswith("ulimit -n")
