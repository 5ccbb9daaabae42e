"""A store in a bucket of any S3-compatible server, that outlasts the server's absence.

Address and credentials come from the environment alone: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION. So does TESSERA_STORE_PATIENCE: the seconds (300) for which an operation
waits for a server that does not answer before it is an error. All that a server refuses is one at once.
"""

import io
import logging
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, TypedDict, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from infra import interrupt
from infra.errors import NoSuchObject, StoreError, TesseraError
from infra.store import Entry, Store, checked_prefix

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListMultipartUploadsOutputTypeDef, ListObjectsV2OutputTypeDef

log = logging.getLogger("tessera.store")

_UPLOAD = "?uploadId="  # between key and id of an upload in parts: no server allows it in either
_ONE_PUT = 1 << 30  # bytes; S3 takes five times as many in one request
_HURRY_SECONDS = 1.0  # the patience of Store.check
_WAITS = (0.1, 2.0)  # before the second request and, doubling, at most; up to a third less, at random
_SILENT_SECONDS = 1.0  # an idle connection that was closed, or one request too many, is no outage
_SETTLING_SECONDS = 5.0  # a server that is back may fail once more without a new outage
_BUFFER_BYTES = 1 << 20
# The connection was refused, timed out or broke, be it in the middle of an answer.
_LOST = (NoConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError, HTTPError)
_BUSY = (429, 500, 502, 503, 504)  # of a server that starts, stops or is swamped
_UNREACHED = "start the server or correct AWS_ENDPOINT_URL"
_REMEDIES = {
    "AccessDenied": "use credentials that may read, write, list and delete there",
    # All that the answer to a HEAD tells.
    "403": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to credentials that may read there",
    "InvalidAccessKeyId": "set AWS_ACCESS_KEY_ID to one that the server knows",
    "SignatureDoesNotMatch": "set AWS_SECRET_ACCESS_KEY to the secret of this AWS_ACCESS_KEY_ID",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "PreconditionFailed": "it was replaced while being read",
    "NoSuchBucket": "create the bucket or correct the URL",
    "EndpointConnectionError": _UNREACHED,
    "ConnectTimeoutError": _UNREACHED,
    "ReadTimeoutError": _UNREACHED,
}
_T = TypeVar("_T")


@dataclass(frozen=True)
class S3Store(Store):
    """A store in a bucket; `hurried` gives up within 10 s where patience would outlast a restart."""

    hurried: bool = False

    @property
    def _client(self) -> "S3Client":
        environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
        seconds = min(30.0, max(3.0, self._patience / 10))  # several requests, and patience ends in about its time
        with _LOCK:
            return _connect(os.getpid(), environment, seconds)

    @property
    def _patience(self) -> float:
        text = os.environ.get("TESSERA_STORE_PATIENCE", "300")
        with suppress(ValueError):
            if (seconds := float(text)) >= 0:
                return min(seconds, _HURRY_SECONDS) if self.hurried else seconds
        raise TesseraError(f"TESSERA_STORE_PATIENCE is {text!r}, expected how many seconds to wait for the store")

    def _patiently(self, request: Callable[[], _T]) -> _T:
        """What the request gives, made again while the server is down: at most `_patience` after it first failed."""
        began, end, (wait, longest) = time.monotonic(), None, _WAITS
        while True:
            tried = time.monotonic()
            try:
                given = request()
            except (*_LOST, ClientError) as error:
                now = time.monotonic()
                end = now + self._patience if end is None else end
                if not _may_pass(error) or now >= end:
                    raise
                interrupt.look()
                if now - began >= _SILENT_SECONDS and _outage.turns(True, tried):
                    said = "%s does not answer: %s; waiting up to %g s"
                    log.warning(said, self.url, _cause(error), self._patience)
                # Not random's own generator: training counts on its state.
                time.sleep(min(end - now, wait * random.SystemRandom().uniform(2 / 3, 1)))
                wait = min(2 * wait, longest)
            else:
                if _outage.turns(False, tried):
                    log.info("%s answers again", self.url)
                return given

    def read(self, key: str) -> bytes:
        with _telling("read", url := self.url_for(key)):  # at once: half the work of a stream's pieces
            return self._patiently(lambda: self._client.get_object(**_address(url))["Body"].read())

    def open(self, key: str) -> BinaryIO:
        with _telling("read", url := self.url_for(key)):
            answer = self._patiently(lambda: self._client.get_object(**_address(url)))
            return io.BufferedReader(_S3Stream(self, url, answer), _BUFFER_BYTES)

    def write(self, key: str, data: bytes) -> None:
        with _telling("write", url := self.url_for(key)):
            if len(data) <= _ONE_PUT:
                self._put(url, data)
                return
            extra = {"ChecksumAlgorithm": "CRC32"}  # in parts, which become visible as one object
            self._patiently(lambda: self._client.upload_fileobj(io.BytesIO(data), **_address(url), ExtraArgs=extra))

    def create(self, key: str, data: bytes) -> bool:
        writer = {"writer": uuid.uuid4().hex}
        with _telling("create", url := self.url_for(key)):
            try:
                self._put(url, data, IfNoneMatch="*", Metadata=writer)
            except ClientError as error:
                if _status(error) != 412:
                    raise
                # Our own put is there when its answer was lost and it was sent again, however often.
                there = self._patiently(lambda: self._client.head_object(**_address(url)))
                return there["Metadata"] == writer
            return True

    def _put(self, url: str, data: bytes, **conditions: Any) -> None:
        put = {**_address(url), "Body": data, "ChecksumAlgorithm": "CRC32", **conditions}
        self._patiently(lambda: self._client.put_object(**put))

    def exists(self, key: str) -> bool:
        with _telling("look up", url := self.url_for(key)):
            try:
                self._patiently(lambda: self._client.head_object(**_address(url)))
            except ClientError as error:
                if _status(error) != 404:
                    raise
                return False
            return True

    def stat(self, key: str) -> Entry:
        with _telling("look up", url := self.url_for(key)):
            found = self._patiently(lambda: self._client.head_object(**_address(url)))
            return Entry(key, found["ContentLength"], found["LastModified"].astimezone(UTC))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        root = _address(f"{self.url}/")
        start = len(root["Key"])
        request: dict[str, Any] = {"Bucket": root["Bucket"], "Prefix": root["Key"] + checked_prefix(prefix)}
        found: list[Entry] = []
        with _telling("list", self.url):
            while True:  # botocore's iterator over pages cannot go on after one that failed: it just ends
                page = self._patiently(partial(self._page, request))
                found += [
                    Entry(item["Key"][start:], item["Size"], item["LastModified"].astimezone(UTC))
                    for item in page.get("Contents", [])
                    if not item["Key"].endswith("/")  # pyarrow and web consoles leave such marks for folders
                ]
                if not page["IsTruncated"]:
                    return iter(sorted(found))  # SeaweedFS and S3 Express have their own order
                request["ContinuationToken"] = page["NextContinuationToken"]

    def _uploads(self, request: dict[str, Any]) -> "ListMultipartUploadsOutputTypeDef":
        return self._client.list_multipart_uploads(**request)

    def _page(self, request: dict[str, Any]) -> "ListObjectsV2OutputTypeDef":
        page = self._client.list_objects_v2(**request)
        if "IsTruncated" not in page:  # or a folder whose answer was cut off would look empty
            raise ResponseParserError("the answer broke off before its first byte")
        return page

    def delete(self, key: str) -> None:
        with _telling("delete", url := self.url_for(key)):
            self._patiently(lambda: self._client.delete_object(**_address(url)))

    def partials(self) -> Iterator[Entry]:
        root = _address(f"{self.url}/")
        request: dict[str, Any] = {"Bucket": root["Bucket"], "Prefix": root["Key"]}
        found: list[Entry] = []
        with _telling("list the uploads in parts below", self.url):
            while True:
                page = self._patiently(partial(self._uploads, request))
                found += [
                    Entry(f"{item['Key'][len(root['Key']) :]}{_UPLOAD}{item['UploadId']}", 0, _time(item["Initiated"]))
                    for item in page.get("Uploads", [])
                ]
                if not page.get("IsTruncated"):
                    return iter(sorted(found))
                request |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def discard(self, partial: Entry) -> None:
        key, _, upload = partial.key.rpartition(_UPLOAD)
        with _telling("delete", url := self.url_for(key)):
            try:
                self._patiently(lambda: self._client.abort_multipart_upload(**_address(url), UploadId=upload))
            except ClientError as error:
                if _status(error) != 404:
                    raise

    def check(self) -> None:
        Store.check(replace(self, hurried=True))


class _S3Stream(io.RawIOBase):
    """An object's bytes; a lost connection is taken up where it broke, if the object is still the same."""

    def __init__(self, store: S3Store, url: str, answer: Any) -> None:
        self._store, self._url = store, url
        self._body, self._etag, self._position, self._broken = answer["Body"], answer["ETag"], 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        with _telling("read", self._url):
            count = self._store._patiently(partial(self._fill, buffer))
        self._position += count
        return count

    def _fill(self, buffer: "WriteableBuffer") -> int:
        if self._broken:
            rest = {"Range": f"bytes={self._position}-", "IfMatch": self._etag}
            self._body = self._store._client.get_object(**_address(self._url), **rest)["Body"]
        self._broken = True
        count: int = self._body.readinto(buffer)
        self._broken = False
        return count

    def readall(self) -> bytes:
        return b"".join(iter(partial(self.read, _BUFFER_BYTES), b""))

    def close(self) -> None:
        self._body.close()
        super().close()


_LOCK = Lock()
# Or a child forked while another thread connects would find the lock held for ever.
os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


class _Outage:
    """Whether the store is down, as far as this process has told: for one line when that turns, of all threads."""

    def __init__(self) -> None:
        self._down, self._settled = False, 0.0

    def turns(self, down: bool, tried: float) -> bool:
        """Whether it is news that a request sent at `tried` met the store down, or up; not if sent too early."""
        if down == self._down:
            return False
        with _LOCK:
            if down == self._down or tried < self._settled:
                return False
            self._down, self._settled = down, time.monotonic() + (0 if down else _SETTLING_SECONDS)
            return True


_outage = _Outage()


@lru_cache(maxsize=16)
def _connect(pid: int, environment: tuple[tuple[str, str], ...], seconds: float) -> "S3Client":
    """One client for each process, as sockets do not survive a fork, and for each set of AWS_* variables."""
    config = Config(
        connect_timeout=min(5, seconds),
        read_timeout=seconds,
        retries={"mode": "standard", "total_max_attempts": 1},  # _patiently repeats
        max_pool_connections=32,
    )
    variables = dict(environment)
    # botocore itself knows only AWS_DEFAULT_REGION.
    region = variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION") or "us-east-1"
    try:
        return boto3.session.Session().client("s3", region_name=region, config=config)
    except ValueError as error:
        raise TesseraError(f"{error}: AWS_ENDPOINT_URL must look like http://host:port") from error


class _Address(TypedDict):
    Bucket: str
    Key: str


def _address(url: str) -> _Address:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def _may_pass(error: Exception) -> bool:
    """Whether the same request may be answered later."""
    if isinstance(error, ClientError):
        return _status(error) in _BUSY or error.response["Error"]["Code"] == "RequestTimeout"
    return True


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def _time(modified: datetime) -> datetime:
    return modified.astimezone(UTC)


@contextmanager
def _telling(verb: str, url: str) -> Iterator[None]:
    """Turn what botocore or the server raises into a StoreError."""
    try:
        yield
    except (BotoCoreError, ClientError, ResponseParserError, HTTPError, OSError) as error:
        gone = isinstance(error, ClientError) and error.response["Error"]["Code"] in ("NoSuchKey", "404")
        raise (NoSuchObject if gone else StoreError)(f"cannot {verb} {url}: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    name, cause = type(error).__name__, str(error)
    if isinstance(error, ClientError):
        name = error.response["Error"]["Code"]
        cause = f"{error.response['Error'].get('Message') or 'refused'} ({name})"
    return f"{cause}; {_REMEDIES[name]}" if name in _REMEDIES else cause
