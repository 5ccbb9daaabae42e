"""The doctor, where all is well and where something is broken, for real: what it says, and that it says it there."""

import re
import subprocess
import sys
from pathlib import Path

from infra.errors import TesseraError
from tests.day.chronicle import Chronicle
from tests.machines.net import OWN, put_code
from tests.machines.stage import Stage, keys
from tests.support.waiting import until

_NUMPY = "2.4.5"  # not the pinned one
_NODES = "import ray; ray.init('auto', log_to_driver=False); print(*[n['NodeID'] for n in ray.nodes() if n['Alive']])"
_FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


def play(stage: Stage, tell: Chronicle) -> None:
    """One thing is broken at a time."""
    first, second, third = stage.first, stage.second, stage.third
    head = f"{first.name}:6379"
    _look(stage, tell, "well", "", good=True)
    _look(stage, tell, "no token", "no token", RAY_AUTH_TOKEN="", TESSERA_RAY=head)
    _look(stage, tell, "another token", "InvalidAuthToken", RAY_AUTH_TOKEN="0" * 64)
    _look(stage, tell, "store not writable", "bad store ", **keys(stage, "reader"))
    second.run("bash", "-c", f"mkdir {OWN}/full && mount -t tmpfs -o size=16m full {OWN}/full")
    Path(first.folder, "full").mkdir(exist_ok=True)
    _look(stage, tell, "no space", f"bad disk {second.address} 0.02 GB free", TESSERA_CACHE=f"{OWN}/full")
    other = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(second.folder / "other")]
    subprocess.run([*other, f"numpy=={_NUMPY}"], check=True, capture_output=True)
    _restart(stage, f"export PYTHONPATH={OWN}/other")
    _look(stage, tell, "another version", f"bad versions {second.address} numpy {_NUMPY}, the driver has")
    if _FAKETIME.exists():
        _restart(stage, f"export LD_PRELOAD={_FAKETIME} FAKETIME=+100s")
        _look(stage, tell, "wrong clock", f"bad clock {second.address} ")
    else:
        tell.note("a wrong clock was not tried: no libfaketime (Debian's package faketime)")
    _restart(stage, "")
    put_code(third)
    with tell.chapter("doctor: on a machine that is no node"):
        code, told = stage.doctor(third, "no node", **first.environ)
        tell.expect(code == 1 and f"ray start --address={head}" in told, told)


def _look(stage: Stage, tell: Chronicle, name: str, expected: str, good: bool = False, **environ: str) -> None:
    with tell.chapter(f"doctor: {name}"):
        code, told = stage.doctor(stage.first, name, **environ)
        tell.expect(code == int(not good) and expected in told, told)


def _restart(stage: Stage, environ: str) -> None:
    """Ray on the second machine, with this environment."""
    second = stage.second
    (second.folder / "node.env").write_text(environ)

    def nodes() -> set[str]:
        code, told = stage.first.run("python", "-c", _NODES)
        if code:
            raise TesseraError(told)
        return {*re.findall(r"\b[0-9a-f]{56}\b", told)}

    before = nodes()
    second.run("ray", "stop", "--force")
    until(lambda: len(now := nodes()) == 2 and now != before, 120, "the node")
