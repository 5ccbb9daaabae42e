"""What an installation must have, as rows: facts of the driver and of Ray's nodes in, what to do out.

Pure, so that sick nodes can be made up; infra.ray_health gathers the facts. Each fact has a default, because a node may
run another version of this module, and what it leaves out is no reason to fail. Names of variables are facts, their
values never.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

MISSING = "missing"  # the version of a package that is not installed
VARIABLES = ("TESSERA_CACHE", "TESSERA_CACHE_GB", "TESSERA_RAY", "TESSERA_STORAGE", "TESSERA_STORE_PATIENCE")
_CLOCK_WARN, _CLOCK_BAD = 5.0, 60.0  # seconds; S3 refuses signatures of 15 minutes ago
_LEAST_MEMORY_GB, _LEAST_SHM_GB = 1.0, 0.25  # Ray keeps 0.2 GB there, and loader processes their batches
_LEAST_FILES = 4096  # Ray's own bound for a warning
_NTP = "set the clock that is wrong (chrony, systemd-timesyncd): S3 refuses requests that are 15 min off"


class Verdict(StrEnum):
    """bad: work will fail; warn: it may."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True)
class Row:
    """One check at one or several places."""

    what: str
    where: str
    verdict: Verdict
    found: str
    todo: str = ""


@dataclass(frozen=True)
class Demands:
    """What the installation is to be used for."""

    storage: str
    gpus: bool
    least_free_gb: float


@dataclass(frozen=True)
class Clock:
    """How many seconds a clock is ahead of another one, give or take `within`."""

    ahead: float
    within: float


@dataclass(frozen=True)
class StoreFacts:
    """problem: why it cannot be used, else empty; seconds: 1 MiB written and read; shared: the driver's mark is there,
    None where the driver left none; clock: the store's against this process'."""

    problem: str = ""
    seconds: float = 0.0
    shared: bool | None = None
    clock: Clock | None = None


@dataclass(frozen=True)
class Disk:
    """Folders on one file system and the GB that are free there; problem: why nobody knows."""

    folders: tuple[str, ...]
    free_gb: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class Facts:
    """What one process finds. variables: names of those set that matter here; gpus: names as torch has them, None where
    nobody asked; gpu_problem: why torch could not tell."""

    versions: tuple[tuple[str, str], ...] = ()
    variables: frozenset[str] = frozenset()
    store: StoreFacts = StoreFacts()
    disks: tuple[Disk, ...] = ()
    memory_gb: float | None = None
    shm_gb: float | None = None
    gpus: tuple[str, ...] | None = None
    gpu_problem: str = ""
    code: tuple[tuple[str, str], ...] = ()
    """Folders whose files are run, and why another user could put some there; empty: none could."""
    files: int | None = None
    """How many files a process may have open at most; None: any number."""


@dataclass(frozen=True)
class Place:
    """The driver or a node. problem: why there are no facts; clock: its own against the driver's."""

    where: str
    facts: Facts | None = None
    problem: str = ""
    clock: Clock | None = None
    ray_gpus: float = 0.0


def examine(driver: Place, nodes: Sequence[Place], demands: Demands) -> list[Row]:
    """All that follows from the facts; places with the same finding share a row."""
    places = [driver, *nodes]
    rows = [*_answers(nodes), *_versions(driver, nodes), *_stores(places, demands), *_clocks(driver, nodes)]
    rows += [*_gpus(nodes, demands.gpus), *_disks(places, demands), *_memory(places), *_processes(places)]
    rows += _variables(places, demands)
    return list(merged(rows))


def merged(rows: Iterable[Row]) -> Iterator[Row]:
    """One row for all places that differ in nothing else, where the first of them stood."""
    where: dict[tuple[str, Verdict, str, str], list[str]] = {}
    for row in rows:
        where.setdefault((row.what, row.verdict, row.found, row.todo), []).append(row.where)
    for (what, verdict, found, todo), places in where.items():
        shown = ", ".join(places) if len(places) <= 3 else f"{places[0]} and {len(places) - 1} more"
        yield Row(what, shown, verdict, found, todo)


def _known(places: Iterable[Place]) -> Iterator[tuple[str, Facts]]:
    return ((place.where, place.facts) for place in places if place.facts is not None)


def _answers(nodes: Sequence[Place]) -> Iterator[Row]:
    for node in nodes:
        if node.facts is None:
            todo = "see `ray status` and that node's logs; open all ports between the machines; restart Ray there"
            if "No module named" in node.problem:
                todo = "install the packages of constraints.txt where that node's Ray runs, and restart Ray there"
            yield Row("node", node.where, Verdict.BAD, node.problem, todo)


def _versions(driver: Place, nodes: Sequence[Place]) -> Iterator[Row]:
    ours = dict(driver.facts.versions) if driver.facts else {}
    yield Row("versions", driver.where, Verdict.OK, _told(ours))
    for where, facts in _known(nodes):
        theirs = dict.fromkeys(ours, MISSING) | dict(facts.versions)
        differ = [name for name in ours if not _agree(name, ours[name], theirs[name])]
        if not differ:
            yield Row("versions", where, Verdict.OK, _told(theirs))
            continue
        found = "; ".join(f"{name} {theirs[name]}, the driver has {ours[name]}" for name in differ)
        todo = "install the driver's versions (constraints.txt) there, and restart Ray on that node"
        yield Row("versions", where, Verdict.BAD, found, todo)


def _told(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _agree(name: str, ours: str, theirs: str) -> bool:
    """Tessera's own code is not among them: it travels with each run."""
    if name == "prefect" and theirs == MISSING:  # flows run in the driver alone
        return True
    if name == "python":  # by minor: Ray itself refuses what it minds of the rest
        return ours.split(".")[:2] == theirs.split(".")[:2]
    return ours.partition("+")[0] == theirs.partition("+")[0]  # torch 2.13.0+cpu here, 2.13.0+cu130 there


def _stores(places: Sequence[Place], demands: Demands) -> Iterator[Row]:
    for where, facts in _known(places):
        store = facts.store
        if store.problem:
            found, _, todo = store.problem.partition("; ")
            if "RequestTimeTooSkewed" in found:
                todo = _NTP
            else:
                todo = todo or "see that this place has a route to the store, and AWS_* as the driver has"
            yield Row("store", where, Verdict.BAD, found, todo)
        elif store.shared is False:
            found = f"{demands.storage} is another one there: what the driver has written is missing"
            todo = "mount the same folder on all machines, or use s3://; with s3://, see AWS_ENDPOINT_URL there"
            yield Row("store", where, Verdict.BAD, found, todo)
        else:
            found = f"{demands.storage}: written, read, listed, deleted; keeps what it is asked to keep"
            yield Row("store", where, Verdict.OK, found)
            yield Row("store's pace", where, Verdict.OK, f"{store.seconds:.2f} s to write 1 MiB and read it again")


def _clocks(driver: Place, nodes: Sequence[Place]) -> Iterator[Row]:
    for node in nodes:
        if node.clock is not None:
            yield _clock(node.where, node.clock)
    if driver.facts is not None and driver.facts.store.clock is not None:
        yield _clock("store", driver.facts.store.clock)


def _clock(where: str, clock: Clock) -> Row:
    surely = max(0.0, abs(clock.ahead) - clock.within)
    if surely <= _CLOCK_WARN:
        return Row("clock", where, Verdict.OK, f"within {_CLOCK_WARN:g} s of the driver's")
    found = f"{abs(clock.ahead):.0f} s {'ahead of' if clock.ahead > 0 else 'behind'} the driver's"
    return Row("clock", where, Verdict.BAD if surely > _CLOCK_BAD else Verdict.WARN, found, _NTP)


def _gpus(nodes: Sequence[Place], asked: bool) -> Iterator[Row]:
    total = sum(node.ray_gpus for node in nodes)
    if not asked:
        if nodes:
            yield Row("GPUs", "Ray", Verdict.OK, f"Ray has {total:g}; none are asked for (gpus: false)")
        return
    if nodes and total == 0:
        todo = "start Ray on a machine with GPUs (`nvidia-smi` lists them there), or leave `gpus` false"
        yield Row("GPUs", "Ray", Verdict.BAD, "Ray has none on any node", todo)
    for node in nodes:
        if node.facts is not None and node.facts.gpus is not None:
            yield _gpu(node, node.facts.gpus, node.facts.gpu_problem)


def _gpu(node: Place, names: tuple[str, ...], problem: str) -> Row:
    torch = f"torch sees {len(names)}{': ' if names else ''}{', '.join(dict.fromkeys(names))}"
    found = f"{torch}; Ray has {node.ray_gpus:g}"
    if problem:
        return Row("GPUs", node.where, Verdict.BAD, problem, "repair that node's torch")
    if len(names) < node.ray_gpus:
        todo = "install the driver of its GPUs and torch's CUDA build there; see CUDA_VISIBLE_DEVICES"
        return Row("GPUs", node.where, Verdict.BAD, found, todo)
    if len(names) > node.ray_gpus:
        todo = f"restart Ray there with --num-gpus={len(names)}, unless that node is to take no such work"
        return Row("GPUs", node.where, Verdict.WARN, found, todo)
    return Row("GPUs", node.where, Verdict.OK, found)


def _disks(places: Sequence[Place], demands: Demands) -> Iterator[Row]:
    for where, facts in _known(places):
        for disk in facts.disks:
            folders = ", ".join(disk.folders)
            found = disk.problem or f"{disk.free_gb:.0f} GB free for {folders}"
            if not disk.problem and disk.free_gb >= demands.least_free_gb:
                yield Row("disk", where, Verdict.OK, found)
                continue
            if not disk.problem:
                found = f"{disk.free_gb:.2f} GB free for {folders}, at least {demands.least_free_gb:g} expected"
            todo = "free some space there, or set TMPDIR, TESSERA_CACHE or the storage to another disk"
            yield Row("disk", where, Verdict.BAD, found, todo)


def _memory(places: Sequence[Place]) -> Iterator[Row]:
    for where, facts in _known(places):
        if facts.memory_gb is not None:
            todo = "close other programs, or take another machine"
            yield _room("memory", where, facts.memory_gb, _LEAST_MEMORY_GB, todo)
        if facts.shm_gb is not None:
            yield _room("/dev/shm", where, facts.shm_gb, _LEAST_SHM_GB, "enlarge it (docker --shm-size)")


def _processes(places: Sequence[Place]) -> Iterator[Row]:
    for where, facts in _known(places):
        if facts.files is not None and facts.files < _LEAST_FILES:
            found = f"{facts.files} a process, at least {_LEAST_FILES} expected"
            yield Row("open files", where, Verdict.WARN, found, f"ulimit -n {_LEAST_FILES}, before Ray starts there")
        for folder, problem in facts.code:
            found = f"{folder}: {problem}" if problem else f"{folder}: ours alone"
            todo = (
                "chmod go-w, or set NUMBA_CACHE_DIR to a folder of this user's: what lies there is run"
                if problem
                else ""
            )
            yield Row("compiled code", where, Verdict.WARN if problem else Verdict.OK, found, todo)


def _room(what: str, where: str, free: float, least: float, todo: str) -> Row:
    if free < least:
        return Row(what, where, Verdict.WARN, f"{free:.2f} GB free, at least {least:g} expected", todo)
    return Row(what, where, Verdict.OK, f"{free:.0f} GB free" if free >= 1 else f"{free:.1f} GB free")


def _variables(places: Sequence[Place], demands: Demands) -> Iterator[Row]:
    for where, facts in _known(places):
        for name in sorted(facts.variables):
            if name.startswith("TESSERA_") and name not in VARIABLES:
                near = difflib.get_close_matches(name, VARIABLES, 1)
                todo = f"write {near[0]}" if near else f"unset it; there are {', '.join(VARIABLES)}"
                yield Row("variables", where, Verdict.WARN, f"{name} is set, and nothing reads it", todo)
        if demands.storage.startswith("s3://"):
            yield _keys(where, facts.variables)


def _keys(where: str, names: frozenset[str]) -> Row:
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    found = ", ".join(f"{n} {'set' if n in names else 'not set'}" for n in (*keys, "AWS_ENDPOINT_URL", "AWS_REGION"))
    if names.issuperset(keys):
        return Row("variables", where, Verdict.OK, found)
    return Row("variables", where, Verdict.WARN, found, "set both keys, unless a profile or a role of the machine does")
