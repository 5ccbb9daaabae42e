"""`python -m pipelines.retention [STORAGE]`: what is on the store by size and age, and what nothing needs any more.

It only lists; --delete looks again and deletes what may go, while work that wants to begin waits. What may go and what
always stays: evaluation.retention.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta

from evaluation.retention import refuse_foreign, survey, sweep, to_text
from infra import logs
from infra.errors import TesseraError
from infra.store import open_store
from pipelines.jobs import StoredJob


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.retention", description=__doc__)
    parser.add_argument("storage", nargs="?", help="root of the storage (TESSERA_STORAGE)")
    parser.add_argument(
        "--older", metavar="DAYS", type=_days, default=timedelta(days=30), help="keep what is younger (30)"
    )
    parser.add_argument("--delete", action="store_true", help="delete it; without, nothing is changed")
    asked = parser.parse_args(arguments)
    try:
        store = open_store(asked.storage or StoredJob().storage)
        refuse_foreign(store)
        if asked.delete:
            sweep(store, asked.older, _tell)
            return 0
        found = survey(store, asked.older)
    except TesseraError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    _tell(to_text(found))
    if found.candidates:
        _tell("\nnothing was deleted: --delete does it")
    return 0


def _days(text: str) -> timedelta:
    try:
        age = timedelta(days=float(text))
    except (ValueError, OverflowError):
        age = timedelta(-1)
    if age < timedelta():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of days, 0 or more")
    return age


def _tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    logs.to_stream(sys.stderr, logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or work would wait for it until it counts as dead
    sys.exit(main())
