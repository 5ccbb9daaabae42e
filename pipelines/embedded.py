"""train-coco or ablate in this process, with nothing running beforehand: a temporary Prefect server, a local Ray.

python -m pipelines.embedded              the demo: the synthetic set, from scratch, 2 workers
python -m pipelines.embedded JOB          train-coco; JOB is its parameter as JSON, as in `prefect deployment run`
python -m pipelines.embedded ablate JOB   ablate
"""

import os
import sys
import time
from pathlib import Path

from pydantic import ValidationError

from infra.errors import TesseraError
from pipelines.ablate_job import Ablate
from pipelines.fields import told
from pipelines.job import TrainCoco
from pipelines.server import prefect_server

HOME = Path(".tessera")
PLAN = """Tessera demo: train-coco on a synthetic panoptic set, from scratch, on this machine's CPU.
  1. start a temporary Prefect server                         about 10 s
  2. write 3000 + 200 synthetic images in COCO's layout       about 10 s
  3. start a local Ray, precompute targets into shards        about 15 s
  4. train a 1.1M-parameter model on 2 workers, 3000 steps    4 to 10 min
  5. evaluate 200 unseen images, write the report             about 15 s
Everything it writes lies in .tessera; what is there already is not made again.
"""


def main(arguments: list[str]) -> int:
    """Run the flow; the last line is `PQ <all> things <pq> stuff <pq> report <path>`. Returns the exit code."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        job = _job(arguments)
        job.check()
        if not arguments:
            print(PLAN, flush=True)
        with prefect_server(HOME / "prefect"):
            _run(job)
    except ValidationError as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 1
    except TesseraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _job(arguments: list[str]) -> TrainCoco:
    if not arguments:
        return TrainCoco(workers=min(2, os.cpu_count() or 1))
    match arguments:
        case ["ablate", job]:
            return Ablate.model_validate_json(job)
        case [job]:
            return TrainCoco.model_validate_json(job)
    raise TesseraError(f"{' '.join(arguments)}: expected JOB or ablate JOB; see --help")


def _run(job: TrainCoco) -> None:
    from prefect.logging.handlers import APILogHandler

    started = time.monotonic()
    try:
        last = _ablate(job) if isinstance(job, Ablate) else _train_coco(job)
    finally:
        APILogHandler().flush()  # the server is about to go
    print(f"done in {time.monotonic() - started:.0f} s\n{last}")


def _ablate(job: Ablate) -> str:
    from pipelines.ablate import ablate

    return f"report {ablate(job)['report']}"


def _train_coco(job: TrainCoco) -> str:
    from pipelines.train_coco import train_coco

    result = train_coco(job)
    figures = {group: result["pq"][group] for group in ("all", "things", "stuff")}
    shown = {group: "none" if value is None else f"{value:.1f}" for group, value in figures.items()}
    return f"PQ {shown['all']} things {shown['things']} stuff {shown['stuff']} report {result['report']}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
