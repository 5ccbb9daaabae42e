"""Where a step's output lies, and how a step says that it is done.

Path = step name + hash of the whole config, the step's schema version and the inputs' hashes. The manifest
is written last; its presence means done, so a rerun is a no-op and two configs never overwrite each other.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, TypeVar, overload

from infra import records
from infra.errors import TesseraError
from infra.store import Store, open_store

MANIFEST = "manifest.json"
T = TypeVar("T")
PROMISED: dict[str, tuple[str, ...]] = {
    "train": ("model.safetensors", "metrics.parquet"),
    "evaluate": ("predictions.json", "images.json", "report.json", "report.md", "report.html"),
    "retrain": ("compare.html",),
    "ablate": ("table.parquet", "report.md", "report.html"),
    "tune": (),
}
"""By step: what lies beside the manifest of each that is finished. "Done" is believed where all of it is there."""


def digest(*facts: Any) -> str:
    """16 hex digits over dataclasses, lists, dicts and scalars, independent of process and machine."""
    text = json.dumps(facts, sort_keys=True, default=records.plain, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def step_path(step: str, schema: int, config: Any, inputs: Sequence[str] = ()) -> str:
    """`<step>/<hash>`: the folder, relative to the store's root, of this step's output."""
    return f"{step}/{digest(step, schema, config, list(inputs))}"


def split_url(url: str, step: str) -> tuple[str, str]:
    """(root of the storage, folder under it) of the URL of a step's output. TesseraError if it is none by its form."""
    root, _, name = open_store(url).url.rpartition(f"/{step}/")
    if not root or not name or "/" in name:
        raise TesseraError(f"{url}: expected the URL of what is finished, <storage>/{step}/<hash>")
    return root, f"{step}/{name}"


@overload
def read_manifest(store: Store, path: str) -> dict[str, Any] | None: ...
@overload
def read_manifest(store: Store, path: str, kind: type[T]) -> T | None: ...
def read_manifest(store: Store, path: str, kind: Any = dict[str, Any]) -> Any:
    """The manifest of a finished step, read as `kind` (records.parse), or None. TesseraError, naming its URL, for one
    that is damaged or another."""
    key = f"{path}/{MANIFEST}"
    return records.read(store, key, kind) if store.exists(key) else None


def write_manifest(store: Store, path: str, content: dict[str, Any]) -> None:
    """Declare the step done. Racing writers of one path hold equal content, so the first one stays."""
    store.create(f"{path}/{MANIFEST}", records.to_json(content))


def lost(store: Store, path: str, *more: str) -> list[str]:
    """What the manifest of a finished step promises beside itself, and the store has not: names in its folder.

    more: names that only some steps of its kind have.
    """
    return [name for name in (*PROMISED[path.partition("/")[0]], *more) if not store.exists(f"{path}/{name}")]


def refuse_lost(store: Store, path: str) -> None:
    """TesseraError, with what to do, for a finished step that has lost something."""
    if names := lost(store, path):
        url = store.url_for(path)
        raise TesseraError(
            f"{url}: it is finished, and {', '.join(names)} of it is gone; put that back, or delete {url}/{MANIFEST} "
            "and run again what has made it"
        )
