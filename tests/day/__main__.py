"""`make day`: a day of operations on a real Prefect server, worker, Ray and SeaweedFS, from training to a roll-back.

`python -m tests.day [--out FOLDER] [PART ...]`: parts are story, kills, load; none: all. Exit code 1 if anything was
not as it was to be. Writes <part>.md, timeline.png and screenshots of the Prefect UI.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.day import kills, load, report, story
from tests.day.chronicle import Chronicle, conclude, say
from tests.day.stage import stage

_PARTS = {"story": story.play, "kills": kills.play, "load": load.play}


def main(arguments: Sequence[str] | None = None) -> int:
    """Play the parts one after the other on one stage."""
    parser = argparse.ArgumentParser(prog="python -m tests.day", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(".tessera/day"), help="folder of the results")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(_PARTS)}; none: all")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - set(_PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(_PARTS)}")
    good = True
    with tempfile.TemporaryDirectory(prefix="day-") as folder, stage(Path(folder), say) as parts:
        say(f"stage is up: {parts.url}, {folder}")
        for name in given.parts or _PARTS:
            tell = Chronicle(say)
            try:
                _PARTS[name](parts, tell)
            finally:
                report.write(given.out, name, tell, parts)
            good = good and tell.good
    return conclude(good, given.out)


if __name__ == "__main__":
    sys.exit(main())
