"""train-coco across two machines, of which one leaves and comes back."""

import json
import re
import time

from infra.errors import TesseraError
from tests.day.chronicle import Chronicle
from tests.machines.stage import ENDED, Stage
from tests.support.waiting import until

JOB = {
    "workers": 2,
    "least_workers": 1,
    "synthetic": {"train": 1600, "val": 100},
    "epochs": 10,
    "options": {"upkeep.minutes": 0.3},
}


def play(stage: Stage, tell: Chronicle) -> str:
    """All that happens; the id of the flow run of train-coco."""
    with tell.chapter("train-coco on both machines"):
        job = f"job={json.dumps(JOB)}"
        _, told = stage.first.run("prefect", "deployment", "run", "train-coco/train-coco", "--param", job)
        found = re.search(r"UUID: ([0-9a-f-]{36})", told)
        if found is None:
            raise TesseraError(f"no flow run: {told}")
        run = found[1]
        number, told = stage.line(run, "2 workers: ", 400)
        _expect_both(stage, tell, told)
        shards = [m[1] for line in stage.logs(run) if (m := re.search(r"s CPU on (\S+),", line["message"]))]
        counts = ", ".join(f"{shards.count(name)} on {name}" for name in sorted({*shards}))
        tell.expect(len({*shards}) == 2, f"shards computed: {counts}")
        number, told = stage.line(run, r"step (1[5-9]\d|[2-9]\d\d) of", 300, number)
        tell.note(told)
    with tell.chapter(f"the cable of {stage.second.name} is pulled"):
        stage.second.cable(False)
        begin = time.monotonic()
        number, told = stage.line(run, "with 1 workers", 400, number)
        tell.note(f"after {time.monotonic() - begin:.0f} s: {told}")
        number, told = stage.line(run, r"step \d+ of", 200, number)
        tell.note(told)
    with tell.chapter("and plugged in again"):
        stage.second.cable(True)
        begin = time.monotonic()
        number, told = stage.line(run, "with 2 workers", 400, number)
        tell.note(f"after {time.monotonic() - begin:.0f} s: {told}")
        _, told = stage.line(run, "2 workers: ", 100, number - 1)
        _expect_both(stage, tell, told)
    with tell.chapter("the report"):
        until(lambda: stage.api(f"flow_runs/{run}")["state_type"] in ENDED, 900, "the end")
        state = stage.api(f"flow_runs/{run}")["state_name"]
        tell.expect(state == "Completed", f"the flow run ended as {state}")
        until(lambda: _reports(stage, run), 60, "the report in the flow run's log")  # lines come after the state
        tell.note(_reports(stage, run)[-1])
    return run


def _reports(stage: Stage, run: str) -> list[str]:
    return [line["message"] for line in stage.logs(run) if "report: " in line["message"]]


def _expect_both(stage: Stage, tell: Chronicle, told: str) -> None:
    tell.expect(all(machine.name in told for machine in (stage.first, stage.second)), told)
