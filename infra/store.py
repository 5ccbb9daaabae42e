"""The one module that opens the object store.

A store is one root URL: a folder (a path or a file:// URL) or s3://bucket/prefix on any S3-compatible server, whose
address and credentials come from the environment alone: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION. Both kinds behave the same. Keys are relative and "/"-separated; no key
may be the folder of another. What goes wrong is a TesseraError that names the operation, the URL and the cause.
"""

import io
import os
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
from urllib3.exceptions import HTTPError

from infra.errors import TesseraError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_ATTEMPTS = 4
_BUFFER_BYTES = 1 << 20
_PARTIAL = ".partial-"  # starts the name of a file still being written: no key, never listed
_LOST = (HTTPClientError, IncompleteReadError, HTTPError)  # a connection that broke under a stream
_REMEDIES = {
    "AccessDenied": "give these credentials the right to read, write, list and delete there",
    "403": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to credentials that may do this",
    "InvalidAccessKeyId": "set AWS_ACCESS_KEY_ID to one that the server knows",
    "SignatureDoesNotMatch": "set AWS_SECRET_ACCESS_KEY to the secret of this AWS_ACCESS_KEY_ID",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "NoSuchBucket": "create the bucket or correct the URL",
    "PreconditionFailed": "the object was replaced meanwhile",
    "EndpointConnectionError": "start the server or correct AWS_ENDPOINT_URL",
    "ConnectTimeoutError": "start the server or correct AWS_ENDPOINT_URL",
    "FileExistsError": "choose a folder that can be written",
    "NotADirectoryError": "choose a folder that can be written",
    "PermissionError": "choose a folder that this user may read and write",
}


@dataclass(frozen=True, order=True)
class Entry:
    """One object in a listing; `size` in bytes, `modified` in UTC."""

    key: str
    size: int
    modified: datetime


def open_store(url: str) -> "Store":
    """The store at a root URL; cheap, touches neither disk nor network (see Store.check)."""
    root = _normal(url)
    return S3Store(root) if root.startswith("s3://") else FolderStore(root)


def open_url(url: str) -> BinaryIO:
    """A stream over the object at a full URL, as made by Store.url_for; for webdataset's gopen."""
    root, slash, key = _normal(url).rpartition("/")
    return open_store(root + slash).open(key)


@dataclass(frozen=True)
class Store(ABC):
    """Objects under one root `url` (no trailing slash, absolute for a folder); pickles as that URL."""

    url: str

    def url_for(self, key: str) -> str:
        """The full URL of a key; TesseraError when the key is empty, absolute or has "." or ".." in it."""
        return f"{self.url.rstrip('/')}/{_checked(key)}"

    def read(self, key: str) -> bytes:
        """The whole object."""
        with self.open(key) as stream:
            return stream.read()

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A stream over the object as it is now, whatever replaces it meanwhile."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Put the object, whole or not at all, over any earlier one."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Put the object unless the key exists; of racing creators exactly one gets True."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is such an object."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The objects whose key starts with `prefix` (text, not only whole folders), sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object, if there is one."""

    def check(self) -> None:
        """Do once, on a tiny probe, all that a run will do; TesseraError within 10 s says what to repair."""
        key, data = f"probe-{uuid.uuid4().hex}", b"tessera"
        self.write(key, data)
        try:
            if self.create(key, b"") or self.read(key) != data:
                raise TesseraError(f"{self.url} is no safe store: it overwrote an object on a conditional write")
        finally:
            self.delete(key)


class FolderStore(Store):
    """A store in a local or mounted folder."""

    def open(self, key: str) -> BinaryIO:
        with self._telling("read", key) as path:
            return path.open("rb")

    def write(self, key: str, data: bytes) -> None:
        with self._telling("write", key) as path, _partial(path, data) as whole:
            whole.replace(path)

    def create(self, key: str, data: bytes) -> bool:
        with self._telling("create", key) as path, _partial(path, data) as whole:
            try:
                path.hardlink_to(whole)  # unlike a rename, refuses to replace
            except FileExistsError:
                return False
            return True

    def exists(self, key: str) -> bool:
        with self._telling("look up", key) as path:
            return path.is_file()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        root = Path(self.url)
        parent = root / _checked_prefix(prefix).rpartition("/")[0]
        with _telling("list", self.url):
            found = [(Path(path).relative_to(root).as_posix(), status) for path, status in _walk(parent)]
        for key, status in sorted(found):
            if key.startswith(prefix):
                yield Entry(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def delete(self, key: str) -> None:
        with self._telling("delete", key) as path, suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()

    @contextmanager
    def _telling(self, verb: str, key: str) -> Iterator[Path]:
        url = self.url_for(key)
        with _telling(verb, url):
            yield Path(url)
