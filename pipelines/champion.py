"""`python -m pipelines.champion [STORAGE]`: which run is in use, and all that were.

--set EVALUATION names the run of a finished evaluation, and begins a line: retrain fine-tunes from it, with its recipe,
and measures on its val images. --back goes back to the run before, --back NUMBER to that entry. Nothing is ever lost:
each is one more entry.
"""

import argparse
import sys
from collections.abc import Sequence

from evaluation.champion import give, go_back, history
from infra.errors import TesseraError
from infra.in_use import in_use
from infra.store import open_store
from pipelines.jobs import StoredJob

_BEFORE = ()  # no number; and no text, which argparse would read as one


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.champion", description=__doc__)
    parser.add_argument("storage", nargs="?", help="root of the storage (TESSERA_STORAGE)")
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--set", metavar="EVALUATION", help="<storage>/evaluate/<hash>")
    change.add_argument("--back", metavar="NUMBER", nargs="?", type=int, const=_BEFORE, help="roll back")
    asked = parser.parse_args(arguments)
    try:
        store = open_store(asked.storage or StoredJob().storage)
        if asked.set is not None:
            with in_use(store, "evaluate/"):
                give(store, asked.set)
        if asked.back is not None:
            go_back(store, None if asked.back == _BEFORE else asked.back)
        entries = history(store)
    except TesseraError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.writelines(f"{'*' if entry is entries[-1] else ' '} {entry}\n" for entry in entries)
    if not entries:
        sys.stdout.write(f"{store.url}: no champion yet\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
