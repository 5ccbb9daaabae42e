"""Objects on a store that refer to others, and what they must say of them for retention to believe them.

Spelled out here, and no more of each than this: the modules that write them bring torch and Ray along.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from infra import records
from infra.artifacts import MANIFEST
from infra.records import Key
from infra.store import Store

REFERS = re.compile(
    rf"(?!inbox/|quarantine/).*/{MANIFEST}$|retrain/[^/]+/plan\.json$"
    r"|champion/\d{6,}\.json$|names/train/[^/.][^/]*\.json$"
)
"""Their keys."""


@dataclass(frozen=True)
class _Keyed:
    key: Key


@dataclass(frozen=True)
class _Set:
    shards: tuple[_Keyed, ...]


@dataclass(frozen=True)
class _Run:
    train_set: Key
    init: Key | None = None
    best_of: Key | None = None


@dataclass(frozen=True)
class _Report:
    run: Key
    val_set: Key


@dataclass(frozen=True)
class _Plan:
    train_set: Key
    init: Key
    run: Key


@dataclass(frozen=True)
class _Round:
    evaluations: tuple[Key, ...]
    round: _Plan | None = None
    evaluation: Key | None = None


@dataclass(frozen=True)
class _Grid:
    runs: tuple[Key, ...]
    evaluations: tuple[Key, ...]


@dataclass(frozen=True)
class _Champion:
    run: Key
    evaluation: Key
    root: Key


@dataclass(frozen=True)
class _Name:
    run: Key


_READ: dict[str, type] = {
    "precompute": _Set,
    "train": _Run,
    "evaluate": _Report,
    "retrain": _Round,
    "ablate": _Grid,
    "champion": _Champion,
    "names": _Name,
}
"""What must be said, by folder, in an object that refers to others."""


def texts_of(store: Store, key: str) -> Iterator[str]:
    """All strings in such an object. TesseraError, naming its URL, if it does not say what it must."""
    data, url = store.read(key), store.url_for(key)
    records.parse(_Plan if key.endswith("/plan.json") else _READ.get(key.partition("/")[0], dict), data, url)
    return _texts(records.parse(dict[str, Any], data, url))


def _texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _texts(below)
