"""What a local Ray and a training on it open to others: as docs/security.md has it; a Ray that does not start."""

import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra import ray_local
from infra.errors import TesseraError

ROOT = Path(__file__).parents[2]
TRAINING = """
import os, sys, psutil, torch, ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from infra import ray_cluster
from training.ray_group import torch_config

def worker(config):
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total == 2
    looked = []
    if torch.distributed.get_rank() == 0:
        with open(config["driver"] + "/listening", "w") as file:
            file.writelines(line + "\\n" for line in listening(config["pid"]))
    torch.distributed.barrier()

def listening(pid):
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        for found in process.net_connections("inet"):
            if found.status == psutil.CONN_LISTEN:
                yield f"{found.laddr.ip} {process.name()}"

folder = sys.argv[1]
with ray_cluster.session("local", cpus=2):
    TorchTrainer(
        worker,
        train_loop_config={"driver": folder, "pid": os.getpid()},
        scaling_config=ScalingConfig(num_workers=2),
        torch_config=torch_config("gloo", folder),
        run_config=RunConfig(storage_path=folder),
    ).fit()
    with open(folder + "/token", "w") as file:
        file.write(os.environ["RAY_AUTH_TOKEN"])
"""


@pytest.fixture
def short_folder() -> Iterator[str]:
    """Sockets' paths may have 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield folder


@pytest.mark.slow
def test_a_local_training_listens_where_the_table_says_and_nobody_else_may_look(tmp_path: Path, short_folder: str):
    (row,) = re.findall(r"(?m)^\| Ray, `local` \| ([\d.]+)", (ROOT / "docs" / "security.md").read_text())
    base = Path(short_folder)
    base.chmod(0o755)
    env = os.environ | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(base), "HOME": str(tmp_path)}
    env = {name: value for name, value in env.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", TRAINING, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in (tmp_path / "listening").read_text().splitlines()]
    names = {name for _, name in lines}
    assert {address.removeprefix("::ffff:") for address, _ in lines} == {row}, lines
    assert {"gcs_server", "raylet"} < names
    assert sum(name.startswith("ray::") for name in names) >= 2  # agents and workers
    (own,) = base.iterdir()
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert not (tmp_path / ".ray").exists()  # Ray's token is in memory alone
    token = (tmp_path / "token").read_text().encode()
    assert not [path for path in own.rglob("*") if path.is_file() and token in path.read_bytes()]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    return Path("/tmp")


def test_a_long_path_is_told_before_ray_meets_it(short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    long = tmp_path / "slurm_jobdir" / ("1355700" * 12)
    long.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(long))
    with pytest.raises(
        TesseraError, match=r"too long for a socket .*; set TMPDIR or RAY_TMPDIR to a folder with a shorter"
    ):
        ray_local.start()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # Ray's sockets are short then, those of loader processes are not
    with pytest.raises(TesseraError, match=r"listener-\d+ is too long for a socket .*; set TMPDIR to"):
        ray_local.start()


@pytest.mark.parametrize("how", ["not there", "a file", "a link", "open"])
def test_a_folder_for_ray_that_is_not_ours_alone(how: str, short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = tmp_path / f"ray-{os.getuid()}"
    match how:
        case "not there":
            tmp_path = Path("/proc/none")
        case "a file":
            own.touch()
        case "a link":
            own.symlink_to("/tmp")
        case _:
            own.mkdir()
            own.chmod(0o777)
    monkeypatch.setattr(ray_local, "_SOCKET_BYTES", 1000)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(TesseraError, match=r"Ray cannot keep its files: .*; set RAY_TMPDIR to a folder of your own"):
        ray_local.start()


class Init:
    """Stands for ray.init: raises what it is given, one after the other."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.asked = [*errors], 0

    def __call__(self, **_: object) -> None:
        self.asked += 1
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
        if self.errors:
            raise self.errors.pop(0)


SLOW = Exception("The current node timed out during startup.")  # Ray raises just this


@pytest.mark.parametrize(
    ("errors", "tries", "told"),
    [
        ([SLOW, SLOW], 3, ""),
        ([SLOW, ConnectionError("x"), RuntimeError("y")], 3, r"y \(tried 3 times\); is the machine very busy"),
        ([OSError(24, "Too many open files")], 1, r"Too many open files; allow more open files \(ulimit -n 65536\)"),
        ([BlockingIOError(11, "Resource temporarily unavailable")], 1, r"allow more processes \(ulimit -u\)"),
        ([OSError(28, "No space left on device")], 1, "free some space there, or set RAY_TMPDIR"),
        ([PermissionError(13, "Permission denied")], 1, "make .* writable, or set RAY_TMPDIR"),
    ],
)
def test_a_ray_that_does_not_start_is_tried_again_where_that_may_help(
    errors: list[Exception], tries: int, told: str, short, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(ray_local.ray, "init", init := Init(*errors))
    monkeypatch.setattr(ray_local, "_clear", lambda *_: None)  # another test's Ray may be there
    before = dict(os.environ)
    if told:
        with pytest.raises(TesseraError, match=f"^Ray did not start on this machine: .*{told}"):
            ray_local.start()
    else:
        ray_local.start()
    assert init.asked == tries
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    assert kept == {name: value for name, value in before.items() if not name.startswith("RAY_AUTH")}


def test_what_a_failed_start_left_is_ended_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_local.ray, "shutdown", lambda: None)
    before = {*psutil.Process().children(recursive=True)}
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    rays, other = subprocess.Popen([*sleep, str(tmp_path)]), subprocess.Popen(sleep)
    try:
        ray_local._clear(before, str(tmp_path))
        assert rays.wait(10) == -9
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
