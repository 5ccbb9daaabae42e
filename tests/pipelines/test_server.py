"""A Prefect server that does not come up is told at once, in a sentence."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from infra.errors import TesseraError
from pipelines import server


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
