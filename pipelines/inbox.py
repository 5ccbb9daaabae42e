"""`python -m pipelines.inbox [STORAGE]`: what lies in the inbox, and what the champion's line made of
each upload.

--withdraw UPLOAD takes an accepted one back: from the next round on it is not trained on. Its files stay.
"""

import argparse
import sys
from collections.abc import Sequence

from evaluation.champion import current, history
from infra.errors import TesseraError
from infra.store import open_store
from infra.text import shown
from pipelines.jobs import StoredJob
from preprocessing.inbox import decisions, uploads, withdraw


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.inbox", description=__doc__)
    parser.add_argument("storage", nargs="?", help="root of the storage (TESSERA_STORAGE)")
    parser.add_argument("--withdraw", metavar="UPLOAD", help="take an accepted upload back")
    asked = parser.parse_args(arguments)
    try:
        store = open_store(asked.storage or StoredJob().storage)
        if asked.withdraw is not None:
            withdraw(store, current(store).line, asked.withdraw)
        entries = history(store)
        found, known = uploads(store), decisions(store, entries[-1].line) if entries else {}
    except TesseraError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    for upload in found:
        decision = known.get(upload.title)
        told = f"{shown(upload.name)} {upload.waits or 'waits for the next round'}"
        told = told if decision is None else decision.brief(store.url)
        sys.stdout.write(f"{told} ({upload.objects} objects, {upload.bytes / 1e6:.1f} MB)\n")
        sys.stdout.writelines(f"  {shown(key)}: {why}\n" for key, why in upload.faults)
    if not found:
        sys.stdout.write(f"{store.url}: the inbox is empty\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
