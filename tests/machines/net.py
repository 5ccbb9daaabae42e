"""Machines on one host: a network namespace each, with own processes, /tmp, shared memory and name. Needs root.

The repository is hidden in all of them, so that what a machine has of our code is what was put there; the virtual
environment with its packages is the same for all, at another place.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from infra import processes
from infra.errors import TesseraError

ROOT = Path(__file__).parents[2]
OWN = Path("/mnt/own")
"""Inside of a machine: its folder on the host."""
_VENV = Path("/mnt/venv")
_BRIDGE, _NETWORK = "tessera-br", "10.77.0"
_SETUP = f"""
set -e
mount -t tmpfs own /mnt
mkdir {OWN} {_VENV}
mount --bind "$1" {OWN}
mount --bind "$2" {_VENV}
mount --bind "$1/tmp" /tmp
mount -t tmpfs -o size=1g shm /dev/shm
mount -t tmpfs hidden "$3"
hostname "$4"
ip link set lo up
echo up > {OWN}/up
exec sleep infinity
"""
_COMMANDS = {"ray": "ray.scripts.scripts", "prefect": "prefect"}  # the venv's scripts name a Python that is hidden


@dataclass
class Machine:
    """One of them."""

    name: str
    address: str
    folder: Path
    """On the host; OWN inside."""
    environ: dict[str, str]
    _init: subprocess.Popen[bytes] = field(repr=False)

    def _entered(self, command: Sequence[str]) -> list[str]:
        first = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()[0]
        inside = ["nsenter", f"--target={first}", "--mount", "--pid", "--uts", "--net", f"--wdns={OWN / 'tessera'}"]
        return [*inside, "env", "--ignore-environment", *(f"{n}={v}" for n, v in self.environ.items()), *command]

    def start(self, log: str, *command: str) -> subprocess.Popen[bytes]:
        """A server that ends with this machine; its output is `<log>.log` in its folder."""
        return processes.start(self._entered(command), os.environ, self.folder, self.folder / f"{log}.log")

    def run(self, *command: str, seconds: float = 300, **environ: str) -> tuple[int, str]:
        """(exit code, output) of a command, as its user would see it."""
        entered = self._entered(["env", *(f"{name}={value}" for name, value in environ.items()), *command])
        done = subprocess.run(entered, capture_output=True, text=True, timeout=seconds)
        return done.returncode, done.stdout + done.stderr

    def cable(self, plugged: bool) -> None:
        """Pull its cable out of the switch, or plug it in: packets are lost, and nobody is told."""
        _sh(f"ip link set {_cable(self.name)} {'up' if plugged else 'down'}")

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes that it has sent and received."""
        counters = Path(f"/sys/class/net/{_cable(self.name)}/statistics")
        return tuple(int((counters / f"{way}_bytes").read_text()) for way in ("rx", "tx"))  # type: ignore[return-value]


@contextmanager
def machines(folder: Path, names: Sequence[str], environ: Mapping[str, str]) -> Iterator[list[Machine]]:
    """So many machines at one switch, at 10.77.0.2 and so on; they know each other by name. Gone on the way out."""
    if os.geteuid() != 0:
        raise TesseraError("network namespaces: expected to be root")
    addresses = {name: f"{_NETWORK}.{number}" for number, name in enumerate(names, 2)}
    hosts = "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **addresses}.items())
    _take_down(names)  # what one left that was killed
    with ExitStack() as stack:
        stack.callback(_take_down, names)
        _sh(f"ip link add {_BRIDGE} type bridge")
        _sh(f"ip addr add {_NETWORK}.1/24 dev {_BRIDGE} && ip link set {_BRIDGE} up")
        yield [_machine(stack, folder / name, name, address, hosts, environ) for name, address in addresses.items()]


def _machine(
    stack: ExitStack, folder: Path, name: str, address: str, hosts: str, environ: Mapping[str, str]
) -> Machine:
    for part in ("tmp", "home", "bin", "tessera"):
        (folder / part).mkdir(parents=True)
    for command, module in _COMMANDS.items():
        script = folder / "bin" / command
        script.write_text(f'#!/bin/sh\nexec {_VENV}/bin/python -m {module} "$@"\n')
        script.chmod(0o755)
    space, cable = _space(name), _cable(name)
    _sh(f"ip netns add {space}")
    _hosts(name).parent.mkdir(parents=True)
    _hosts(name).write_text(hosts)
    _sh(f"ip link add {cable} type veth peer name eth0 netns {space}")
    _sh(f"ip link set {cable} master {_BRIDGE} up")
    _sh(f"ip -n {space} addr add {address}/24 dev eth0 && ip -n {space} link set eth0 up")
    command = ["ip", "netns", "exec", space, "unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child"]
    command += ["--mount-proc", "bash", "-c", _SETUP, "setup", str(folder), sys.prefix, str(ROOT), name]
    init = processes.start(command, os.environ, folder, folder / "init.log")
    stack.callback(processes.stop, init)
    end = time.monotonic() + 10
    while not (folder / "up").exists():
        if init.poll() is not None or time.monotonic() > end:
            raise TesseraError(f"machine {name} did not start: {(folder / 'init.log').read_text()}")
        time.sleep(0.05)
    path = f"{OWN}/bin:{_VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    own = {"PATH": path, "HOME": str(OWN / "home"), "LANG": "C.UTF-8"}
    return Machine(name, address, folder, own | dict(environ), init)


def _take_down(names: Sequence[str]) -> None:
    """All that is there of the network."""
    for name in names:
        # the cable by itself: a namespace goes when its last process has, which can take a while
        for thing, kind in ((_cable(name), "link"), (_space(name), "netns")):
            if _there(thing, kind):
                ends = "" if kind == "link" else f"ip netns pids {thing} | xargs --no-run-if-empty kill -KILL; "
                _sh(f"{ends}ip {kind} del {thing}")
        shutil.rmtree(_hosts(name).parent, ignore_errors=True)
    if _there(_BRIDGE, "link"):
        _sh(f"ip link del {_BRIDGE}")


def _there(thing: str, kind: str) -> bool:
    return (Path("/sys/class/net" if kind == "link" else "/run/netns") / thing).exists()


def _cable(name: str) -> str:
    return f"tessera-{name}"


def _space(name: str) -> str:
    return f"tessera-{name}"


def _hosts(name: str) -> Path:
    """What `ip netns exec` binds over /etc/hosts."""
    return Path("/etc/netns", _space(name), "hosts")


def _sh(command: str) -> None:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    if done.returncode:
        raise TesseraError(f"{command}: {done.stderr.strip()}")


def put_code(machine: Machine) -> None:
    """Our code as it is in the repository now, without what git does not know or ignores."""
    root, there = shlex.quote(str(ROOT)), shlex.quote(str(machine.folder / "tessera"))
    listed = f"git -C {root} ls-files --cached --others --exclude-standard -z"
    packed = f"tar --directory {root} --null --files-from=- --create"
    _sh(f"{listed} | {packed} | tar --extract --directory {there}")
