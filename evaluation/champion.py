"""The champion: which finished run is in use, as numbered entries that are only ever added.

`champion/<number>.json` is created, never replaced, and the highest number is the champion. So of all who have seen
entry n and want another run in its place exactly one gets n + 1, what was is never lost, and a roll-back is an entry
like any other.
"""

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from evaluation.bootstrap import Interval, difference_intervals
from evaluation.compare import read_evaluation
from evaluation.report import Finished, GroupPQ
from infra import artifacts, records
from infra.errors import TesseraError
from infra.records import Count, Key
from infra.store import Store, open_store
from infra.text import shown

FOLDER = "champion"
_ENTRY = re.compile(rf"{FOLDER}/\d{{6,}}\.json")


@dataclass(frozen=True)
class Champion:
    """One entry."""

    number: Count
    run: Key
    """Folder of the finished run."""
    evaluation: Key
    """Folder of its evaluation; all entries of a line are evaluated on the same images."""
    root: Key
    """Folder of the evaluation that the line began with: its run's recipe and data are what fine-tuning starts from."""
    pq: GroupPQ
    """By group, percent."""
    how: str
    """given, promoted, or rolled back."""
    by: str | None
    """Id of the flow run that promoted it."""
    time: str

    @property
    def line(self) -> str:
        """Name of its line: all entries that began with the same evaluation."""
        return self.root.rpartition("/")[2]

    def __str__(self) -> str:
        pq = "none" if (value := self.pq["all"]) is None else f"{value:.2f}"
        return f"{self.number:3d}  {shown(self.time)}  PQ {pq}  {shown(self.run)}  {shown(self.how)}"


@dataclass(frozen=True)
class Verdict:
    """Whether a challenger may take a champion's place."""

    champion: int
    """Number of the entry that it was compared with."""
    difference: float
    """PQ of the challenger minus PQ of the champion, percent."""
    interval: Interval
    """95 %, paired bootstrap over the images."""
    margin: float
    better: bool
    """Whether the whole interval lies above the margin."""

    def __str__(self) -> str:
        low, high = self.interval
        bar = f"{self.margin:+.2f}"
        told = f"above {bar}" if self.better else f"not above {bar} as a whole"
        return f"PQ {self.difference:+.2f} ({low:+.2f} to {high:+.2f}) against champion {self.champion}, {told}"


def history(store: Store) -> list[Champion]:
    """All entries, the first one first."""
    return [_read(store, key) for key in _keys(store)]


def current(store: Store) -> Champion:
    """The champion. TesseraError if none was ever named."""
    keys = _keys(store)
    if not keys:
        raise TesseraError(
            f"{store.url}: no champion yet; name one: python -m pipelines.champion {store.url} --set <evaluation>"
        )
    return _read(store, keys[-1])


def _keys(store: Store) -> list[str]:
    """Of the entries, in their order; what else may lie there, as a .DS_Store, is none. TesseraError where one is
    missing: they are numbered from 1, and none is ever deleted."""
    keys = sorted((e.key for e in store.list(f"{FOLDER}/") if _ENTRY.fullmatch(e.key)), key=lambda key: (len(key), key))
    for number, key in enumerate(keys, start=1):
        if key != _key(number):
            raise TesseraError(
                f"{store.url_for(_key(number))}: it is missing, and {key} is there; put it back, or move {FOLDER}/ "
                "elsewhere and name a champion anew (--set)"
            )
    return keys


def _read(store: Store, key: str) -> Champion:
    found = records.read(store, key, Champion)
    if key != _key(found.number):
        raise TesseraError(f"{store.url_for(key)}: it says that it is number {found.number}")
    return found


def _key(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"


def follow(store: Store, entry: Champion) -> bool:
    """Add the entry, if no other one has its number yet: True for exactly one of all that try."""
    return store.create(_key(entry.number), records.to_json(entry))


def give(store: Store, evaluation: str) -> Champion:
    """Make the run of a finished evaluation the champion and the beginning of a line. TesseraError if there is none."""
    root, path = artifacts.split_url(evaluation, "evaluate")
    if root != store.url:
        raise TesseraError(f"{evaluation}: expected an evaluation of this storage, {store.url}")
    read_evaluation(evaluation)  # or it could be compared with nothing
    entry = _entry(store, path, path, 1, "given", None)
    artifacts.refuse_lost(store, entry.run)
    before = history(store)
    if before and (before[-1].evaluation, before[-1].root) == (path, path):
        return before[-1]  # it is already
    return _added(store, replace(entry, number=before[-1].number + 1 if before else 1))


def go_back(store: Store, number: int | None = None) -> Champion:
    """Make the run of an earlier entry the champion again; without a number, the last one of another run."""
    before = history(store)
    now = before[-1] if before else current(store)
    other = [e for e in before if (e.run != now.run if number is None else e.number == number)]
    if not other:
        wanted = "of another run" if number is None else f"number {number}"
        raise TesseraError(f"{store.url}: no entry {wanted} to go back to; there are {len(before)}")
    target = other[-1]
    artifacts.refuse_lost(store, target.run)
    how = f"rolled back to {target.number}"
    return _added(store, replace(target, number=now.number + 1, how=how, by=None, time=_now()))


def judge(store: Store, champion: Champion, evaluation: str, challenger: str, margin: float) -> Verdict:
    """Compare two evaluations on the same images.

    evaluation: the champion's, challenger: the other's folder. margin: PQ, percent. TesseraError where either is not
    finished, or of other images.
    """
    first, second = (read_evaluation(store.url_for(path)) for path in (evaluation, challenger))
    interval = difference_intervals(first.table, second.table, first.val_set.labels)["all"]
    before, after = first.summary["pq"]["all"], second.summary["pq"]["all"]
    if interval is None or before is None or after is None:
        raise TesseraError(f"{store.url_for(challenger)}: no category occurs in its images, nothing can be compared")
    return Verdict(champion.number, after - before, interval, margin, interval[0] > margin)


def promote(store: Store, champion: Champion, challenger: str, flow_run: str | None) -> Champion | None:
    """Put the run of an evaluation in the place of the champion that it beat; None if another one was faster."""
    entry = _entry(store, challenger, champion.root, champion.number + 1, "promoted", flow_run)
    return entry if follow(store, entry) else None


def resolve(url: str) -> str:
    """URL of a run: that of the champion for `<storage>/champion`, any other as it is."""
    storage, _, name = url.rstrip("/").rpartition("/")
    if name != FOLDER or not storage:
        return url
    store = open_store(storage)
    return store.url_for(current(store).run)


def _added(store: Store, entry: Champion) -> Champion:
    if not follow(store, entry):
        raise TesseraError(f"{store.url}: another champion was named at the same moment; look, and ask again")
    return entry


def _entry(store: Store, path: str, root: str, number: int, how: str, by: str | None) -> Champion:
    manifest = artifacts.read_manifest(store, path, Finished)
    assert manifest is not None  # it was read before
    return Champion(number, manifest.run, path, root, manifest.pq, how, by, _now())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
