"""Our Prefect server asks for a login, answers no other site's page, tells nobody; a failed start is told."""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from infra.errors import TesseraError
from pipelines import server
from pipelines.server_health import ask, judge

ROOT = Path(__file__).parents[2]
EVIL = "http://evil.example"


@pytest.fixture
def ending() -> subprocess.Popen[bytes]:
    """A server that ends after a second."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1); raise SystemExit(3)"])


def test_one_that_ends(ending: subprocess.Popen[bytes], tmp_path: Path):
    with pytest.raises(TesseraError, match=rf"http://127.0.0.1:1/api ended with exit code 3; see {tmp_path}"):
        server._wait_until_ready(ending, "http://127.0.0.1:1/api", tmp_path)


def test_one_that_accepts_and_never_answers(ending, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "_ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        with pytest.raises(TesseraError, match="ended with exit code 3"):
            server._wait_until_ready(ending, url, tmp_path)


def sourced(home: Path, **variables: str) -> dict[str, str]:
    """What a shell exports after `. infra/env.sh`."""
    known = {"PATH": os.environ["PATH"], "HOME": str(home), **variables}
    told = subprocess.run(
        ["sh", "-euc", ". infra/env.sh; env -0"], cwd=ROOT, env=known, capture_output=True, check=True
    )
    pairs = dict(line.split("=", 1) for line in told.stdout.decode().strip("\0").split("\0"))
    return {name: value for name, value in pairs.items() if name not in {*known, "PWD", "OLDPWD", "SHLVL", "_"}}


def test_a_shell_gets_the_same_settings_and_one_login_for_all_terminals(tmp_path: Path):
    first, ours = sourced(tmp_path), server.settings("http://127.0.0.1:4200/api")
    login = first["PREFECT_API_AUTH_STRING"]
    assert len(login) == len("tessera:") + 48
    assert sourced(tmp_path) == first == ours | dict.fromkeys((n for n in ours if n.endswith("AUTH_STRING")), login)
    assert ours["PREFECT_API_AUTH_STRING"] != server.settings("http://x/api")["PREFECT_API_AUTH_STRING"]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {".prefect": 0o700, "tessera-login": 0o600}
    given = {"PREFECT_API_URL": "http://one:4200/api", "PREFECT_API_AUTH_STRING": "a:b"}
    assert {name: sourced(tmp_path, **given).get(name) for name in given} == dict.fromkeys(given)  # as they were


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server of ours, and the folder that it keeps all in."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("PREFECT_API_URL", None)
    with server.prefect_server(tmp_path / "prefect"):
        yield tmp_path / "prefect"


@pytest.mark.slow
def test_no_page_of_another_site_and_nobody_without_the_login_may_use_the_api(ours: Path):
    url = os.environ["PREFECT_API_URL"]
    login = tuple(os.environ["PREFECT_API_AUTH_STRING"].split(":"))
    asked = {"Origin": EVIL, "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{url}/flow_runs/filter", headers=asked | {"Access-Control-Request-Headers": "x"})
    assert preflight.status_code == 400
    for headers in ({}, {"Origin": EVIL}):
        for auth, code in ((None, 401), (("tessera", "x"), 401), (login, 200)):
            # what a form or a script of any page can send unasked: no type at all, and Prefect takes it for JSON
            answers = [
                httpx.post(f"{url}/flow_runs/filter", content=b'{"limit": 1}', headers=headers, auth=auth),
                httpx.get(f"{url}/admin/settings", headers=headers, auth=auth),
            ]
            assert [answer.status_code for answer in answers] == [code, code]
            assert not any("access-control-allow-origin" in answer.headers for answer in answers)

    (process,) = (p for p in psutil.Process().children() if "create_app" in " ".join(p.cmdline()))
    assert not any(login[1] in word for word in process.cmdline())
    told = process.environ()
    assert (told["PREFECT_SERVER_ANALYTICS_ENABLED"], told["DO_NOT_TRACK"]) == ("false", "1")
    port = urlsplit(url).port
    listening = {c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert listening == {("127.0.0.1", port)}
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700

    with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: ":".join(login)}):
        rows = {row.what: str(row.verdict) for row in judge(ask())}
    with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: "tessera:x"}):
        (row,) = judge(ask())
    assert "set PREFECT_API_AUTH_STRING" in row.todo
    assert rows == {"Prefect": "ok", "Prefect's login": "ok", "Prefect's pages": "ok", "work pool": "bad"}
