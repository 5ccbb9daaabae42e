"""Files from a disk to the store, so that nobody takes half of them for all."""

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from infra import records
from infra.errors import StoreError, TesseraError
from infra.opening import read_regular
from infra.store import Entry, Store

WHOLE = "_SUCCESS"
"""The object that is written last into a folder of them."""
_COUNTED_BYTES = 200
_THREADS = 8
log = logging.getLogger("tessera.copy")


@dataclass(frozen=True)
class Counted:
    """What `_SUCCESS` says, where we have written it."""

    objects: int
    """In the folder, besides itself."""
    bytes: int
    """Of all of them."""

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> "Counted":
        """Of a listing."""
        rest = [entry.size for entry in entries if not entry.key.endswith(f"/{WHOLE}")]
        return cls(len(rest), sum(rest))


def counted(store: Store, place: str, entries: Sequence[Entry]) -> bool | None:
    """Whether all is below `place` that its `_SUCCESS` counts; None where that says nothing, as another's.

    entries: of a listing of it.
    """
    mark = next((entry for entry in entries if entry.key == f"{place}/{WHOLE}"), None)
    if mark is None or not 0 < mark.size <= _COUNTED_BYTES:
        return None
    try:
        said = records.parse(Counted, store.read(mark.key), mark.key)
    except StoreError:
        raise
    except TesseraError:
        return None
    return said == Counted.of(entries)


def copy_files(files: Mapping[str, Path], store: Store, place: str) -> None:
    """Put each file under `place` by its key there, what is there already left as it is; `_SUCCESS` last.

    So a copy that was killed is gone on with, and beside the same copy by another process nothing gets younger than its
    `_SUCCESS`. Objects that the folder has lost since are put there again. Raises StoreError, OSError.
    """
    there = {entry.key.removeprefix(f"{place}/") for entry in store.list(f"{place}/")}
    left = [(key, path) for key, path in files.items() if key not in there]
    if WHOLE in there and not left:
        log.info("%s: all of it is there already", store.url_for(place))
        return
    if WHOLE in there:  # or it would call whole what is not, and be older than the rest
        store.delete(f"{place}/{WHOLE}")
    with ThreadPoolExecutor(_THREADS) as pool:
        sent = pool.map(lambda item: store.create(f"{place}/{item[0]}", read_regular(item[1], links=False)), left)
        for number, _ in enumerate(sent, 1):
            if number % 1000 == 0 or number == len(left):
                log.info("%s: %d of %d files", store.url_for(place), number, len(left))
    whole = Counted.of([*store.list(f"{place}/")])
    store.create(f"{place}/{WHOLE}", json.dumps(asdict(whole)).encode())
