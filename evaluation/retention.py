"""What lies on a store, and what of it nothing needs any more.

Kept is what a manifest, an entry of the champion's history, the plan of a round, a name or work in progress refers to,
and what is younger than asked for. The rest of these may go, for each can be made again from what stays: shards that no
set lists, checkpoints of finished runs, runs and reports and rounds that were given up, and finished reports to which
no champion, round or grid refers. Weights and manifests of finished runs, sets, champions, grids, names, the inbox,
synthetic sets and all that Tessera does not know always stay. So do sets that nothing refers to: they are small, a run
reads its labels from one, and that a set is the val set of a run only its reports say.

An entry of an upload that cannot be listed is told and in nobody's way; elsewhere it ends the command, and so does a
time in the future, by which nothing's age could be told.

Looking costs one listing of the store and one read for each manifest, plan, champion and name, 16 at a time; no other
object is opened. 200 of them among 5000 objects took 2 to 6 s on a SeaweedFS beside it, two cores shared with much
else (0.9 s of CPU). Deleting costs one request an object, 16 at a time (3400 in 9 to 30 s there), and no work begins on
the store meanwhile.
"""

import errno
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from evaluation.references import REFERS, texts_of
from infra.artifacts import MANIFEST
from infra.errors import StoreError, TesseraError
from infra.in_use import FOLDER as RUNNING
from infra.in_use import Mark, running, surveying, sweeping
from infra.store import Entry, Store
from infra.text import shown

KINDS = {
    "precompute": "data sets",
    "train": "runs",
    "evaluate": "reports",
    "retrain": "rounds",
    "ablate": "grids",
    "tune": "tunings",
    "champion": "champions",
    "inbox": "inbox",
    "data": "synthetic sets",
    "uploads": "decisions",
    "quarantine": "quarantine",
    "names": "names",
    RUNNING: "work in progress",
}
"""By folder under the store's root. Spelled out here: the modules that write them bring torch and Ray along."""

_SHARDS, _CHECKPOINTS, _OTHER, _PARTIALS = "shards", "checkpoints", "other", "unfinished writes"
_CLOSED = "inbox/"
_WRITING = timedelta(days=1)
"""No write of one object takes so long."""
_THREADS = 16
_TELL_SECONDS = 5.0
_HASH = "[0-9a-f]{16}"
_PROBE = re.compile(r"probe[-/][0-9a-f]{32}$")
_CHECKPOINT = re.compile(rf"train/{_HASH}/checkpoints/\d+\.pt$")
_UNIT = re.compile(
    rf"precompute/shards/{_HASH}(?=\.(tar|json)$)|(train|evaluate|retrain)/{_HASH}(?=/|$)|{_PROBE.pattern}"
    rf"|data/synthetic-{_HASH}\.part-[^/]+(?=/)"  # a synthetic set that was being written
)


@dataclass(frozen=True)
class Candidate:
    """What may be deleted, all of it or nothing."""

    key: str
    """What all of its keys begin with."""
    reason: str
    entries: tuple[Entry, ...]
    newest: datetime
    """When the last object was written of all that it belongs to."""
    partial: bool = False
    """Whether it is no object, but what the store calls a partial."""

    @property
    def bytes(self) -> int:
        """Of all of its objects."""
        return sum(entry.size for entry in self.entries)


@dataclass(frozen=True)
class Survey:
    """What lies on a store."""

    url: str
    now: datetime
    """By the store's clock."""
    older: timedelta
    """What is younger is kept."""
    held: tuple[str, ...]
    """Prefixes that work in progress needs."""
    entries: tuple[Entry, ...]
    partials: tuple[Entry, ...]
    """What is being written, or was when its writer was killed."""
    faults: tuple[tuple[str, str], ...]
    """(key, why) of what cannot be listed, in the inbox."""
    candidates: tuple[Candidate, ...]
    """The biggest first."""


def kind_of(key: str) -> str:
    """Which kind of thing an object belongs to."""
    if key.startswith("precompute/shards/"):
        return _SHARDS
    if _CHECKPOINT.match(key):
        return _CHECKPOINTS
    if _PROBE.match(key):
        return KINDS[RUNNING]
    top, _, inside = key.partition("/")
    return KINDS.get(top, _OTHER) if inside else _OTHER


def survey(store: Store, older: timedelta) -> Survey:
    """Look, and delete nothing. Raises TesseraError for a manifest or a time that cannot be believed."""
    with surveying(store) as mark:
        return _look(mark, older, watch=False)


def sweep(store: Store, older: timedelta, tell: Callable[[str], None]) -> Survey:
    """Look, tell what is there, and delete all candidates; new work waits meanwhile.

    A sweep that was killed leaves nothing that looks finished and is not, and the next one finishes it. Raises
    TesseraError for a manifest that cannot be read and for times that are implausible, before anything is deleted.
    """
    with ExitStack() as stack:
        try:
            mark = stack.enter_context(sweeping(store))
        except StoreError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _make_room(store, tell)
            mark = stack.enter_context(sweeping(store))
        found = _look(mark, older, watch=True)  # here, since what was seen before may be needed by now
        tell(to_text(found))
        _delete(mark, found.candidates, tell)
        return found


def _make_room(store: Store, tell: Callable[[str], None]) -> None:
    """On a disk so full that no empty file finds room, delete what no time of the store is needed for: by this
    machine's clock, what a writer began more than a day ago."""
    old = [entry for entry in store.partials() if datetime.now(UTC) - entry.modified >= _WRITING]
    for entry in old:
        store.discard(entry)
    tell(f"the store is full: deleted {len(old)} unfinished writes, {_size(sum(entry.size for entry in old))}")


def refuse_foreign(store: Store) -> None:
    """Raise TesseraError for a store on which nothing of Tessera lies: a URL mistyped."""
    for top in ("precompute", "train", "champion", "inbox"):
        found = store.look(f"{top}/", _CLOSED)
        if found.entries or found.faults:
            return
    raise TesseraError(f"{store.url}: nothing of Tessera lies there (expected the root of a storage)")


def _look(mark: Mark, older: timedelta, watch: bool) -> Survey:
    store, listing = mark.store, mark.store.look(closed=_CLOSED)
    for key, why in listing.faults:
        if not key.startswith(_CLOSED):
            raise TesseraError(f"{store.url}/{key}: {why}; what lies there may be needed, nothing was deleted")
    entries, partials = listing.entries, tuple(store.partials())
    named = _named(store, [entry.key for entry in entries if REFERS.match(entry.key)])
    now, progress = mark.now(), running(mark, watch)  # after the listing: what it shows is no younger
    mark.refuse_future([*partials, *(entry for entry in entries if _unit(entry.key))], now)
    found = [*_units(entries, named, progress.held), *_killed(entries, progress.dead)]
    candidates = [
        one
        for one in found
        if now - one.newest >= older and not any(_overlap(one.key, prefix) for prefix in progress.held)
    ]
    candidates += [
        Candidate(one.key, "its writer was killed", (one,), one.modified, partial=True)
        for one in partials
        if now - one.modified >= _WRITING
    ]
    candidates.sort(key=lambda one: (-one.bytes, one.key))
    return Survey(store.url, now, older, progress.held, entries, partials, listing.faults, tuple(candidates))


def _named(store: Store, keys: Sequence[str]) -> set[str]:
    """The units that the contents of any of these keys refer to."""
    with ThreadPoolExecutor(_THREADS) as pool:  # the time goes into waiting for the store
        return {unit for units in pool.map(partial(_named_by, store), keys) for unit in units}


def _named_by(store: Store, key: str) -> set[str]:
    """Any text in it that is a unit's key counts, whatever the field: rather keep too much."""
    try:
        content = texts_of(store, key)
    except TesseraError as error:
        raise TesseraError(f"{error}; nothing was deleted") from error
    return {unit for text in content if (unit := _unit(text.removeprefix(f"{store.url}/")))}


def _unit(key: str) -> str | None:
    """The folder, or the name of the shard, that is deleted as a whole; None for keys that are never deleted."""
    found = _UNIT.match(key)
    return found[0] if found else None


def _units(entries: Sequence[Entry], named: set[str], held: Sequence[str]) -> Iterator[Candidate]:
    units = dict[str, list[Entry]]()
    for entry in entries:
        if unit := _unit(entry.key):
            units.setdefault(unit, []).append(entry)
    for unit, parts in units.items():
        newest, done = max(part.modified for part in parts), any(part.key == f"{unit}/{MANIFEST}" for part in parts)
        states = tuple(part for part in parts if _CHECKPOINT.match(part.key))
        if done and states:
            yield Candidate(f"{unit}/checkpoints/", "the run is finished", states, newest)
        reason = None if unit in named else _reason(unit, done, bool(states), held)
        if reason is not None:
            key = unit if kind_of(parts[0].key) in (_SHARDS, KINDS[RUNNING]) else f"{unit}/"
            yield Candidate(key, reason, tuple(parts), newest)


def _reason(unit: str, done: bool, states: bool, held: Sequence[str]) -> str | None:
    """Why a unit may go that nothing refers to; None if it is kept nevertheless."""
    match unit.partition("/")[0]:
        case "precompute":
            return "no set lists it"
        case "evaluate":
            return "no champion, round or grid refers to it" if done else "unfinished"
        case "train":
            # The weights of a best checkpoint lie in a folder of their own, which the run does not say it needs.
            written = not states and any(_overlap("train/", prefix) for prefix in held)
            return None if done or written else "unfinished, and no name refers to it"
        case "retrain":
            # Between its steps a round says nothing: any work in progress may be of it.
            return None if done or held else "given up without a verdict"
        case "data":
            return "its writer was killed"
        case _:
            return "left by a check of the store that was killed"


def _killed(entries: Sequence[Entry], dead: Sequence[str]) -> Iterator[Candidate]:
    for entry in entries:
        if entry.key in dead:
            yield Candidate(entry.key, "its work was killed", (entry,), entry.modified)


def _overlap(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


def _delete(mark: Mark, candidates: Sequence[Candidate], tell: Callable[[str], None]) -> None:
    """What says that something is done goes first: what remains after a kill is made anew by whoever wants it."""
    stages: tuple[list[Entry], ...] = ([], [], [], [])
    for one in candidates:
        for entry in one.entries:
            stages[0 if one.partial else _stage(entry.key)].append(entry)
    objects, size = sum(map(len, stages)), sum(one.bytes for one in candidates)
    done, freed, told = 0, 0, time.monotonic()

    def partial_gone(entry: Entry) -> None:
        mark.refuse_lapsed()
        mark.store.discard(entry)

    def object_gone(entry: Entry) -> None:
        mark.refuse_lapsed()
        mark.store.delete(entry.key)

    with ThreadPoolExecutor(_THREADS) as pool:
        for number, stage in enumerate(stages):  # the next one only begins when all of this one are gone
            gone = pool.map(object_gone if number else partial_gone, stage)
            for entry, _ in zip(stage, gone, strict=True):
                done, freed = done + 1, freed + entry.size
                if time.monotonic() - told >= _TELL_SECONDS:
                    told = time.monotonic()
                    tell(f"deleted {done} of {objects} objects, {_size(freed)} of {_size(size)}")
    tell(f"deleted {done} of {objects} objects, {_size(freed)} of {_size(size)}")


def _stage(key: str) -> int:
    if key.endswith(f"/{MANIFEST}"):
        return 1
    # Records: evaluation reads one instead of writing the shard's PNGs, precompute instead of making the tar.
    return 2 if key.endswith(".json") and "/shards/" in key else 3


def to_text(found: Survey) -> str:
    """A table by kind, in which this command itself is work in progress, and the candidates."""
    days = found.older / timedelta(days=1)
    lines = [f"{found.url}: what is younger than {days:g} days is kept"]
    if found.held:
        lines.append(f"in use by work in progress: {', '.join(map(shown, found.held))}")
    lines += [f"cannot be listed, left as it is: {shown(key)}: {why}" for key, why in found.faults]
    lines += ["", *_table(found), ""]
    if not found.candidates:
        return "\n".join([*lines, "nothing may be deleted"])
    lines.append(f"{'may go':>9} {'objects':>8} {'age':>7}  what")
    for one in found.candidates:
        age = _age(found.now - one.newest)
        lines.append(f"{_size(one.bytes):>9} {len(one.entries):>8} {age:>7}  {shown(one.key)}: {one.reason}")
    return "\n".join(lines)


def _table(found: Survey) -> Iterator[str]:
    yield _line("", "objects", "size", "newest", "oldest", "may go", "why")
    names = ("data sets", _SHARDS, "runs", _CHECKPOINTS, *KINDS.values(), _OTHER, _PARTIALS)
    kinds = {kind: list[Entry]() for kind in names}
    for entry in found.entries:
        kinds[kind_of(entry.key)].append(entry)
    kinds[_PARTIALS] += found.partials
    going = [(one, entry) for one in found.candidates for entry in one.entries]
    for kind, entries in kinds.items():
        if entries:
            of_kind = [(c.reason, e) for c, e in going if (_PARTIALS if c.partial else kind_of(e.key)) == kind]
            yield _row(found.now, kind, entries, of_kind)
    yield _row(found.now, "all", (*found.entries, *found.partials), [("", entry) for _, entry in going])


def _row(now: datetime, kind: str, entries: Sequence[Entry], going: Sequence[tuple[str, Entry]]) -> str:
    times = [entry.modified for entry in entries]
    reasons = Counter(reason for reason, _ in going if reason)
    size, free = _size(sum(entry.size for entry in entries)), _size(sum(entry.size for _, entry in going))
    why = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    ages = _age(now - max(times)), _age(now - min(times))
    return _line(kind, str(len(entries)), size, *ages, free if going else "-", why)


def _line(kind: str, objects: str, size: str, newest: str, oldest: str, free: str, why: str) -> str:
    return f"{kind:<16} {objects:>8} {size:>9} {newest:>7} {oldest:>7} {free:>9}  {why}".rstrip()


def _age(age: timedelta) -> str:
    return f"{max(0, age.days)} d"


def _size(count: int) -> str:
    """Of bytes, in decimal units."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
