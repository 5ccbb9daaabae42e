"""What work in progress needs of the store, so that retention leaves it alone.

Work says what it needs before it looks at it, under `running/`, and says so again every minute until it ends. Retention
says there that it is at work, and then reads what is in use. Each side writes first and looks second, so at least one
of the two sees the other.

What has said nothing for a quarter of an hour is dead. The time is the store's: that of the mark which the asking side
has just written. Clocks may be wrong nevertheless, since on a mounted folder each machine may date its own files. So a
mark of the future is alive; retention believes none dead before it has seen it stay silent for more than a beat, by a
clock of its own process that nobody sets; and it refuses where a mark that beats is dated wrong. A retention's mark
that stays as it is for a quarter of an hour, by the same clock, is dead for work, whatever its date.
"""

import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from infra import records
from infra.errors import NoSuchObject, TesseraError
from infra.store import Entry, Store

FOLDER = "running"
_BEAT_SECONDS = 60.0
_DEAD_SECONDS = 900.0  # longer than a store may be away (TESSERA_STORE_PATIENCE) and back
_AHEAD_SECONDS = 60.0  # by which times may lie in the future: S3's have whole seconds, its servers clocks of their own
_LAPSED_SECONDS = _DEAD_SECONDS / 3
_POLL_SECONDS = 1.0
_SWEEP, _SURVEY = f"{FOLDER}/retention-", f"{FOLDER}/survey-"
_MARK = re.compile(rf"{FOLDER}/(retention-|survey-)?[0-9a-f]{{32}}\.json")
log = logging.getLogger("tessera.store")


@dataclass(frozen=True)
class Said:
    """What work writes into its mark."""

    prefixes: tuple[str, ...]
    host: str = ""
    pid: int = 0


@dataclass(frozen=True)
class Mark:
    """An object under `running/` that is ours."""

    store: Store
    key: str
    content: bytes
    beats: list[float] = field(default_factory=list)
    """When it was written, by `_uptime`."""

    def beat(self) -> None:
        """Say it again."""
        self.store.write(self.key, self.content)
        self.beats.append(_uptime())

    def refuse_lapsed(self) -> None:
        """TesseraError where nothing was said for so long, as a process was stopped or a machine asleep, that others
        may have begun to work meanwhile."""
        silent = _uptime() - self.beats[-1]
        if silent > _LAPSED_SECONDS:
            raise TesseraError(
                f"{self.store.url}: this retention said nothing for {silent:.0f} s (stopped, asleep, or the store was "
                "away), so others may have begun to work; nothing more was deleted, run it again"
            )

    def now(self) -> datetime:
        """The time by the store's clock: that of the mark, which is written anew."""
        self.beat()
        return self.store.stat(self.key).modified

    def refuse_future(self, entries: Sequence[Entry], now: datetime) -> None:
        """TesseraError for an object that is dated after `now`: then no age is to be believed."""
        for entry in entries:
            ahead = (entry.modified - now).total_seconds()
            if ahead > _AHEAD_SECONDS:
                raise _implausible(self.store, entry, f"{ahead:.0f} s after this moment")


def store_time(store: Store) -> datetime:
    """The time by the store's own clock: that of an object that is written for it."""
    mark = Mark(store, f"{_SURVEY}{uuid.uuid4().hex}.json", b"")
    try:
        return mark.now()
    finally:
        store.delete(mark.key)


@contextmanager
def in_use(store: Store, *prefixes: str) -> Iterator[None]:
    """Keep retention from all keys that start so, until the way out. Waits for a retention that is at work."""
    said = Said(prefixes, socket.gethostname(), os.getpid())
    with _said(store, f"{FOLDER}/{uuid.uuid4().hex}.json", records.to_json(said)) as mark:
        seen = dict[str, tuple[datetime, float]]()
        told = False
        while _sweeps(mark, seen):
            if not told:
                log.info("%s: waiting for a retention that deletes what nothing refers to", store.url)
            told = True
            time.sleep(_POLL_SECONDS)
        yield


def _sweeps(mark: Mark, seen: dict[str, tuple[datetime, float]]) -> bool:
    """Whether a retention is at work. seen: when the marks of each were written, and since when we have known that."""
    entries = _marks(mark.store, _SWEEP)
    for entry in _alive(entries, mark.now()) if entries else ():
        if entry.key not in seen or seen[entry.key][0] != entry.modified:
            seen[entry.key] = entry.modified, time.monotonic()
        if time.monotonic() - seen[entry.key][1] < _DEAD_SECONDS:
            return True
        log.warning("%s: left by a retention that was killed: deleted", mark.store.url_for(entry.key))
        mark.store.delete(entry.key)
    return False


@contextmanager
def sweeping(store: Store) -> Iterator[Mark]:
    """Keep new work from beginning until the way out. The mark is empty, so that it has room on a full disk."""
    with _said(store, f"{_SWEEP}{uuid.uuid4().hex}.json", b"") as mark:
        yield mark


@contextmanager
def surveying(store: Store) -> Iterator[Mark]:
    """As `sweeping`, and keeps nobody waiting: for who deletes nothing."""
    with _said(store, f"{_SURVEY}{uuid.uuid4().hex}.json", b"") as mark:
        yield mark


@dataclass(frozen=True)
class Running:
    """What is in progress on a store."""

    held: tuple[str, ...]
    """Prefixes of keys that it needs."""
    dead: tuple[str, ...]
    """Keys of marks whose work was killed."""


def running(mark: Mark, watch: bool) -> Running:
    """What is in progress besides ourselves.

    watch: believe no mark dead that has not stayed silent before our eyes; for who deletes. Raises TesseraError, naming
    the mark, where the time of one is implausible, and for one that cannot be read.
    """
    silent = _silent(mark)
    if silent and watch:
        log.info("%s: watching for %g s whether what looks killed is", mark.store.url, 2.5 * _BEAT_SECONDS)
        time.sleep(2.5 * _BEAT_SECONDS)
        before, silent = silent, _silent(mark)
        for key, entry in silent.items():
            if key in before and before[key].modified != entry.modified:
                raise _implausible(mark.store, entry, "long ago, and it has just been written")
    entries = _marks(mark.store)
    alive = [entry.key for entry in entries if entry.key not in silent and not entry.key.startswith((_SWEEP, _SURVEY))]
    found = set[str]()
    for key in alive:
        with suppress(NoSuchObject):  # it has ended since
            found.update(records.read(mark.store, key, Said).prefixes)
    return Running(tuple(sorted(found)), tuple(sorted(silent)))


def _silent(mark: Mark) -> dict[str, Entry]:
    """The marks that look dead, by key."""
    now, entries = mark.now(), _marks(mark.store)
    mark.refuse_future(entries, now)
    alive = {entry.key for entry in _alive(entries, now)}
    return {entry.key: entry for entry in entries if entry.key not in alive and entry.key != mark.key}


def _marks(store: Store, prefix: str = f"{FOLDER}/") -> list[Entry]:
    """What work has said, and nothing that others may have left there."""
    return [entry for entry in store.list(prefix) if _MARK.fullmatch(entry.key)]


def _alive(entries: Sequence[Entry], now: datetime) -> list[Entry]:
    """Those that were said lately, or are dated in the future."""
    return [entry for entry in entries if now - entry.modified < timedelta(seconds=_DEAD_SECONDS)]


def _uptime() -> float:
    """Seconds, also while the machine sleeps, where the system tells them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _implausible(store: Store, entry: Entry, when: str) -> TesseraError:
    url = store.url_for(entry.key)
    return TesseraError(
        f"{url}: dated {entry.modified.isoformat(timespec='seconds')}, {when}: the clock of this machine, of the store "
        "or of whoever wrote it is wrong, and ages say nothing; set it right, or delete this object if nothing needs "
        "it; nothing was deleted"
    )


@contextmanager
def _said(store: Store, key: str, content: bytes) -> Iterator[Mark]:
    """Hold the key, written anew every minute."""
    mark, ended = Mark(store, key, content), threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_SECONDS):
            try:
                mark.beat()
            except TesseraError as error:  # a store that is away: work has its own patience
                log.warning("%s", error)

    mark.beat()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield mark
    finally:
        ended.set()
        thread.join()
        try:
            store.delete(key)
        except TesseraError as error:  # dead in a quarter of an hour, and the work itself is done
            log.warning("%s", error)
