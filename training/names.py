"""Names of runs: a name belongs to one config, so that a rerun of a changed one cannot pass for the same run."""

import json
from dataclasses import dataclass
from typing import Any

from infra import records
from infra.errors import TesseraError
from infra.records import Key
from infra.store import Store
from infra.text import quoted


@dataclass(frozen=True)
class _Named:
    """What a name was given to."""

    run: Key
    facts: dict[str, Any]


def refuse_changed(store: Store, name: str, facts: dict[str, Any]) -> None:
    """Raise TesseraError, with every difference, if the name has been given to other facts than these.

    Facts with another `init` than before are a fine-tuning, which may differ in all else.
    """
    key = _key(name)
    if not store.exists(key):
        return
    known, now = _flat(records.read(store, key, _Named).facts), _flat(facts)
    if facts.get("init") not in (None, known.get("init")):
        return
    differ = [
        f"{field}: {quoted(known.get(field))} so far, {quoted(now.get(field))} now"
        for field in sorted(known.keys() | now.keys())
        if known.get(field) != now.get(field) and field.split(".")[0] in facts
    ]
    if differ:
        raise TesseraError(
            f"the run named {name!r} has been trained with another config; {'; '.join(differ)}. Take another name, "
            "start the name anew (anew), or fine-tune (init)"
        )


def give(store: Store, name: str, run: str, facts: dict[str, Any]) -> None:
    """Give the name to the run at a folder, whoever had it."""
    store.write(_key(name), records.to_json(_Named(run, facts)))


def _key(name: str) -> str:
    return f"names/train/{name}.json"


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    """{"train.lr": 0.001, ...}; tuples and lists are alike, as in JSON."""
    if not isinstance(value, dict) or not value:
        return {place: json.loads(json.dumps(value))}
    parts = (_flat(below, f"{place}.{name}" if place else name) for name, below in value.items())
    return {field: found for part in parts for field, found in part.items()}
