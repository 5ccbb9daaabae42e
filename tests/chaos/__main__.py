"""`make chaos`: kill what training stands on, one part after the other, and see that it ends as if nothing had been.

`python -m tests.chaos [--out FOLDER] [CASE ...]` runs the reference and these cases, or all. Real parts on this one
machine: a SeaweedFS server, a Ray cluster of three nodes, training workers, a driver that is a process of its own.
Exit code 1 if a run did not survive, or did not end as the undisturbed one did.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from infra.errors import TesseraError
from tests.chaos import report
from tests.chaos.cases import CASES, Case
from tests.chaos.judge import Finished, Outcome, judge
from tests.chaos.machine import Machine, machine
from tests.chaos.plan import Job
from tests.chaos.scene import Scene

_STARTED = time.monotonic()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, write it and the picture."""
    names = [case.name for case in CASES[1:]]
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(".tessera/chaos"), help="folder of chaos.md and chaos.png")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(names)}; none: all")
    given = parser.parse_args(arguments)
    if unknown := set(given.cases) - set(names):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [CASES[0], *(case for case in CASES[1:] if not given.cases or case.name in given.cases)]
    with tempfile.TemporaryDirectory(prefix="tessera-chaos-") as folder, machine(Path(folder)) as parts:
        outcomes = _run_all(chosen, parts, given.out)
    sys.stdout.write("\n" + report.table(outcomes) + "\n")
    sys.stdout.write(f"{given.out}/chaos.md and chaos.png, after {time.monotonic() - _STARTED:.0f} s\n")
    return int(any(outcome.problems for outcome in outcomes))


def _run_all(cases: Sequence[Case], parts: Machine, out: Path) -> list[Outcome]:
    outcomes: list[Outcome] = []
    reference: Finished | None = None
    for case in cases:
        _say(case, case.title)
        scene, began = _scene(case, parts), time.monotonic()
        try:
            _play(case, scene, reference)
            outcomes.append(judge(case, scene, reference, time.monotonic() - began))
        except TesseraError as error:
            events, marks = tuple(scene.events), tuple(scene.marks)
            outcomes.append(Outcome(case, time.monotonic() - began, (str(error),), events=events, marks=marks))
        problems = "; ".join(outcomes[-1].problems)
        _say(case, f"RED: {problems}" if problems else "green")
        report.write(out, outcomes)
        if reference is None:
            if problems:
                break
            reference = Finished.of(scene)
    return outcomes


def _scene(case: Case, parts: Machine) -> Scene:
    store, folder = parts.store(case.name), parts.folder / case.name
    where = str(folder / "workers")
    job = Job(parts.address, store.url, str(parts.data), where, 2, case.least)
    environ = {name: value.format(folder=folder) for name, value in case.environ.items()}
    return Scene(case.name, parts, job, store, environ, lambda line: _say(case, line))


def _play(case: Case, scene: Scene, reference: Finished | None) -> None:
    scene.machine.arrange(case.cpus, case.least is not None)
    if reference is not None:  # precompute is no part of this: its shards are taken over
        for entry in reference.store.list("precompute/"):
            scene.store.write(entry.key, reference.store.read(entry.key))
    scene.start()
    try:
        scene.until(lambda: scene.step >= case.at)
        case.strike(scene)
        scene.until_end()
    finally:
        scene.stop()


def _say(case: Case, line: str) -> None:
    sys.stdout.write(f"{time.monotonic() - _STARTED:5.0f} s  {case.name}: {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
