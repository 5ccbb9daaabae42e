"""What work in progress needs of the store, so that retention leaves it alone.

Work says what it needs before it looks at it, under `running/`, and says so again every minute until it ends; what has
said nothing for a quarter of an hour (of the store's own clock) is dead. Retention says there that it is at work, and
then reads what is in use. Each side writes first and looks second, so at least one of the two sees the other.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from infra.errors import NoSuchObject, TesseraError
from infra.store import Store

FOLDER = "running"
_BEAT_SECONDS = 60.0
_DEAD_SECONDS = 900.0  # longer than a store may be away (TESSERA_STORE_PATIENCE) and back
_POLL_SECONDS = 1.0
_SWEEP = f"{FOLDER}/retention-"
log = logging.getLogger("tessera.store")


@contextmanager
def in_use(store: Store, *prefixes: str) -> Iterator[None]:
    """Keep retention from all keys that start so, until the way out. Waits for a retention that is at work."""
    with _said(store, f"{FOLDER}/{uuid.uuid4().hex}.json", prefixes):
        told = False
        while any(key.startswith(_SWEEP) for key in _alive(store)):
            if not told:
                log.info("%s: waiting for a retention that deletes what nothing refers to", store.url)
            told = True
            time.sleep(_POLL_SECONDS)
        yield


@contextmanager
def sweeping(store: Store) -> Iterator[tuple[str, ...]]:
    """Keep new work from beginning until the way out; gives the prefixes that are in use by what runs already."""
    with _said(store, f"{_SWEEP}{uuid.uuid4().hex}.json", ()):
        yield used(store)


def used(store: Store) -> tuple[str, ...]:
    """The prefixes that work in progress has said it needs."""
    found = set[str]()
    for key in _alive(store):
        with suppress(NoSuchObject):  # it has ended since
            found.update(json.loads(store.read(key))["prefixes"])
    return tuple(sorted(found))


def dead(store: Store) -> list[str]:
    """Keys that work has left behind which was killed."""
    return sorted({entry.key for entry in store.list(f"{FOLDER}/")} - {*_alive(store)})


def _alive(store: Store) -> list[str]:
    entries = [*store.list(f"{FOLDER}/")]
    newest = max((entry.modified for entry in entries), default=None)  # who asks has just written: the store's now
    return [e.key for e in entries if newest is not None and (newest - e.modified).total_seconds() < _DEAD_SECONDS]


@contextmanager
def _said(store: Store, key: str, prefixes: tuple[str, ...]) -> Iterator[None]:
    """Hold the key, written anew every minute."""
    content = json.dumps({"prefixes": prefixes, "host": socket.gethostname(), "pid": os.getpid()}).encode()
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_SECONDS):
            try:
                store.write(key, content)
            except TesseraError as error:  # a store that is away: work has its own patience
                log.warning("%s", error)

    store.write(key, content)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        try:
            store.delete(key)
        except TesseraError as error:  # dead in a quarter of an hour, and the work itself is done
            log.warning("%s", error)
