"""A round of retraining: one train set and one setting, one challenger, one verdict.

`retrain/<hash>/plan.json` says which weights it starts from; it is created once, so that whoever takes up a round that
was killed, or runs beside another, trains the same challenger. `manifest.json`, last, says what came of it.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evaluation.champion import Champion, Verdict, history, judge, promote
from evaluation.compare import compare, read_evaluation, to_html
from evaluation.report import Finished, GroupPQ
from infra import artifacts, records
from infra.errors import TesseraError
from infra.records import Count, Key
from infra.store import Store

SCHEMA_VERSION = 1
FOLDER = "retrain"
log = logging.getLogger("tessera.retrain")


@dataclass(frozen=True)
class Round:
    """What a round starts from."""

    path: Key
    """Its folder."""
    root: Key
    """Folder of the evaluation that the line began with."""
    train_set: Key
    champion: Count
    """Number of the champion at its beginning."""
    init: Key
    """Folder of the run whose weights the challenger starts with: that champion's."""
    run: Key
    """The challenger's folder."""
    uploads: tuple[str, ...]
    """Titles of the accepted uploads, by then."""


@dataclass(frozen=True)
class Outcome:
    """What came of a round."""

    round: Round
    evaluation: str
    """Folder of the challenger's evaluation."""
    pq: GroupPQ
    """The challenger's, by group, percent."""
    verdict: Verdict
    promoted: int | None
    """Number of the champion that it became."""
    page: str
    """Key of the comparison with the champion."""


def round_path(settings: dict[str, Any], root: str, train_set: str) -> str:
    """Folder of the round. root: evaluation that the champion's line began with."""
    return artifacts.step_path(FOLDER, SCHEMA_VERSION, settings, [root, train_set])


def begin(store: Store, planned: Round) -> Round:
    """Fix what the round starts from, or return what was fixed before."""
    key = f"{planned.path}/plan.json"
    if store.create(key, records.to_json(planned)):
        return planned
    found = records.read(store, key, Round)
    if (found.path, found.root, found.train_set) != (planned.path, planned.root, planned.train_set):
        raise TesseraError(f"{store.url_for(key)}: it is the plan of another round, {found.path}")
    return found


def settle(
    store: Store,
    begun: Round,
    challenger: str,
    margin: float,
    evaluated: Callable[[Champion], str],
    flow_run: str | None,
) -> tuple[Verdict, Champion, Champion | None]:
    """Promote the challenger if it beats the champion of this moment. Gives the verdict, with whom, and the new entry.

    challenger: folder of its evaluation. evaluated: gives a champion's. What an earlier attempt or a run beside this
    one has done already stands, even if the champion was rolled back since. TesseraError if another line has begun.
    """
    while True:
        entries = history(store)
        won = next((e for e in entries if e.run == begun.run and e.number > begun.champion), None)
        against = entries[-1] if won is None else entries[entries.index(won) - 1]
        if against.root != begun.root:
            raise TesseraError(
                f"{store.url}: champion {against.number} begins another line; what was trained for the one before is "
                f"left as it is, {begun.run}"
            )
        verdict = judge(store, against, evaluated(against), challenger, margin)
        if won is not None or not verdict.better:
            return verdict, against, won
        entry = promote(store, against, challenger, flow_run)
        if entry is not None:
            return verdict, against, entry
        log.info("another champion was named at the same moment: comparing with that one")


def finish(
    store: Store, begun: Round, verdict: Verdict, beaten: str, challenger: str, promoted: Champion | None
) -> Outcome:
    """Write the comparison's page and the manifest. beaten, challenger: folders of the two evaluations."""
    page = _write_page(store, begun.path, [beaten, challenger])
    manifest = artifacts.read_manifest(store, challenger, Finished)
    assert manifest is not None  # it was compared
    number = None if promoted is None else promoted.number
    outcome = Outcome(begun, challenger, manifest.pq, verdict, number, page)
    content = asdict(outcome) | {"runs": [begun.run], "evaluations": [beaten, challenger]}
    artifacts.write_manifest(store, begun.path, content)
    return outcome


@dataclass(frozen=True)
class _Finished:
    """What the manifest of a round says of its page."""

    evaluations: tuple[Key, ...]


def mend(store: Store, path: str) -> None:
    """Write the page of a finished round again, if it is gone; nothing is judged anew."""
    finished = artifacts.read_manifest(store, path, _Finished)
    if finished is not None and artifacts.lost(store, path):
        log.warning("%s: its page is gone: made again", store.url_for(path))
        _write_page(store, path, finished.evaluations)


def _write_page(store: Store, path: str, evaluations: Sequence[str]) -> str:
    """Its key."""
    page = f"{path}/compare.html"
    store.write(page, to_html(compare([read_evaluation(store.url_for(one)) for one in evaluations])).encode())
    return page
