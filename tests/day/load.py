"""Load: 500 objects in the inbox, 200 manifests, 50 runs at once on one server."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from infra import artifacts
from infra.errors import TesseraError
from infra.store import Store
from pipelines.upload import upload
from tests.day import data
from tests.day.chronicle import Chronicle
from tests.day.kills import copy, retrained, small_store
from tests.day.stage import Run, Stage
from tests.support.waiting import until

_RUNS = 50
_TRIES = 60


def play(stage: Stage, tell: Chronicle) -> None:
    """The small store of kills, and the deployments."""
    _inbox(stage, tell)
    _concurrent(stage, tell)


def _inbox(stage: Stage, tell: Chronicle) -> None:
    with tell.chapter("a small champion, and an upload"):
        origin = small_store(stage, tell)
    with tell.chapter("500 objects in the inbox, 200 manifests on the store"):
        store = copy(origin, "load")
        for number in range(25):
            folder = data.arrival(stage.folder / f"load-{number}", 100_000 + 100 * number, 9)
            upload(folder, store, folder.name)
        objects = sum(1 for _ in store.list("inbox/"))
        for number in range(200):
            artifacts.write_manifest(
                store, f"evaluate/{number:016x}", {"images": 0, "run": "train/0", "val_set": "precompute/0", "pq": {}}
            )
        tell.note(f"{objects} objects in {25 + 1} uploads, {_manifests(store)} manifests")
        began = time.monotonic()
        told = retrained(stage, "load-first", store)
        tell.note(f"the first run took all of them in: {told}, {time.monotonic() - began:.0f} s")
        began = time.monotonic()
        told = retrained(stage, "load-second", store)
        tell.expect("NothingNew" in told, f"the second run: NothingNew after {time.monotonic() - began:.1f} s")
        began = time.monotonic()
        listing = stage.command("python", "-m", "pipelines.retention", store.url)
        tell.note(f"pipelines.retention: {len(listing.splitlines())} lines after {time.monotonic() - began:.1f} s")


def _concurrent(stage: Stage, tell: Chronicle) -> None:
    with tell.chapter(f"{_RUNS} runs of deployments asked for at once"):
        found = stage.api("POST", "deployments/filter", {}).json()
        ids = {deployment["name"]: deployment["id"] for deployment in found}
        began = time.monotonic()
        names = ["retrain" if number % 2 else "doctor" for number in range(_RUNS)]
        with ThreadPoolExecutor(_RUNS) as pool:
            first = [*pool.map(lambda name: _ask(stage, ids[name]), names)]
        busy = first.count(None)
        tell.note(f"{_RUNS} requests in one instant: {busy} answered 503, all after {time.monotonic() - began:.1f} s")
        asked = [run or _ask_until(stage, ids[name]) for run, name in zip(first, names, strict=True)]
        tell.note(f"those {busy} asked again, one after the other: {_RUNS} runs after {time.monotonic() - began:.1f} s")
        until(lambda: all(stage.run(run)["end_time"] for run in asked), 2400, f"the end of {_RUNS} runs")
        runs = [stage.run(run) for run in asked]
        states = {state: sum(run["state_name"] == state for run in runs) for state in {r["state_name"] for r in runs}}
        tell.note(f"all ended after {time.monotonic() - began:.0f} s: {states}")
        bad = [run for run in runs if run["state_type"] != "COMPLETED"]
        tell.expect(
            not bad, f"{len(bad)} did not complete: {[(r['name'], (r['state'] or {}).get('message')) for r in bad[:3]]}"
        )
        tell.note(f"at most {_most_at_once(runs)} ran at once; median {statistics.median(_spent(runs)):.0f} s a run")
        retrains = [run for run, name in zip(runs, names, strict=True) if name == "retrain"]
        tell.expect(_most_at_once(retrains) == 1, "of retrain never two at once")


def _ask(stage: Stage, deployment: str) -> str | None:
    """The flow run; None if the server is too busy."""
    answer = stage.api("POST", f"deployments/{deployment}/create_flow_run", {})
    if not answer.is_success and answer.status_code != 503:
        raise TesseraError(f"the server refused: {answer.status_code} {answer.text[:300]}")
    return answer.json()["id"] if answer.is_success else None


def _ask_until(stage: Stage, deployment: str) -> str:
    """The same, again after a second, as Prefect's own client does it."""
    for _ in range(_TRIES):
        if run := _ask(stage, deployment):
            return run
        time.sleep(1)
    raise TesseraError(f"the server is too busy for a flow run, {_TRIES} times")


def _manifests(store: Store) -> int:
    return sum(entry.key.endswith("/manifest.json") for entry in store.list())


def _spent(runs: list[Run]) -> list[float]:
    return [_seconds(run["end_time"]) - _seconds(run["start_time"]) for run in runs if run["start_time"]]


def _most_at_once(runs: list[Run]) -> int:
    marks = [(_seconds(run["start_time"]), 1) for run in runs if run["start_time"]]
    marks += [(_seconds(run["end_time"]), -1) for run in runs if run["start_time"]]
    now = most = 0
    for _, change in sorted(marks):
        now += change
        most = max(most, now)
    return most


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()
