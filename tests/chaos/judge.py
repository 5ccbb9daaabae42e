"""What a disturbed run lost, and whether it ended as the undisturbed one did."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from safetensors.torch import load

from infra.store import Store
from tests.chaos.cases import EXACT, Case
from tests.chaos.plan import STEPS
from tests.chaos.scene import Event, Mark, Scene, goes_on
from training.metrics import Row, read_metrics
from training.run import WEIGHTS


@dataclass(frozen=True)
class Finished:
    """What a run left on its store."""

    rows: tuple[Row, ...]
    store: Store
    path: str

    @classmethod
    def of(cls, scene: Scene) -> "Finished":
        """The run that a scene's driver told of last. TesseraError if its metrics cannot be read."""
        path = next(e["run"] for e in reversed(scene.events) if "run" in e)
        return cls(read_metrics(scene.store, path), scene.store, path)


@dataclass(frozen=True)
class Outcome:
    """One case, judged."""

    case: Case
    seconds: float
    """Of all of it, the driver's start included."""
    problems: tuple[str, ...]
    """None: green."""
    rows: tuple[Row, ...] = ()
    events: tuple[Event, ...] = ()
    marks: tuple[Mark, ...] = ()
    redone: int = 0
    """Steps that were done twice."""
    away: float = 0.0
    """Seconds from the fault to the first row after it; of a store's outage the longest time between two rows."""
    during: int = 0
    """Steps taken while a fault lasted."""
    losses: float = 0.0
    """Largest difference of any loss of any step from the reference's."""
    weights: float = 0.0
    """Largest difference of any final weight."""


def judge(case: Case, scene: Scene, reference: Finished | None, seconds: float) -> Outcome:
    """Compare with the reference; of the reference itself only that it is whole."""
    found = Finished.of(scene)
    losses, weights = (0.0, 0.0) if reference is None else _differences(found, reference)
    problems = [*_incomplete(found.rows), *_unlike(case, scene, found.rows), *_off(case, scene.marks, found.rows)]
    if max(losses, weights) > case.tolerance:
        problems.append(f"losses differ by {losses:.2g}, weights by {weights:.2g}, allowed {case.tolerance:g}")
    first = [] if reference is None else _after_change(found.rows, reference.rows)
    if first and _largest(first) > EXACT:
        problems.append(f"the first steps with other workers differ by {_largest(first):.2g}: other images?")
    during = [row for row in found.rows for mark in scene.marks if mark.end and mark.time < row.time < mark.end]
    return Outcome(
        case,
        seconds,
        tuple(problems),
        found.rows,
        tuple(scene.events),
        tuple(scene.marks),
        _redone(scene.events),
        _away(case, scene.marks, found.rows),
        len(during),
        losses,
        weights,
    )


def _differences(found: Finished, reference: Finished) -> tuple[float, float]:
    """(largest of any loss at the same step, largest of any weight); nan and what is missing count as infinite."""
    losses = _far(found.rows, reference.rows)
    ours, expected = (load(one.store.read(f"{one.path}/{WEIGHTS}")) for one in (found, reference))
    if ours.keys() != expected.keys():
        return _largest(losses), math.inf
    return _largest(losses), _largest([float((ours[n] - expected[n]).abs().max()) for n in ours])


def _far(rows: Sequence[Row], reference: Sequence[Row]) -> list[float]:
    theirs = {row.step: row.losses for row in reference}
    return [
        abs(row.losses.get(name, math.inf) - value)
        for row in rows
        for name, value in theirs.get(row.step, {"": 0.0}).items()
    ]


def _after_change(rows: Sequence[Row], reference: Sequence[Row]) -> list[float]:
    """Differences of the first steps that another number of workers took: not magnified yet."""
    theirs = {row.step: row.workers for row in reference}
    return _far([row for row in rows if row.workers != theirs.get(row.step)][:3], reference)


def _largest(values: Sequence[float]) -> float:
    return max((math.inf if math.isnan(value) else value for value in values), default=math.inf)


def _incomplete(rows: Sequence[Row]) -> list[str]:
    steps = [row.step for row in rows]
    return [] if steps == list(range(1, STEPS + 1)) else [f"{len(steps)} rows of steps {steps[:1]} to {steps[-1:]}"]


def _unlike(case: Case, scene: Scene, rows: Sequence[Row]) -> list[str]:
    """What did not go as the case says."""
    went_on = [step for step in map(goes_on, scene.events) if step is not None]
    crews = tuple(workers for workers, _ in groupby(row.workers for row in rows))
    nodes = len({worker.node for worker in scene.workers().values()})
    problems = []
    if bool(went_on) != case.restarts:
        problems.append(f"went on from {went_on or 'no checkpoint'}")
    if scene.expected is not None and went_on[:1] != [scene.expected]:
        problems.append(f"went on from {went_on}, expected {scene.expected}")
    if crews != case.crews:
        problems.append(f"worked with {crews} workers, expected {case.crews}")
    if case.nodes is not None and nodes != case.nodes:
        problems.append(f"ended on {nodes} nodes, expected {case.nodes}")
    return problems


def _off(case: Case, marks: Sequence[Mark], rows: Sequence[Row]) -> list[str]:
    """Whether a fault came too late, or before the first step, or not at all."""
    if not marks:
        return [] if case.name == "reference" else ["nothing was done to it"]
    return [
        f"{mark.did}: not in the middle of the run"
        for mark in marks
        if not (0 < mark.step < STEPS and rows and rows[-1].time > mark.time)
    ]


def _redone(events: Sequence[Event]) -> int:
    """Over all restarts: the highest step that was heard of before, less the step that was gone on from."""
    redone, highest = 0, 0
    for event in events:
        step = goes_on(event)
        if step is not None:
            redone, highest = redone + max(0, highest - step), step
        highest = max(highest, event.get("step", 0))
    return redone


def _away(case: Case, marks: Sequence[Mark], rows: Sequence[Row]) -> float:
    if not marks:
        return 0.0
    times = [row.time for row in rows]
    if not case.restarts:
        return max(after - before for before, after in pairwise(times))
    return min((time for time in times if time > marks[0].time), default=math.inf) - marks[0].time
