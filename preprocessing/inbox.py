"""The inbox: data sets put under `inbox/<upload>/` of the store, and what became of each.

An upload is a folder in any layout. `_SUCCESS` in it says that it is whole; it is left alone until that is there, while
anything is younger than it, and until nothing has changed for a minute, since some tools copy `_SUCCESS` before the
images (or until all is there that our own `_SUCCESS` counts). What became of it is
`uploads/<line>/<upload>-<version>.json`, created once; its objects stay where they are, and change nothing once they
are decided on. When an upload is mended and its `_SUCCESS` written again, it is another version and looked at anew. A
line of champions decides for itself: it has its own categories, grid and val images.
"""

import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal

from infra import artifacts, records
from infra.copying import WHOLE, counted
from infra.errors import StoreError, TesseraError
from infra.in_use import store_time
from infra.page import UNKNOWN
from infra.records import Count, Key
from infra.store import Entry, Store
from infra.text import shown
from preprocessing.labels import LabelTable
from preprocessing.source import Index, Rejected
from preprocessing.validate import Findings, examine_index, to_html

INBOX, DECISIONS, QUARANTINE = "inbox", "uploads", "quarantine"
SETTLED = timedelta(minutes=1)
"""In an upload nothing may have changed for so long, by the store's clock."""
_DECISION = re.compile(rf"{DECISIONS}/[^/]+/[A-Za-z0-9][A-Za-z0-9._-]*\.json")
log = logging.getLogger("tessera.inbox")


def _title(name: str, version: str) -> str:
    """The name, where that can be a file's anywhere, and the version."""
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name)
    return f"{name if plain else artifacts.digest(name)}-{version}"


@dataclass(frozen=True)
class Upload:
    """A data set in the inbox."""

    name: str
    version: str
    """Changes with any of its objects."""
    objects: int
    bytes: int
    waits: str = ""
    """Why it is left alone for now."""
    settles: bool = False
    """Whether it is, only because something in it has just changed."""
    faults: tuple[tuple[str, str], ...] = ()
    """(key, why) of what cannot be listed."""

    @property
    def whole(self) -> bool:
        """Whether all of it is there."""
        return not self.waits

    @property
    def folder(self) -> str:
        """Where it lies under the store's root."""
        return f"{INBOX}/{self.name}"

    @property
    def title(self) -> str:
        """What its decision and its report are called."""
        return _title(self.name, self.version)


@dataclass(frozen=True)
class Decision:
    """What became of one version of an upload."""

    upload: str
    version: str
    state: Literal["accepted", "known", "quarantined", "withdrawn"]
    """known: all of its images were in the train set before. withdrawn: accepted once, and taken back by hand."""
    time: str
    shards: Key | None = None
    """Folder of its set of shards, if it was accepted."""
    samples: Count = 0
    """Those that were new and good."""
    known: Count = 0
    """Those that were there before: left out, whatever is annotated now."""
    rejected: tuple[Rejected, ...] = ()
    reason: str | None = None
    """Why the whole of it is in quarantine."""
    report: Key | None = None
    """Key of a page about what was set aside."""

    def __post_init__(self) -> None:
        if self.state == "accepted" and self.shards is None:
            raise TesseraError("an accepted upload without shards")

    @property
    def title(self) -> str:
        """The upload's."""
        return _title(self.upload, self.version)

    def brief(self, storage: str) -> str:
        """In one line, and where to read on. storage: URL of the store."""
        known = f", {self.known} known already" if self.known else ""
        aside = f", {len(self.rejected)} set aside" if self.rejected else ""
        report = f", see {storage}/{self.report}" if self.report else ""
        return f"{shown(self.upload)} {self.state}, {self.samples} new samples{known}{aside}{report}"

    def __str__(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"{self.brief('').partition(', see ')[0]}{why}"


def uploads(store: Store) -> tuple[Upload, ...]:
    """All that lies in the inbox, by name; objects that are in no upload's folder are told in the log.

    What cannot be listed is a fault of its upload. Raises StoreError where that is the inbox itself.
    """
    listing = store.look(f"{INBOX}/", closed=f"{INBOX}/")
    folders, faults = dict[str, list[Entry]](), dict[str, list[tuple[str, str]]]()
    for entry in listing.entries:
        name, inside, _ = entry.key.removeprefix(f"{INBOX}/").partition("/")
        if not inside:
            told = "%s/%s: expected %s/<upload>/..., a folder for each upload"
            log.warning(told, store.url, shown(entry.key), INBOX)
            continue
        folders.setdefault(name, []).append(entry)
    for key, why in listing.faults:
        if key == INBOX:
            raise StoreError(f"cannot list {store.url}/{key}: {why}")
        faults.setdefault(key.split("/")[1], []).append((key, why))
    marked = any(entry.key == f"{INBOX}/{name}/{WHOLE}" for name, entries in folders.items() for entry in entries)
    now = store_time(store) if marked else None
    names = sorted({*folders, *faults})
    return tuple(_upload(store, name, folders.get(name, []), faults.get(name, []), now) for name in names)


def _upload(
    store: Store, name: str, entries: Sequence[Entry], faults: Sequence[tuple[str, str]], now: datetime | None
) -> Upload:
    facts: list[Any] = [(entry.key, entry.size, entry.modified.isoformat()) for entry in entries]
    version = artifacts.digest([*facts, *faults])
    waits, settles = _waits(store, name, entries, now), False
    if not waits and now is not None:
        newest = max(entry.arrived or entry.modified for entry in entries)
        settles = now - newest < SETTLED and not counted(store, f"{INBOX}/{name}", entries)
        waits = f"something in it has changed within the last {SETTLED.seconds} s" if settles else ""
    size = sum(entry.size for entry in entries)
    return Upload(name, version, len(entries), size, waits, settles, tuple(faults))


def _waits(store: Store, name: str, entries: Sequence[Entry], now: datetime | None) -> str:
    """Why an upload is not whole, whatever the time."""
    mark = next((entry for entry in entries if entry.key == f"{INBOX}/{name}/{WHOLE}"), None)
    if mark is None or now is None:
        return f"not whole yet: no {WHOLE}"
    newest = max(entries, key=lambda entry: entry.modified)
    if newest.modified > mark.modified:
        return f"not whole yet: {shown(newest.key)} is younger than its {WHOLE}, write that again"
    return ""


def decisions(store: Store, line: str) -> dict[str, Decision]:
    """By Upload.title, all that a line has made."""
    keys = [entry.key for entry in store.list(f"{DECISIONS}/{line}/") if _DECISION.fullmatch(entry.key)]
    with ThreadPoolExecutor(16) as pool:  # the time goes into waiting for the store
        found = pool.map(partial(_read, store), keys)
        return {key.rpartition("/")[2].removesuffix(".json"): one for key, one in zip(keys, found, strict=True)}


def _read(store: Store, key: str) -> Decision:
    found = records.read(store, key, Decision)
    if not key.endswith(f"-{found.version}.json"):
        raise TesseraError(f"{store.url_for(key)}: it is the decision on another version, {found.version}")
    return found


def decide(store: Store, line: str, upload: Upload, page: str | None = None, **facts: Any) -> Decision:
    """Write what became of an upload, its report first; of racing writers the first one's stays and is returned."""
    name = upload.name.encode(errors="backslashreplace").decode()  # one that is no UTF-8 is read back so
    found = Decision(name, upload.version, time=datetime.now(UTC).isoformat(timespec="seconds"), **facts)
    if page is not None:
        found = replace(found, report=f"{QUARANTINE}/{line}/{upload.title}/report.html")
        store.write(f"{QUARANTINE}/{line}/{upload.title}/report.html", page.encode())
    key = f"{DECISIONS}/{line}/{upload.title}.json"
    if store.create(key, records.to_json(found)):
        return found
    return _read(store, key)


def withdraw(store: Store, line: str, name: str) -> list[Decision]:
    """Take back all accepted versions of an upload: later rounds train without it. TesseraError if there is none."""
    found = {
        t: d for t, d in decisions(store, line).items() if shown(d.upload) == shown(name) and d.state == "accepted"
    }
    if not found:
        raise TesseraError(f"{store.url}/{INBOX}/{name}: no accepted upload, nothing to withdraw")
    taken = {title: replace(decision, state="withdrawn") for title, decision in found.items()}
    for title, decision in taken.items():
        store.write(f"{DECISIONS}/{line}/{title}.json", records.to_json(decision))
    return [*taken.values()]


def refuse_faults(store: Store, upload: Upload) -> None:
    """TesseraError for what in an upload cannot be listed, as a link: in a folder it could lead to all that the worker
    may read."""
    faults = upload.faults or store.look(f"{upload.folder}/", closed=f"{INBOX}/").faults  # it may be new
    for key, why in faults:
        more = f", and {len(faults) - 1} more such entries" if len(faults) > 1 else ""
        raise TesseraError(f"{store.url}/{key}: {why}{more}")


@dataclass(frozen=True)
class Sifted:
    """What of an upload is new."""

    index: Index
    known: int
    """Samples that are in the train set already."""


def sift(index: Index, labels: LabelTable, train: frozenset[int], val: frozenset[int]) -> Sifted:
    """Leave out what the train set has already, and set aside what must not be in it: images of the val set.

    train, val: image ids. Raises TesseraError for other categories than `labels`.
    """
    if differ := index.labels.difference(labels):
        raise TesseraError(f"its categories are not those of the train set: {differ}")
    index = index.under(labels)
    fresh = tuple(r for r in index.records if r.image_id not in train | val)
    leaked = [r for r in index.records if r.image_id in val]
    reason = "the image is in the val set: to train on it would make PQ there meaningless"
    rejected = (*index.rejected, *(Rejected(r.image_id, str(r.image), reason) for r in leaked))
    known = len(index.records) - len(fresh) - len(leaked)
    return Sifted(replace(index, records=fresh, rejected=rejected), known)


def page(url: str, index: Index | None, rejected: Sequence[Rejected], reason: str | None) -> str:
    """validate's page of the samples that were set aside. index: None where there is none."""
    reasons = [] if reason is None else [reason]
    if index is None:
        return to_html(url, {}, {}, [*reasons, *map(str, rejected)])
    bad = {r.image_id for r in rejected}
    aside = replace(index, records=tuple(r for r in index.records if r.image_id in bad), unused=())
    found: dict[str, tuple[LabelTable, Findings]] = {
        "set aside": examine_index(aside, "set aside", 1, lambda line: None)
    }
    return to_html(url, {"data set": str(index.origin or UNKNOWN)}, found, reasons)
