"""The one module that opens the object store.

A store is one root URL: a folder (a path or a file:// URL) or s3://bucket/prefix on any S3-compatible
server, whose address and credentials come from the environment alone: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION. Both kinds behave alike. Keys are relative and "/"-separated; none may be
the folder of another. What goes wrong is a TesseraError that names the operation, the URL and the cause.
"""

import io
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, TypedDict
from urllib.parse import urlsplit
from urllib.request import url2pathname

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
from urllib3.exceptions import HTTPError

from infra.errors import TesseraError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from mypy_boto3_s3 import S3Client

_REQUESTS = 12  # of botocore, whose waits double from 50 ms up to 20 s, each at random down to 0: half a minute in all
_ATTEMPTS = 4  # to read a body whose connection breaks; each is patient in its requests
_BUFFER_BYTES = 1 << 20
_PARTIAL = ".partial-"  # starts the name of a file still being written: no key, never listed
_LOST = (HTTPClientError, IncompleteReadError, HTTPError)  # a connection that broke under a stream
_UNREACHED = "start the server or correct AWS_ENDPOINT_URL"
_UNUSABLE = "choose a folder that this user may read and write"
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
    "FileExistsError": _UNUSABLE,
    "NotADirectoryError": _UNUSABLE,
    "PermissionError": _UNUSABLE,
}


@dataclass(frozen=True, order=True)
class Entry:
    """One object in a listing; `size` in bytes, `modified` in UTC."""

    key: str
    size: int
    modified: datetime


def open_store(url: str) -> "Store":
    """The store at a root URL; connects to nothing (Store.check does). TesseraError if it is no such URL."""
    root = _normal(url)
    return S3Store(root) if root.startswith("s3://") else FolderStore(root)


@dataclass(frozen=True)
class Store(ABC):
    """Objects under one root `url`: no trailing slash, absolute for a folder. Pickles as that URL."""

    url: str

    def url_for(self, key: str) -> str:
        """The full URL of a key; TesseraError if that could lie outside the root."""
        return f"{self.url.rstrip('/')}/{_checked(key)}"

    def read(self, key: str) -> bytes:
        """The whole object."""
        with self.open(key) as stream:
            return stream.read()

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A stream over one state of the object: when another takes its place, reading goes on or fails."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Put the object, whole or not at all, in place of any earlier one."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Put the object unless the key exists; of racing creators exactly one gets True."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is such an object."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The objects whose key starts with the text `prefix`, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object if there is one."""

    def check(self) -> None:
        """Do to a small probe what a run will do to its objects; TesseraError in about 10 s at most."""
        key, data = f"probe-{uuid.uuid4().hex}", b"tessera"
        self.write(key, data)
        try:
            if self.create(key, b"") or self.read(key) != data:
                raise TesseraError(f"{self.url} replaces objects that it was asked to keep (If-None-Match)")
        finally:
            self.delete(key)


class FolderStore(Store):
    """A store in a local or mounted folder."""

    def open(self, key: str) -> BinaryIO:
        with _telling("read", url := self.url_for(key)):
            return Path(url).open("rb")

    def write(self, key: str, data: bytes) -> None:
        with _telling("write", url := self.url_for(key)), _partial(Path(url), data) as whole:
            whole.replace(url)

    def create(self, key: str, data: bytes) -> bool:
        with _telling("create", url := self.url_for(key)), _partial(Path(url), data) as whole:
            try:
                Path(url).hardlink_to(whole)  # a rename would replace
            except FileExistsError:
                return False
            return True

    def exists(self, key: str) -> bool:
        with _telling("look up", url := self.url_for(key)):
            return Path(url).is_file()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        root = Path(self.url)
        with _telling("list", self.url):
            found = [
                Entry(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))
                for path, status in _walk(root / _checked_prefix(prefix).rpartition("/")[0])
                if (key := path.relative_to(root).as_posix()).startswith(prefix)
            ]
        return iter(sorted(found))

    def delete(self, key: str) -> None:
        with _telling("delete", url := self.url_for(key)), suppress(FileNotFoundError, NotADirectoryError):
            Path(url).unlink()


@dataclass(frozen=True)
class S3Store(Store):
    """A store in a bucket; `hurried` gives up within 10 s where patience would outlast a restart."""

    hurried: bool = False

    @property
    def _client(self) -> "S3Client":
        environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
        with _CONNECTING:
            return _connect(os.getpid(), environment, self.hurried)

    def read(self, key: str) -> bytes:
        with _telling("read", url := self.url_for(key)):  # at once: half the work of a stream's pieces
            for attempt in range(_ATTEMPTS):
                with suppress(*(_LOST if attempt < _ATTEMPTS - 1 else ())):
                    return self._client.get_object(**_address(url))["Body"].read()
        raise AssertionError("the last attempt returns or raises")

    def open(self, key: str) -> BinaryIO:
        with _telling("read", url := self.url_for(key)):
            get = partial(self._client.get_object, **_address(url))
            return io.BufferedReader(_S3Stream(url, get, get()), _BUFFER_BYTES)

    def write(self, key: str, data: bytes) -> None:
        with _telling("write", url := self.url_for(key)):
            self._client.put_object(**_address(url), Body=data, ChecksumAlgorithm="CRC32")

    def create(self, key: str, data: bytes) -> bool:
        writer = {"writer": uuid.uuid4().hex}
        with _telling("create", url := self.url_for(key)):
            try:
                self._client.put_object(
                    **_address(url), Body=data, ChecksumAlgorithm="CRC32", IfNoneMatch="*", Metadata=writer
                )
            except ClientError as error:
                if _status(error) != 412:
                    raise
                # Our own put is there when its answer was lost and botocore sent it again.
                return self._client.head_object(**_address(url))["Metadata"] == writer
            return True

    def exists(self, key: str) -> bool:
        with _telling("look up", url := self.url_for(key)):
            try:
                self._client.head_object(**_address(url))
            except ClientError as error:
                if _status(error) != 404:
                    raise
                return False
            return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        root = _address(f"{self.url}/")
        start = len(root["Key"])
        with _telling("list", self.url):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=root["Bucket"], Prefix=root["Key"] + _checked_prefix(prefix)
            )
            found = [
                Entry(item["Key"][start:], item["Size"], item["LastModified"].astimezone(UTC))
                for page in pages
                for item in page.get("Contents", [])
                if not item["Key"].endswith("/")  # pyarrow and web consoles leave such marks for folders
            ]
        return iter(sorted(found))  # SeaweedFS and S3 Express have their own order

    def delete(self, key: str) -> None:
        with _telling("delete", url := self.url_for(key)):
            self._client.delete_object(**_address(url))

    def check(self) -> None:
        Store.check(replace(self, hurried=True))


class _S3Stream(io.RawIOBase):
    """An object's bytes; a lost connection is taken up where it broke, if the object is still the same."""

    def __init__(self, url: str, get: Callable[..., Any], answer: Any) -> None:
        self._url, self._get = url, get
        self._body, self._etag, self._position = answer["Body"], answer["ETag"], 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", attempts: int = _ATTEMPTS) -> int:
        with _telling("read", self._url):
            try:
                count = self._body.readinto(buffer)
            except _LOST:
                if attempts == 1:
                    raise
                self._body = self._get(Range=f"bytes={self._position}-", IfMatch=self._etag)["Body"]
                return self.readinto(buffer, attempts - 1)
        self._position += count
        return count

    def readall(self) -> bytes:
        return b"".join(iter(partial(self.read, _BUFFER_BYTES), b""))

    def close(self) -> None:
        self._body.close()
        super().close()


_CONNECTING = Lock()
# Or a child forked while another thread connects would find the lock held for ever.
os.register_at_fork(before=_CONNECTING.acquire, after_in_parent=_CONNECTING.release, after_in_child=_CONNECTING.release)


@lru_cache(maxsize=16)
def _connect(pid: int, environment: tuple[tuple[str, str], ...], hurried: bool) -> "S3Client":
    """One client for each process, as sockets do not survive a fork, and for each set of AWS_* variables."""
    seconds, attempts = (3, 2) if hurried else (30, _REQUESTS)
    config = Config(
        connect_timeout=min(5, seconds),
        read_timeout=seconds,
        retries={"mode": "standard", "total_max_attempts": attempts},
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


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


@contextmanager
def _telling(verb: str, url: str) -> Iterator[None]:
    """Turn what the disk or the server raises into a TesseraError."""
    try:
        yield
    except (BotoCoreError, ClientError, HTTPError, OSError) as error:
        raise TesseraError(f"cannot {verb} {url}: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    name, cause = type(error).__name__, getattr(error, "strerror", None) or str(error)
    if isinstance(error, ClientError):
        name = error.response["Error"]["Code"]
        cause = f"{error.response['Error'].get('Message') or 'refused'} ({name})"
    return f"{cause}; {_REMEDIES[name]}" if name in _REMEDIES else cause


def _normal(url: str) -> str:
    """s3://bucket/prefix without a trailing slash, or an absolute path."""
    scheme, separator, rest = url.partition("://")
    if scheme == "s3" and rest.strip("/"):
        return f"s3://{_checked(rest.rstrip('/'))}"
    if url.startswith("file:///"):
        return str(Path(url2pathname(urlsplit(url).path)).resolve())
    if url and not separator:
        return str(Path(url).expanduser().resolve())
    raise TesseraError(f"{url!r} is no store: use a folder, file:///folder or s3://bucket/prefix")


def _checked(key: str) -> str:
    parts = key.split("/")
    if {"", ".", ".."}.intersection(parts) or not key.isprintable() or f"/{_PARTIAL}" in f"/{key}":
        raise TesseraError(f"{key!r} is no key: it must be relative, printable, without empty, . or .. parts")
    return key


def _checked_prefix(prefix: str) -> str:
    if prefix:
        _checked(prefix.removesuffix("/"))
    return prefix


@contextmanager
def _partial(path: Path, data: bytes) -> Iterator[Path]:
    """A file beside `path` that holds `data`, safe on disk; gone afterwards unless renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{_PARTIAL}{uuid.uuid4().hex}")
    try:
        with whole.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def _walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files under a folder, none if there is no such folder; files may come and go meanwhile."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
        for item in found:
            if item.is_dir():
                yield from _walk(Path(item))
            elif not item.name.startswith(_PARTIAL):
                with suppress(FileNotFoundError):
                    yield Path(item), item.stat()
