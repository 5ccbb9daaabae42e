"""`make machines`: train-coco on two machines with the store and the Prefect server on a third, all on this host.

`python -m tests.machines [--out FOLDER] [PART ...]`, as root; parts are story and doctor. Exit code 1 if anything was
not as it was to be. Writes story.md, traffic.png, a screenshot of the flow run's page, and doctor.md: what the doctor
says of sound and broken set-ups.
"""

import argparse
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from infra.errors import TesseraError
from tests.day.chronicle import Chronicle, conclude, say
from tests.day.report import to_markdown
from tests.machines import picture, sick, story
from tests.machines.net import machines
from tests.machines.stage import environ, set_up
from tests.machines.traffic import Traffic

_PARTS = ["story", "doctor"]
_NAMES = ["one", "two", "three"]


def main() -> int:
    """Play it."""
    parser = argparse.ArgumentParser(prog="python -m tests.machines", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(".tessera/machines"), help="folder of the results")
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[[], *_PARTS], help="story, doctor; none: both")
    given = parser.parse_args()
    out: Path = given.out
    wanted = given.parts or _PARTS
    out.mkdir(parents=True, exist_ok=True)
    tell, doctors = Chronicle(say), Chronicle(say)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # networks outlive processes: take them down, too
    with tempfile.TemporaryDirectory(prefix="machines-") as scratch:
        folder = Path(scratch)
        with machines(folder, _NAMES, environ(_NAMES)) as parts:
            traffic = Traffic(parts)
            try:
                with traffic.watched():
                    stage = set_up(*parts, tell)
                    run = story.play(stage, tell) if "story" in wanted else ""
                if run:
                    picture.write(out, tell, traffic, stage, run)
                if "doctor" in wanted:
                    sick.play(stage, doctors)
            finally:
                for log in (*folder.glob("*/*.log"), *folder.glob("*/doctor-*.txt")):
                    shutil.copy(log, out / f"{log.parent.name}-{log.name}")
    (out / "doctor.md").write_text(to_markdown(doctors))
    return conclude(tell.good and doctors.good, out)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TesseraError as error:
        sys.exit(f"error: {error}")
