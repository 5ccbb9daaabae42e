"""The day: trained in the morning, three arrivals of data, a roll-back, a race."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from evaluation.champion import Champion, history
from preprocessing.inbox import Decision, decisions
from tests.day import data
from tests.day.chronicle import Chronicle
from tests.day.stage import Run, Stage
from tests.support.waiting import until

_RETRAIN = {"epochs": 4, "lr_share": 0.5}
_FLOW = """
from pipelines.retrain import retrain
from pipelines.retrain_job import Retrain
state = retrain(Retrain.model_validate_json({job!r}), return_state=True)
print("STATE", state.name, state.message, flush=True)
"""


def play(stage: Stage, tell: Chronicle) -> None:
    """All chapters; what goes wrong in one is noted, and the next one is tried."""
    for chapter in (_morning, _nothing, _good, _bad, _misleading, _withdrawn, _back, _race):
        chapter(stage, tell)


def _morning(stage: Stage, tell: Chronicle) -> None:
    with tell.chapter("train-coco, and the first champion"):
        folder = data.base(stage.folder / "base", 300, 150)
        run = stage.wait(stage.start("train-coco/train-coco", {"data": str(folder), "recipe": "demo"}))
        tell.expect(run["state_name"] == "Completed", f"train-coco ended as {run['state_name']}")
        evaluations = [e.key for e in stage.store.list("evaluate/") if e.key.endswith("/manifest.json")]
        tell.expect(len(evaluations) == 1, "one evaluation is on the store")
        url = stage.store.url_for(evaluations[0].removesuffix("/manifest.json"))
        told = stage.command("python", "-m", "pipelines.champion", "--set", url)
        tell.note(f"pipelines.champion --set: {told.strip()}")
        stage.command("prefect", "deploy", "--name", "retrain", "--param", f"job={json.dumps(_RETRAIN)}")


def _nothing(stage: Stage, tell: Chronicle) -> None:
    with tell.chapter("nothing arrived: a scheduled run"):
        before = {run["id"] for run in stage.runs()}
        with stage.scheduled("retrain/retrain", 60):
            found = _next_run(stage, before)
        tell.expect(found["auto_scheduled"], f"the schedule made run {found['name']}")
        _ended(tell, found, "NothingNew")
        for run in stage.runs():  # what the schedule had made in advance
            stage.wait(run["id"])


def _good(stage: Stage, tell: Chronicle) -> None:
    with tell.chapter("good data arrive: an event, a promotion, and a run that overlaps"):
        folder = data.arrival(stage.folder / "monday", 10_000, 600)
        before, head = {run["id"] for run in stage.runs()}, _head(stage)
        told = stage.command("python", "-m", "pipelines.upload", str(folder))
        tell.note(f"pipelines.upload: {next(line for line in told.splitlines() if line.endswith('samples'))}")
        until(lambda: [r for r in stage.runs() if r["id"] not in before], 120, "the event's flow run")
        until(lambda: [*stage.store.list("uploads/")], 300, "the decision on the upload")
        second = stage.start("retrain/retrain")
        until(lambda: stage.run(second)["state_name"] not in ("Scheduled", "Pending"), 60, "the second run's turn")
        tell.expect(stage.run(second)["state_name"] == "AwaitingConcurrencySlot", "a run that overlaps waits")
        first = _next_run(stage, {*before, second})
        tell.expect(first["state_name"] == "Promoted", f"the event's run: {_told(first)}")
        tell.expect(_head(stage).number == head.number + 1, f"champion {_head(stage)}")
        _ended(tell, stage.wait(second), "NothingNew")


def _bad(stage: Stage, tell: Chronicle) -> None:
    with tell.chapter("bad data arrive: every third image is cut short"):
        folder = data.damage(data.arrival(stage.folder / "tuesday", 20_000, 90), 3)
        _upload_and_wait(stage, tell, folder, "NothingNew")
        decision = _decision(stage, "tuesday")
        tell.expect(
            decision.state == "quarantined", f"quarantined: {len(decision.rejected)} images named in its report"
        )
        report = decision.report or ""
        tell.expect(b"200" in stage.store.read(report), f"report {report}")
        (stage.folder / "quarantine.html").write_bytes(stage.store.read(report))


def _misleading(stage: Stage, tell: Chronicle) -> None:
    with tell.chapter("data arrive that look right and teach wrong: a refusal"):
        # More than all the right ones: of fewer, a challenger that trains longer may learn and still gain.
        folder = data.mislead(data.arrival(stage.folder / "wednesday", 30_000, 1500))
        head = _head(stage)
        _upload_and_wait(stage, tell, folder, "Refused")
        tell.expect(_head(stage) == head, f"the champion is the same, {head.number}")
        pages = [entry.key for entry in stage.store.list("retrain/") if entry.key.endswith("compare.html")]
        tell.expect(len(pages) == 2, f"comparisons: {', '.join(pages)}")


def _withdrawn(stage: Stage, tell: Chronicle) -> None:
    with tell.chapter("the misleading upload is withdrawn"):
        told = stage.command("python", "-m", "pipelines.inbox", "--withdraw", "wednesday")
        tell.note(f"pipelines.inbox --withdraw: {next(line for line in told.splitlines() if 'wednesday' in line)}")
        _ended(tell, stage.wait(stage.start("retrain/retrain")), "NothingNew")


def _back(stage: Stage, tell: Chronicle) -> None:
    with tell.chapter("a roll-back"):
        head = _head(stage)
        told = stage.command("python", "-m", "pipelines.champion", "--back")
        tell.note(f"pipelines.champion --back:\n{told.rstrip()}")
        entries = history(stage.store)
        tell.expect(entries[-1].number == head.number + 1, "the roll-back is an entry of its own")
        tell.expect(entries[-1].run == entries[0].run, "the first run is champion again")
        _ended(tell, stage.wait(stage.start("retrain/retrain")), "NothingNew")
        tell.expect(_head(stage) == entries[-1], "the next run did not undo it")


def _race(stage: Stage, tell: Chronicle) -> None:
    with tell.chapter("two runs race for one promotion"):
        head = _head(stage)
        jobs = [{**_RETRAIN, "options": {"train.seed": seed}} for seed in (1, 2)]
        both = [stage.flow(f"race-{i}", _FLOW.format(job=json.dumps(job))) for i, job in enumerate(jobs)]
        for process in both:
            process.wait()
        told = [_state_line(stage.folder / f"race-{i}.log") for i in range(2)]
        for line in told:
            tell.note(line)
        tell.note(f"pipelines.champion:\n{stage.command('python', '-m', 'pipelines.champion').rstrip()}")
        new = [entry for entry in history(stage.store) if entry.number > head.number]
        tell.expect([e.number for e in new] == [*range(head.number + 1, head.number + 1 + len(new))], "no number twice")
        tell.expect(new and new[0].number == head.number + 1, f"exactly one became champion {head.number + 1}")
        judged = [re.findall(r"against champion (\d+)", line) for line in told]
        wanted = {str(head.number), str(head.number + 1)}
        tell.expect({n for found in judged for n in found} == wanted, f"the other was compared with {head.number + 1}")


def _upload_and_wait(stage: Stage, tell: Chronicle, folder: Path, state: str) -> None:
    before = {run["id"] for run in stage.runs()}
    stage.command("python", "-m", "pipelines.upload", str(folder))
    _ended(tell, _next_run(stage, before), state)


def _next_run(stage: Stage, before: set[str]) -> Run:
    """The first new flow run, when it has ended."""
    until(lambda: [r for r in stage.runs() if r["id"] not in before], 180, "a flow run")
    return stage.wait(next(run["id"] for run in stage.runs() if run["id"] not in before))


def _ended(tell: Chronicle, run: Run, state: str) -> None:
    tell.expect(run["state_name"] == state, f"{run['name']}: {_told(run)}")


def _told(run: Run) -> str:
    return f"{run['state_name']}, {run['total_run_time']:.0f} s: {(run['state'] or {}).get('message')}"


def _head(stage: Stage) -> Champion:
    return history(stage.store)[-1]


def _decision(stage: Stage, upload: str) -> Decision:
    found = decisions(stage.store, _head(stage).line).values()
    return next(decision for decision in found if decision.upload == upload)


def _state_line(log: Path) -> str:
    lines: Sequence[str] = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("STATE")]
    return lines[-1] if lines else f"no state in {log}"
