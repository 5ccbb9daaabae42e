"""Reading shards: whole, checked against their manifest, from this node's cache where there is one.

TESSERA_CACHE=<folder> keeps shards of s3:// stores below `<folder>/shards`, up to TESSERA_CACHE_GB (50) in all. These
are environment variables because where data is cached is no part of a run's identity, and recipes are hashed. A full
cache stays as it is: a shuffled pass reads every shard once, so whatever gave way to a newcomer would be missed next.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from infra.errors import TesseraError
from infra.store import Store, open_store
from preprocessing.sample import FIELDS
from preprocessing.shards import Shard

_BLOCK = 512


def read_shard_samples(store_url: str, shard: Shard) -> Iterator[dict[str, bytes]]:
    """The files of each sample of one shard by their extension, in the order of the tar.

    All of the shard is read and checked before the first sample is given. TesseraError, naming the URL, if it is
    missing, not what its manifest says, or not laid out as precompute does it.
    """
    store, found = open_store(store_url), 0
    url = store.url_for(shard.key)
    for _, files in groupby(files_in(_whole(store, shard), url), key=lambda file: file[0].partition(".")[0]):
        listed = [(name.partition(".")[2], data) for name, data in files]
        fields = dict(listed)
        if len(fields) < len(listed) or not fields.keys() >= FIELDS:
            break
        found += 1
        yield fields
    if found != len(shard.image_ids):
        expected = len(shard.image_ids)
        raise TesseraError(f"{url}: holds {found} whole samples, its record says {expected}; delete both and run again")


def files_in(tar: bytes, url: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a tar as precompute writes it; TesseraError, naming `url`, if it has other entries.

    Ten times as fast as tarfile (12 us a sample), which alone would cost a twelfth of decoding the JPEG. Contents are
    copies, as a view in a shuffle buffer would keep its whole shard in memory.
    """
    end = 0
    while tar[end : end + 1] > b"\0":  # after the last file come zeros, or nothing
        name, octal = tar[end : end + 100].rstrip(b"\0"), tar[end + 124 : end + 135]
        kind, long_name = tar[end + 156 : end + 157], tar[end + 345 : end + 346]
        if kind != b"0" or long_name != b"\0" or not name.isascii() or not octal.isdigit():  # a sign would lead back
            raise TesseraError(f"{url}: expected only plain files with names of 100 bytes at most; run precompute")
        start = end + _BLOCK
        end = start + int(octal, 8)
        if end > len(tar):
            raise TesseraError(f"{url}: ends within {name.decode()}; run precompute")
        yield name.decode(), tar[start:end]
        end += -end % _BLOCK


def _whole(store: Store, shard: Shard) -> bytes:
    """The tar: this node's copy, or the store's, which is then kept."""
    folder = os.environ.get("TESSERA_CACHE")
    if not folder or not store.url.startswith("s3://"):
        return _fetched(store, shard)
    cache = open_store(str(Path(folder) / "shards"))
    data = _kept(cache, shard)
    if data is None:
        data = _fetched(store, shard)
        _keep(cache, shard, data)
    return data


def _fetched(store: Store, shard: Shard) -> bytes:
    data = store.read(shard.key)
    if not _is(data, shard):
        raise TesseraError(
            f"{store.url_for(shard.key)}: expected {shard.bytes} bytes of sha256 {shard.sha256}, found {len(data)} of "
            f"{hashlib.sha256(data).hexdigest()}; delete it and run precompute again, which makes it anew"
        )
    return data


def _kept(cache: Store, shard: Shard) -> bytes | None:
    """The cache's copy, if there is a sound one. By its contents' hash two stores' shards can never be confused."""
    with suppress(TesseraError):  # what cannot be read here is read from the store
        if cache.exists(shard.sha256) and _is(data := cache.read(shard.sha256), shard):
            return data
    return None


def _keep(cache: Store, shard: Shard, data: bytes) -> None:
    """Put a shard into the cache while there is room; processes that do so at once may exceed it by a shard each."""
    limit = _limit_bytes()
    if cache.url in _given_up:
        return
    try:
        used = sum(entry.size for entry in cache.list() if entry.key != shard.sha256)
        if used + len(data) <= limit:
            cache.write(shard.sha256, data)
    except TesseraError as error:
        _given_up.add(cache.url)
        logging.getLogger(__name__).warning("shards are read without TESSERA_CACHE from now on: %s", error)


_given_up: set[str] = set()
"""Caches that this process failed to write to."""


def _is(data: bytes, shard: Shard) -> bool:
    return len(data) == shard.bytes and hashlib.sha256(data).hexdigest() == shard.sha256


def _limit_bytes() -> float:
    text = os.environ.get("TESSERA_CACHE_GB", "50")
    with suppress(ValueError):
        if (limit := float(text)) >= 0:
            return limit * 1e9
    raise TesseraError(f"TESSERA_CACHE_GB is {text!r}, expected how many GB the cache may take")
