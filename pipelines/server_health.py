"""What the doctor finds at the Prefect server: who may use it, its worker, the deployments, a run that holds others up.

The questions and what follows from the answers are apart, so that answers can be made up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import httpx
import prefect
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowRunFilter, FlowRunFilterState
from prefect.client.schemas.filters import FlowRunFilterStateType as StateTypes
from prefect.client.schemas.objects import StateType, WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound, PrefectException, PrefectHTTPStatusError
from prefect.settings import get_current_settings

from infra import ray_health
from infra.errors import TesseraError
from infra.health import Row, Verdict

POOL = "tessera"
_WORKER = f"prefect worker start --pool {POOL} --type process"
_DEPLOYED = Path(__file__).parents[1] / "prefect.yaml"
_SECONDS = 20.0
_STRANGER = "http://stranger.invalid"
_HOLDING = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)
_LOGIN = "start server, worker and commands with the same login: `. infra/env.sh` sets one for all terminals of a user"


@dataclass(frozen=True)
class Held:
    """A deployment that runs one at a time, with all its places taken."""

    name: str
    slots: int
    limit: str
    """The name of the concurrency limit."""
    runs: tuple[tuple[str, str], ...]
    """(id, state) of the runs that hold them."""


@dataclass(frozen=True)
class Server:
    """What the Prefect server at `url` says; problem: why it says nothing, or is none."""

    url: str
    problem: str = ""
    refused: bool = False
    """It asks for another login than ours."""
    login: bool = True
    """It answers nobody without one."""
    pages: bool = False
    """It answers pages of other sites."""
    version: str = ""
    pool: bool = False
    paused: bool = False
    online: int = 0
    missing: tuple[str, ...] = ()
    outdated: tuple[str, ...] = ()
    """Deployments of prefect.yaml that are not there, and those whose job has other fields there."""
    held: tuple[Held, ...] = ()


def ask() -> Server | None:
    """The server that PREFECT_API_URL or a profile names; None: no server is named."""
    url = get_current_settings().api.url
    if not url:
        return None
    shown = ray_health.masked(url)
    try:
        ours = _ours()
        return ray_health.bounded(lambda: _ask(url, shown, ours), _SECONDS, f"the Prefect server at {shown}")
    except PrefectHTTPStatusError as error:
        refused = error.response.status_code in (401, 403)
        return Server(shown, problem=ray_health.masked(str(error).splitlines()[0]), refused=refused)
    except (TesseraError, PrefectException, httpx.HTTPError, RuntimeError, ValueError) as error:
        return Server(shown, problem=ray_health.masked(str(error)) or type(error).__name__)


def _ours() -> dict[str, dict[str, object]]:
    """Of each deployment of prefect.yaml what its job looks like here, by the deployment's name."""
    found = {}
    for listed in yaml.safe_load(_DEPLOYED.read_text())["deployments"]:
        module, _, name = listed["entrypoint"].partition(".py:")
        flow = getattr(import_module(module.replace("/", ".")), name)
        found[f"{flow.name}/{listed['name']}"] = flow.parameters.model_dump_for_openapi()
    return found


def _ask(url: str, shown: str, ours: dict[str, dict[str, object]]) -> Server:
    stranger = httpx.get(f"{url}/admin/version", headers={"Origin": _STRANGER}, timeout=_SECONDS)
    login = not stranger.is_success
    pages = stranger.headers.get("access-control-allow-origin") in ("*", _STRANGER)
    with get_client(sync_client=True) as client:
        version = str(client.api_version())
        try:
            pool = client.read_work_pool(POOL)
        except ObjectNotFound:
            return Server(shown, login=login, pages=pages, version=version)
        online = sum(w.status == WorkerStatus.ONLINE for w in client.read_workers_for_work_pool(POOL))
        there = dict(_deployed(client, ours))
        held = tuple(_held(client, there))
    outdated = tuple(name for name, found in there.items() if found.parameter_openapi_schema != ours[name])
    return Server(
        shown,
        login=login,
        pages=pages,
        version=version,
        pool=True,
        paused=pool.is_paused,
        online=online,
        missing=tuple(name for name in ours if name not in there),
        outdated=outdated,
        held=held,
    )


def _deployed(
    client: SyncPrefectClient, names: dict[str, dict[str, object]]
) -> Iterator[tuple[str, DeploymentResponse]]:
    for name in names:
        try:
            yield name, client.read_deployment_by_name(name)
        except ObjectNotFound:
            continue


def _held(client: SyncPrefectClient, deployments: dict[str, DeploymentResponse]) -> Iterator[Held]:
    for name, found in deployments.items():
        limit = found.global_concurrency_limit
        if limit is None or limit.active_slots < limit.limit:
            continue
        runs = client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[found.id])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=StateTypes(any_=[*_HOLDING]))),
        )
        yield Held(name, limit.active_slots, limit.name, tuple((str(run.id), run.state_name or "") for run in runs))


def judge(server: Server | None) -> list[Row]:
    """What follows from the server's answers; None: there is no server to ask."""
    if server is None:
        told = "PREFECT_API_URL is not set: no server is checked, and python -m pipelines.embedded needs none"
        return [Row("Prefect", "driver", Verdict.OK, told)]
    if server.problem:
        todo = "start it (prefect server start), or correct PREFECT_API_URL"
        if server.refused:
            todo = f"set PREFECT_API_AUTH_STRING to the server's PREFECT_SERVER_API_AUTH_STRING; {_LOGIN}"
        return [Row("Prefect", server.url, Verdict.BAD, server.problem, todo)]
    rows, ours = [Row("Prefect", server.url, Verdict.OK, f"version {server.version}")], prefect.__version__
    if server.version != ours:
        found = f"version {server.version}, the driver has {ours}"
        rows = [Row("Prefect", server.url, Verdict.BAD, found, "install the same Prefect on both sides")]
    return [*rows, *_access(server), *_work(server), *_deployments(server), *map(_slot, server.held)]


def _access(server: Server) -> Iterator[Row]:
    found, verdict, todo = "asks for it", Verdict.OK, ""
    if not server.login:
        found, verdict = "asks for none: whoever reaches it may run any job", Verdict.WARN
        todo = f"PREFECT_SERVER_API_AUTH_STRING; {_LOGIN}"
    yield Row("Prefect's login", server.url, verdict, found, todo)
    found, verdict, todo = "answers no page of another site", Verdict.OK, ""
    if server.pages:
        found, verdict = "answers the pages of any site that a browser here shows", Verdict.WARN
        todo = "start it with PREFECT_SERVER_CORS_ALLOWED_ORIGINS set to its own address: `. infra/env.sh`"
    yield Row("Prefect's pages", server.url, verdict, found, todo)


def _work(server: Server) -> Iterator[Row]:
    if not server.pool:
        yield Row("work pool", server.url, Verdict.BAD, f"there is no {POOL!r}", f"{_WORKER} makes it")
        return
    if server.paused:
        yield Row("work pool", server.url, Verdict.WARN, f"{POOL} is paused", f"prefect work-pool resume {POOL}")
    verdict = Verdict.OK if server.online else Verdict.BAD
    yield Row(
        "work pool", server.url, verdict, f"{POOL}: workers online {server.online}", "" if server.online else _WORKER
    )


def _deployments(server: Server) -> Iterator[Row]:
    if not server.pool:  # the row of the pool says what comes first
        return
    todo = "prefect deploy --all, in the folder of the worker's checkout"
    if server.missing:
        yield Row("deployments", server.url, Verdict.BAD, f"missing: {', '.join(server.missing)}", todo)
    if server.outdated:
        found = f"of another version, whose jobs have other fields: {', '.join(server.outdated)}"
        yield Row("deployments", server.url, Verdict.WARN, found, todo)
    if not (server.missing or server.outdated):
        yield Row("deployments", server.url, Verdict.OK, "all of prefect.yaml, of this version")


def _slot(held: Held) -> Row:
    """Others wait for it. A run whose process was killed keeps its place for up to six minutes, as Prefect counts."""
    if len(held.runs) < held.slots:
        todo = f"prefect gcl update {held.limit} --active-slots {len(held.runs)}"
        found = f"{held.slots} runs hold it up, of which Prefect knows {len(held.runs)}: the server was started anew"
        return Row("deployments", held.name, Verdict.WARN, found, todo)
    found = "runs one at a time, now: " + ", ".join(f"{run} ({state})" for run, state in held.runs)
    gone = "; ".join(f"prefect flow-run delete {run}" for run, _ in held.runs)
    waits = all(state == "Running" for _, state in held.runs)
    return Row(
        "deployments", held.name, Verdict.OK if waits else Verdict.WARN, found, f"if its process is gone: {gone}"
    )
