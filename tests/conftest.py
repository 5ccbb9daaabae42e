"""Fixtures for all floors: a real S3 server, its environment, and a fresh store of either kind."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from infra.seaweed import S3Server, seaweed
from infra.store import Store, open_store

hypothesis.settings.register_profile("tessera", deadline=None)  # no test asserts a time, on no machine
hypothesis.settings.load_profile("tessera")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with seaweed(tmp_path_factory.mktemp("seaweed"), "tessera-tests") as server:
        yield server


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):  # keep out what is in ~/.aws
        monkeypatch.setenv(name, os.devnull)
    for name, value in s3_server.environ().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    server = request.getfixturevalue("s3_env")
    return open_store(f"s3://{server.bucket}/{uuid.uuid4().hex}")
