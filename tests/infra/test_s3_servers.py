"""S3 servers that do not answer as AWS does: used where that is possible, told in a sentence where it is not."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.errors import NoSuchObject, TesseraError
from infra.store import Store, open_store
from tests.support.odd_s3 import OddS3, odd_s3
from tests.support.waiting import until

CASES = Path(__file__).resolve().parents[3] / "shared/data/cases"
KEYS = ["a%2Fb+c d", "ä", *(f"k{number}" for number in range(8))]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OddS3]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with odd_s3() as server:
        _use(monkeypatch, server.endpoint)
        yield server


def _use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("TESSERA_STORE_PATIENCE", "0.5")


def _used(store: Store) -> None:
    """All operations, and all of them right."""
    store.check()
    for key in KEYS:
        store.write(key, key.encode())
    assert [(entry.key, entry.size) for entry in store.list()] == sorted((key, len(key.encode())) for key in KEYS)
    assert [entry.key for entry in store.list("k")] == KEYS[2:]
    assert store.stat("k1").modified.tzinfo
    with store.open("k1") as stream:
        assert stream.read() == b"k1" == store.read("k1")
    assert not store.create("k1", b"other")
    for _ in range(2):
        store.delete("k1")
    assert not store.exists("k1")
    with pytest.raises(NoSuchObject, match="k1"):
        store.read("k1")
    assert not [*store.partials()]


@pytest.mark.parametrize(
    "odd", ["", "no-etag", "no-truncated", "no-token", "no-size", "no-time", "encoded", "no-metadata", "no-such-delete"]
)
def test_a_server_that_leaves_out_what_can_be_done_without_is_used(server: OddS3, odd: str):
    server.odd = {odd}
    _used(open_store("s3://b/x"))


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ("version-1", "s3://b/x.*listing does not go on"),
        ("any-prefix", "s3://b/x.*'x/k' has 'other'.*AWS_ENDPOINT_URL"),
        ("no-time-at-all", "s3://b/x/k0.*LastModified"),
        ("page", "s3://b/x.*AWS_ENDPOINT_URL"),
    ],
)
def test_a_listing_that_cannot_be_trusted_is_an_error(server: OddS3, odd: str, told: str):
    store = open_store("s3://b/x")
    for key in KEYS:
        store.write(key, b"")
    server.objects["other"] = server.objects["x/k1"]
    server.odd = {odd}
    with pytest.raises(TesseraError, match=told):
        list(store.list("k"))


@pytest.mark.parametrize("odd", ["unconditional", "page"])
def test_a_store_that_cannot_serve_is_refused_at_the_start(server: OddS3, odd: str):
    server.odd = {odd}
    with pytest.raises(TesseraError, match=r"If-None-Match.*docs/operations.md|AWS_ENDPOINT_URL: a proxy"):
        open_store("s3://b/x").check()


def test_a_page_of_a_proxy_is_no_object_and_takes_none(server: OddS3):
    store = open_store("s3://b/x")
    server.odd = {"page"}
    for act in (
        lambda: store.write("k", b""),
        lambda: store.create("k", b""),
        lambda: store.read("k"),
        lambda: store.open("k"),
        lambda: store.delete("k"),
        lambda: list(store.partials()),
    ):
        with pytest.raises(TesseraError, match=r"s3://b/x.*a page of HTML"):
            act()
    server.odd = set()
    store.write("report.html", b"<html>ours</html>")
    assert store.read("report.html") == b"<html>ours</html>"


@pytest.mark.parametrize(("odd", "told"), [("no-etag", "no ETag"), ("no-range", "no Range")])
def test_half_a_body_is_read_on_or_an_error(server: OddS3, odd: str, told: str):
    store, data = open_store("s3://b/x"), os.urandom(3_000_000)
    store.write("k", data)
    server.odd = {"half"}
    assert store.read("k") == data
    server.odd = {"half"}
    assert store.open("k").read() == data
    server.odd = {"half", odd}
    with pytest.raises(TesseraError, match=rf"s3://b/x/k.*{told}"):
        store.open("k").read()


def test_a_winner_is_known_by_metadata_in_any_case_of_letters(server: OddS3):
    store = open_store("s3://b/x")
    assert store.create("first", b"")  # asks what the server is like
    server.odd = {"lost-answer"}
    assert store.create("k", b"mine")
    assert not store.create("k", b"mine")


def test_a_password_in_the_address_stands_in_no_error(server: OddS3, monkeypatch, caplog):
    for address in ("http://me:s3cret@127.0.0.1:1", "me:s3cret@host", "http://me:s3cret@[bad"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises(TesseraError, match="AWS_ENDPOINT_URL") as caught:
            open_store("s3://b/x").write("k", b"")
        assert "s3cret" not in str(caught.value)
    assert "s3cret" not in caplog.text
    del server


@pytest.mark.parametrize("mode", ["b2", "oss"])
def test_the_environment_says_whether_a_server_knows_checksums(tmp_path: Path, monkeypatch, mode: str):
    """b2 refuses x-amz-sdk-checksum-algorithm; oss, by HTTPS, refuses aws-chunked."""
    program = CASES / "fake_s3.py"
    if not program.exists():
        pytest.skip("needs shared/data/cases/fake_s3.py")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    more: list[str] = []
    scheme = "http"
    if mode == "oss":
        if shutil.which("openssl") is None:
            pytest.skip("needs openssl")
        more, scheme = [str(_certificate(tmp_path))], "https"
        monkeypatch.setenv("AWS_CA_BUNDLE", more[0])
    with subprocess.Popen([sys.executable, str(program), str(port), mode, str(tmp_path / "log"), *more]) as served:
        try:
            until(lambda: _answers(port), 30, "fake_s3.py")
            _use(monkeypatch, f"{scheme}://127.0.0.1:{port}")
            with pytest.raises(TesseraError, match="set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
                open_store("s3://b/x").write("k", b"1")
            monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
            monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
            monkeypatch.setattr("infra.s3_store._ONE_PUT", 1 << 20)
            store = open_store("s3://b/x")
            store.write("k", b"1")
            assert store.create("new", b"2")
            assert store.read("k") == b"1"
        finally:
            served.kill()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _certificate(folder: Path) -> Path:
    key, certificate, both = folder / "key.pem", folder / "certificate.pem", folder / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    return both


def test_a_server_that_replaces_is_refused_by_the_first_that_creates(server: OddS3):
    """Or two champions would have one number: no command creates anything before this is known."""
    store = open_store("s3://b/x")
    server.odd = {"replaces"}
    for _ in range(2):
        with pytest.raises(TesseraError, match=r"s3://b/x replaces objects that it was asked to keep"):
            store.create("champion/000001.json", b"{}")
    assert not server.objects
    server.odd = set()
    assert store.create("k", b"")
    assert not store.create("k", b"")
