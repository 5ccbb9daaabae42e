"""Prediction of files as Ray tasks, one a chunk."""

import logging

from evaluation.predict_files import CHUNK, Outcome, Summary, finish, predict_chunk
from evaluation.predict_plan import Plan
from infra import ray_cluster
from preprocessing.labels import LabelTable

log = logging.getLogger("tessera.predict")


def predict_plan(plan: Plan, labels: LabelTable, gpus: bool) -> Summary:
    """Predict all images of a plan, but for those that are done, and write the listing; see predict_files.finish.

    Each task has a GPU if `gpus`. Needs a Ray connection, and an input, an output and a run that every worker sees.
    """
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        done, failed = sum(len(o.rows) for o in outcomes), sum(len(o.failed) for o in outcomes)
        log.info("predicted %d of %d images, %d failed", done, len(plan.items), failed)

    arguments = ((plan.work, chunk, "cuda" if gpus else "cpu") for chunk in plan.chunks(CHUNK))
    ray_cluster.map_tasks(predict_chunk, arguments, report, num_gpus=int(gpus))
    return finish(plan, labels, outcomes)
