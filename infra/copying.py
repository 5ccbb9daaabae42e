"""Files from a disk to the store, so that nobody takes half of them for all."""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from infra.store import Store

WHOLE = "_SUCCESS"
"""The object that is written last into a folder of them."""
_THREADS = 8
log = logging.getLogger("tessera.copy")


def copy_files(files: Mapping[str, Path], store: Store, place: str) -> None:
    """Put each file under `place` by its key there, what is there already left as it is; `_SUCCESS` last.

    So a copy that was killed is gone on with, and beside the same copy by another process nothing gets younger than its
    `_SUCCESS`. Raises StoreError, OSError.
    """
    there = {entry.key.removeprefix(f"{place}/") for entry in store.list(f"{place}/")}
    left = [(key, path) for key, path in files.items() if key not in there]
    with ThreadPoolExecutor(_THREADS) as pool:
        sent = pool.map(lambda item: store.create(f"{place}/{item[0]}", item[1].read_bytes()), left)
        for number, _ in enumerate(sent, 1):
            if number % 1000 == 0 or number == len(left):
                log.info("%s: %d of %d files", store.url_for(place), number, len(left))
    store.create(f"{place}/{WHOLE}", b"")
