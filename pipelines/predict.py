"""Panoptic predictions of a finished run for an image, a folder or an S3 prefix; no server, no Ray, no GPU needed.

OUTPUT gets predictions.json and predictions/*.png in COCO's panoptic format, overlays/*.jpg to look at, and
problems.json with every file that could not be done and why. With --images the first two are named as COCO's server
wants them, panoptic_<split>_<NAME>_results, and the zip of both lies beside. The same command goes on where it was
stopped.

exit code: 0 all images done, 1 some failed (the others are done), 2 refused before anything was predicted
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from evaluation.predict_files import Outcome, Summary, finish, load_predictor, predict_chunk, shown, told
from evaluation.predict_plan import Plan, claim
from infra import logs
from infra.errors import TesseraError
from infra.text import quoted
from pipelines.fields import told as problems
from pipelines.predict_job import Predict
from preprocessing.labels import LabelTable

log = logging.getLogger("tessera.predict")

_CHUNK = 8  # small, so that lines come soon


def main(arguments: Sequence[str]) -> int:
    """Predict in this process. Returns the exit code."""
    named = _parser().parse_args(arguments)
    device = vars(named).pop("device")
    begun = False
    try:
        plan = Predict(**vars(named)).resolved().plan()
        labels = load_predictor(plan.work.storage, plan.work.run, plan.work.options, device).labels
        claim(plan.work)
        begun = True
        summary = _predict(plan, labels, device)
    except ValidationError as error:
        return _refuse(problems(error), 2)
    except TesseraError as error:
        return _refuse(str(error), 1 if begun else 2)
    except KeyboardInterrupt:
        return _refuse("interrupted; the same command goes on from here", 130)
    _tell(summary)
    return 1 if summary.failed else 0


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no JSON: {error}") from error


def _parser() -> argparse.ArgumentParser:
    about, _, ending = (__doc__ or "").rpartition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m pipelines.predict", None, about, ending, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    fields = Predict.model_fields
    for name in ("run", "input", "output"):
        parser.add_argument(name, metavar=name.upper(), help=fields[name].description)
    parser.add_argument("--images", metavar="JSON", help=fields["images"].description)
    parser.add_argument("--algorithm", default="tessera", metavar="NAME", help=fields["algorithm"].description)
    parser.add_argument("--no-overlays", dest="overlays", action="store_false", help="Write no overlays.")
    parser.add_argument("--options", type=_json, default={}, metavar="JSON", help=fields["options"].description)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; if not given, cuda where there is one.")
    return parser


def _predict(plan: Plan, labels: LabelTable, device: str | None) -> Summary:
    log.info("%d images; %d other files are left alone", len(plan.items), len(plan.ignored))
    for folder in plan.outputs:
        log.info("left out: what an earlier predict wrote into %s", shown(folder))
    started, outcomes, seen = time.monotonic(), list[Outcome](), 0
    for chunk in plan.chunks(_CHUNK):
        outcomes.append(predict_chunk(plan.work, chunk, device))
        for row in outcomes[-1].rows:
            log.info("%s", told(row, labels))
        for failure in outcomes[-1].failed:
            log.warning("FAILED %s: %s", shown(failure.file_name), failure.why)
        seen += len(chunk)
        log.info("%d of %d images, %.1f s", seen, len(plan.items), time.monotonic() - started)
    return finish(plan, labels, outcomes)


def _tell(summary: Summary) -> None:
    counts = f"{len(summary.failed)} failed, {len(summary.empty)} without a segment"
    log.info("%d images done, %d of them now; %s: %s", summary.images, summary.fresh, counts, summary.problems)
    log.info("predictions %s", summary.archive or summary.predictions)


def _refuse(problem: str, code: int) -> int:
    log.error("error: %s", problem)
    return code


if __name__ == "__main__":
    logs.to_stream(sys.stdout)
    sys.exit(main(sys.argv[1:]))
