"""`make machines`: train-coco on two machines with the store and the Prefect server on a third, all on this host.

`python -m tests.machines [--out FOLDER]`, as root. Exit code 1 if anything was not as it was to be. Writes story.md,
doctor.txt, traffic.png and screenshots of the Prefect UI.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.day.chronicle import Chronicle
from tests.machines import picture
from tests.machines.net import machines
from tests.machines.story import environ, play, set_up, watching

_STARTED = time.monotonic()
_NAMES = ["one", "two", "three"]


def main() -> int:
    """Play it."""
    parser = argparse.ArgumentParser(prog="python -m tests.machines", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(".tessera/machines"), help="folder of the results")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    tell = Chronicle(_say)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # networks outlive processes: take them down, too
    with tempfile.TemporaryDirectory(prefix="machines-") as scratch:
        folder = Path(scratch)
        with machines(folder, _NAMES, environ(_NAMES)) as parts:
            traffic, over = watching(parts)
            try:
                stage = set_up(*parts, tell)
                run = play(stage, tell)
                picture.write(out, tell, traffic, stage, run)
            finally:
                over.set()
                for log in (*folder.glob("*/*.log"), *folder.glob("*/doctor.txt")):
                    shutil.copy(log, out / f"{log.parent.name}-{log.name}")
    _say(f"{'all as it was to be' if tell.good else 'NOT all as it was to be'}: {out}")
    return int(not tell.good)


def _say(text: str) -> None:
    sys.stdout.write(f"{time.monotonic() - _STARTED:6.0f} s  {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
