"""`python -m pipelines.upload FOLDER [STORAGE]`: put a data set into the inbox, and tell Prefect that it is there.

The same can be done with any S3 client: copy the folder to <storage>/inbox/<name>/, and write an object _SUCCESS there
last. Where PREFECT_API_URL is set, the event tessera.upload starts the deployments that wait for it.
"""

import argparse
import logging
import os
import re
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from infra import artifacts, logs
from infra.copying import WHOLE, copy_files
from infra.errors import TesseraError
from infra.opening import read_regular
from infra.store import Store, open_store
from infra.text import shown
from infra.walking import walk
from pipelines.jobs import StoredJob
from preprocessing.inbox import INBOX
from preprocessing.layouts import LAYOUTS, read_index

EVENT = "tessera.upload"
CLAIM = ".files"  # whose upload it is, in its folder
log = logging.getLogger("tessera.upload")


def upload(folder: Path, store: Store, name: str) -> int:
    """Copy all files below a folder into the inbox, those that are not there yet; `_SUCCESS` last. Gives their number.

    What is hidden (.env, .git/) is left out, with a warning. TesseraError for links, which may lead to anything; for a
    name that is none, or that other files have; and for zips: on a store nothing looks into them.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise TesseraError(f"{name!r} is no name for an upload: letters, digits, dots and dashes; give one with --name")
    place, files = f"{INBOX}/{name}", _files(folder)
    if zips := [key for key in files if key.lower().endswith(".zip")]:
        raise TesseraError(f"{folder / zips[0]}: unpack it first; zips are read from disks only")
    _claim(store, place, files)
    copy_files(files, store, place)
    return len(files)


def _files(folder: Path) -> dict[str, Path]:
    """By key below the upload. An own `_SUCCESS` is left out: it would call half an upload whole."""
    names, hidden = list[str](), list[str]()
    for found in walk(folder, lambda name: False):
        if any(part.startswith(".") for part in found.name.split("/")):
            hidden.append(found.name)
        elif found.status is None:
            remedy = "; `cp -rL` makes a copy without links" if Path(folder, found.name).is_symlink() else ""
            raise TesseraError(f"{folder / found.name}: {found.fault}{remedy}")
        else:
            names.append(found.name)
    if hidden:
        told = "%s: left out, since they are hidden: %d files, the first is %s"
        log.warning(told, shown(str(folder)), len(hidden), shown(min(hidden)))
    return {name: folder / name for name in sorted(names) if name != WHOLE}


def _claim(store: Store, place: str, files: dict[str, Path]) -> None:
    """Take the name for just these files, so that only the same upload goes on where it was killed."""
    with ThreadPoolExecutor(8) as pool:
        sums = [*pool.map(lambda path: zlib.crc32(read_regular(path, links=False)), files.values())]
    claim = artifacts.digest([*zip(files, sums, strict=True)]).encode()
    if not store.create(f"{place}/{CLAIM}", claim) and store.read(f"{place}/{CLAIM}") != claim:
        raise TesseraError(f"{store.url_for(place)}: taken by another upload; choose another --name")


def tell(store: Store, name: str) -> None:
    """Emit the event, if there is a Prefect server to emit it to."""
    if "PREFECT_API_URL" not in os.environ:
        log.info("PREFECT_API_URL is not set: the next scheduled retraining will find it")
        return
    url = os.environ["PREFECT_API_URL"]
    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    try:
        httpx.get(f"{url}/admin/version", timeout=10, auth=(user, password)).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        log.warning("not announced: %s does not answer (%s)", url, error)
        log.warning("the next scheduled retraining will find it, or the same command again announces it")
        return
    from prefect.events import emit_event
    from prefect.events.worker import EventsWorker

    resource = {"prefect.resource.id": f"tessera.inbox.{name}", "prefect.resource.name": name}
    emit_event(event=EVENT, resource=resource, payload={"storage": store.url, "upload": name})
    EventsWorker.instance().drain()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.upload", description=__doc__)
    parser.add_argument("folder", type=Path, help="a data set, as `data` of train-coco")
    parser.add_argument("storage", nargs="?", help="root of the storage (TESSERA_STORAGE)")
    parser.add_argument("--name", help="of the upload (the folder's)")
    parser.add_argument("--layout", choices=[*LAYOUTS], default="coco")
    parser.add_argument("--split", default="train2017", help="the split that is to be trained on (train2017)")
    asked = parser.parse_args(arguments)
    folder, name = asked.folder.resolve(), asked.name or asked.folder.resolve().name
    try:
        samples = len(read_index(folder, asked.split, asked.layout).records)  # what is none is seen before it is sent
        store = open_store(asked.storage or StoredJob().storage)
        count = upload(folder, store, name)
        log.info("%s: %d files, %d samples", store.url_for(f"{INBOX}/{name}"), count, samples)
        tell(store, name)
    except (TesseraError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    logs.to_stream(sys.stdout, logging.WARNING)
    sys.exit(main())
