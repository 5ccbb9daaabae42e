"""A store in a bucket of any S3-compatible server, that outlasts the server's absence.

Address, credentials and what the server can do come from the environment alone: AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_REQUEST_CHECKSUM_CALCULATION. So does
TESSERA_STORE_PATIENCE: the seconds (300) for which an operation waits for a server that does not answer before it is
an error. All that a server refuses is one at once.
"""

import io
import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, TypedDict, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError, InvalidRegionError
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.httpchecksum import FlexibleChecksumError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from infra import interrupt
from infra.errors import DamagedObject, NoSuchObject, StoreError, TesseraError
from infra.s3_answers import (
    cause,
    entries,
    entry,
    in_utc,
    is_gone,
    is_unconditional,
    may_pass,
    next_page,
    refuse_pages,
    status,
)
from infra.store import Entry, Store, check_room, checked_prefix
from infra.text import sentence

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListMultipartUploadsOutputTypeDef, ListObjectsV2OutputTypeDef

log = logging.getLogger("tessera.store")

_UNCONDITIONAL = (
    "this server has no conditional writes (If-None-Match), which keep two processes from taking one place; "
    "docs/operations.md names servers that have them"
)
_NOT_THERE = (405, 501)  # of a server that knows no uploads in parts, and so has none
_UPLOAD = "?uploadId="  # between key and id of an upload in parts: no server allows it in either
_ONE_PUT = 1 << 30  # bytes; S3 takes five times as many in one request
_HURRY_SECONDS = 1.0  # the patience of Store.check
_WAITS = (0.1, 2.0)  # before the second request and, doubling, at most; up to a third less, at random
_SILENT_SECONDS = 1.0  # an idle connection that was closed, or one request too many, is no outage
_SETTLING_SECONDS = 5.0  # a server that is back may fail once more without a new outage
_BUFFER_BYTES = 1 << 20
# The connection was refused, timed out or broke, be it in the middle of an answer.
_LOST = (NoConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError, HTTPError)
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
                if not may_pass(error) or now >= end:
                    raise
                interrupt.look()
                if now - began >= _SILENT_SECONDS and _outage.turns(True, tried):
                    said = "%s does not answer: %s; waiting up to %g s"
                    log.warning(said, self.url, sentence(cause(error)), self._patience)
                # Not random's own generator: training counts on its state.
                time.sleep(min(end - now, wait * random.SystemRandom().uniform(2 / 3, 1)))
                wait = min(2 * wait, longest)
            else:
                if _outage.turns(False, tried):
                    log.info("%s answers again", self.url)
                return given

    def read(self, key: str) -> bytes:
        with _telling("read", url := self.url_for(key)):  # at once: half the work of a stream's pieces
            return self._patiently(partial(self._whole, url))

    def _whole(self, url: str) -> bytes:
        answer = self._client.get_object(**_address(url))
        check_room(url, answer.get("ContentLength", 0))
        return answer["Body"].read()

    def open(self, key: str) -> BinaryIO:
        with _telling("read", url := self.url_for(key)):
            answer = self._patiently(lambda: self._client.get_object(**_address(url)))
            return io.BufferedReader(_S3Stream(self, url, answer), _BUFFER_BYTES)

    def write(self, key: str, data: bytes) -> None:
        with _telling("write", url := self.url_for(key)):
            if len(data) <= _ONE_PUT:
                self._put(url, data)
                return
            # in parts, which become visible as one object
            self._patiently(lambda: self._client.upload_fileobj(io.BytesIO(data), **_address(url)))

    def create(self, key: str, data: bytes) -> bool:
        place = os.environ.get("AWS_ENDPOINT_URL"), _address(self.url)["Bucket"]
        if place not in _keeping:  # once in a process: all that races counts on it, from uploads to champions
            self._refuse_replacing()
            _keeping.add(place)
        return self._create(key, data)

    def _refuse_replacing(self) -> None:
        probe = f"probe-{uuid.uuid4().hex}"
        both = self._create(probe, b"") and self._create(probe, b"")
        self.delete(probe)
        if both:
            raise TesseraError(f"{self.url} replaces objects that it was asked to keep (If-None-Match)")

    def _create(self, key: str, data: bytes) -> bool:
        writer = {"writer": uuid.uuid4().hex}
        with _telling("create", url := self.url_for(key)):
            try:
                self._put(url, data, IfNoneMatch="*", Metadata=writer)
            except ClientError as error:
                if is_unconditional(error):
                    raise StoreError(f"cannot create {url}: {cause(error)}; {_UNCONDITIONAL}") from error
                if status(error) != 412:
                    raise
                # Our own put is there when its answer was lost and it was sent again, however often.
                there = self._patiently(lambda: self._client.head_object(**_address(url)))
                told = {name.lower(): value for name, value in there.get("Metadata", {}).items()}
                return writer.items() <= told.items()
            return True

    def _put(self, url: str, data: bytes, **conditions: Any) -> None:
        self._patiently(lambda: self._client.put_object(**_address(url), Body=data, **conditions))

    def exists(self, key: str) -> bool:
        with _telling("look up", url := self.url_for(key)):
            try:
                self._patiently(lambda: self._client.head_object(**_address(url)))
            except ClientError as error:
                if status(error) != 404:
                    raise
                return False
            return True

    def stat(self, key: str) -> Entry:
        with _telling("look up", url := self.url_for(key)):
            return entry(key, self._patiently(lambda: self._client.head_object(**_address(url))))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        root = _address(f"{self.url}/")
        start, asked = len(root["Key"]), root["Key"] + checked_prefix(prefix)
        request: dict[str, Any] | None = {"Bucket": root["Bucket"], "Prefix": asked}
        found: list[Entry] = []
        with _telling("list", self.url):
            while (
                request is not None
            ):  # botocore's iterator over pages cannot go on after one that failed: it just ends
                page = self._patiently(partial(self._client_list, request))
                found += entries(page, asked, start, self.stat)
                request = next_page(request, page)
            return iter(sorted(found))  # SeaweedFS and S3 Express have their own order

    def _client_list(self, request: dict[str, Any]) -> "ListObjectsV2OutputTypeDef":
        return self._client.list_objects_v2(**request)

    def delete(self, key: str) -> None:
        with _telling("delete", url := self.url_for(key)):
            try:
                self._patiently(lambda: self._client.delete_object(**_address(url)))
            except ClientError as error:
                if not is_gone(error):  # some servers say so
                    raise

    def partials(self) -> Iterator[Entry]:
        root = _address(f"{self.url}/")
        request: dict[str, Any] = {"Bucket": root["Bucket"], "Prefix": root["Key"]}
        found: list[Entry] = []
        with _telling("list the uploads in parts below", self.url):
            while True:
                try:
                    page = self._patiently(partial(self._uploads, request))
                except ClientError as error:
                    if status(error) not in _NOT_THERE:
                        raise
                    return iter(())
                found += [
                    Entry(f"{item['Key'][len(root['Key']) :]}{_UPLOAD}{item['UploadId']}", 0, in_utc(item["Initiated"]))
                    for item in page.get("Uploads", [])
                    if item.keys() >= {"Key", "UploadId", "Initiated"}
                ]
                mark = {"KeyMarker": page.get("NextKeyMarker"), "UploadIdMarker": page.get("NextUploadIdMarker")}
                if not page.get("IsTruncated") or None in mark.values() or mark.items() <= request.items():
                    return iter(sorted(found))
                request |= mark

    def _uploads(self, request: dict[str, Any]) -> "ListMultipartUploadsOutputTypeDef":
        return self._client.list_multipart_uploads(**request)

    def discard(self, partial: Entry) -> None:
        key, _, upload = partial.key.rpartition(_UPLOAD)
        with _telling("delete", url := self.url_for(key)):
            try:
                self._patiently(lambda: self._client.abort_multipart_upload(**_address(url), UploadId=upload))
            except ClientError as error:
                if status(error) != 404:
                    raise

    def check(self) -> None:
        hurried, key = replace(self, hurried=True), f"probe-{uuid.uuid4().hex}"
        Store.check(hurried)
        hurried.write(key, b"tessera")
        try:
            if [(one.key, one.size) for one in hurried.list(key)] != [(key, len(b"tessera"))]:
                raise TesseraError(f"{self.url} does not list what was written, as S3 does")
        finally:
            hurried.delete(key)


class _S3Stream(io.RawIOBase):
    """An object's bytes; a lost connection is taken up where it broke, if the object is still the same."""

    def __init__(self, store: S3Store, url: str, answer: Any) -> None:
        self._store, self._url = store, url
        self._body, self._etag, self._position, self._broken = answer["Body"], answer.get("ETag"), 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        with _telling("read", self._url):
            count = self._store._patiently(partial(self._fill, buffer))
        self._position += count
        return count

    def _fill(self, buffer: "WriteableBuffer") -> int:
        if self._broken:
            self._body = self._rest()
        self._broken = True
        count: int = self._body.readinto(buffer)
        self._broken = False
        return count

    def _rest(self) -> Any:
        if self._etag is None:
            raise StoreError(f"cannot read {self._url} on: the connection broke, and the server gives no ETag")
        rest = {"Range": f"bytes={self._position}-", "IfMatch": self._etag}
        answer = self._store._client.get_object(**_address(self._url), **rest)
        if answer.get("ETag") != self._etag:
            raise StoreError(f"cannot read {self._url} on: it was replaced while being read")
        if self._position and answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
            raise StoreError(f"cannot read {self._url} on: the connection broke, and the server knows no Range")
        return answer["Body"]

    def readall(self) -> bytes:
        return b"".join(iter(partial(self.read, _BUFFER_BYTES), b""))

    def close(self) -> None:
        self._body.close()
        super().close()


_keeping = set[tuple[str | None, str]]()  # endpoints and buckets that have kept what they were asked to keep
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
        client = boto3.session.Session().client("s3", region_name=region, config=config)
    except InvalidRegionError as error:
        raise TesseraError(f"{error}: correct AWS_REGION") from error
    except ValueError as error:
        told = re.sub(r"\S*@", "***@", str(error))  # a password, however it is put
        raise TesseraError(f"{told}: AWS_ENDPOINT_URL must look like http://host:port") from error
    client.meta.events.register("after-call.s3", refuse_pages)
    return client


class _Address(TypedDict):
    Bucket: str
    Key: str


def _address(url: str) -> _Address:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


@contextmanager
def _telling(verb: str, url: str) -> Iterator[None]:
    """Turn what botocore or the server raises into a StoreError, or into what it says of the object."""
    try:
        yield
    except (BotoCoreError, ClientError, ResponseParserError, HTTPError, OSError) as error:
        kind = (
            NoSuchObject
            if is_gone(error)
            else DamagedObject
            if isinstance(error, FlexibleChecksumError)
            else StoreError
        )
        raise kind(f"cannot {verb} {url}: {cause(error)}") from error
