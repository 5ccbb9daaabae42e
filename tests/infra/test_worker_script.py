"""infra/cluster/worker: a node of Ray and a Prefect worker, which start in their order and end together."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import cluster_files as files
from tests.support.cluster_files import FOLDER, ROOT

SCRIPT = (FOLDER / "worker").read_text()


def shell_problems(script: str) -> list[str]:
    parsed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    return [*parsed.stderr.splitlines(), *files.run("shellcheck", "-", stdin=script).stdout.splitlines()]


def test_the_workers_script_is_sound():
    assert shell_problems(SCRIPT) == []
    assert os.access(FOLDER / "worker", os.X_OK)


@pytest.mark.parametrize(
    ("old", "new", "words"), [("done\n", "\n", "syntax error"), ('"$RAY_HEAD"', "$RAY_HEAD", "SC2086")]
)
def test_a_bad_script_is_seen(old: str, new: str, words: str):
    assert words in "\n".join(shell_problems(SCRIPT.replace(old, new)))


STANDIN = r"""#!/bin/bash
given=$(tr '\0' '\n' < /proc/$$/environ | sed -n s/^PWD=//p)
echo "$given $(basename "$0") $*" >> {folder}/calls
case "$(basename "$0") $1 $2" in
    "ray start "*) echo $$ > {folder}/pid-ray; touch {folder}/ray_current_cluster; exec sleep {ray} ;;
    "prefect worker start") echo $$ > {folder}/pid-worker; exec sleep {worker} ;;
esac
"""


def started(folder: Path, **seconds: str) -> subprocess.Popen[bytes]:
    """The worker's script with a Ray and a Prefect that live so long and write down how they were called."""
    for name in ("ray", "prefect"):
        (folder / name).write_text(STANDIN.format(folder=folder, **seconds))
        (folder / name).chmod(0o755)
    script = SCRIPT.replace("/tmp/ray/", f"{folder}/")  # another Ray's file is not ours to delete
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "RAY_HEAD": "head:6379"}
    return subprocess.Popen(["bash", "-c", script], env=env, cwd=ROOT, stderr=subprocess.DEVNULL)


def alive(folder: Path) -> list[str]:
    pids = {path.name: path.read_text().strip() for path in folder.glob("pid-*")}
    return [name for name, pid in pids.items() if Path("/proc", pid).exists()]


@pytest.mark.parametrize(
    "seconds", [("0", "60"), ("60", "0"), ("60", "?")], ids=["Ray ends", "Prefect ends", "Prefect fails"]
)
def test_the_workers_script_deploys_from_its_folder_and_ends_with_either(seconds: tuple[str, str], tmp_path: Path):
    assert started(tmp_path, ray=seconds[0], worker=seconds[1]).wait(60) == 1
    assert alive(tmp_path) == []
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (
        f"{ROOT} ray start --block --address=head:6379 --num-cpus=0 --num-gpus=0 --object-store-memory=209715200"
        in calls
    )
    if seconds[0] != "0":
        assert f"{ROOT} prefect deploy --all" in calls  # runs start in $PWD: prefect.yaml


def test_the_workers_script_is_ended_with_all_it_started(tmp_path: Path):
    script = started(tmp_path, ray="60", worker="60")
    while not (tmp_path / "pid-worker").exists():
        assert script.poll() is None
        time.sleep(0.1)
    script.terminate()
    assert script.wait(60) == 143
    assert alive(tmp_path) == []
