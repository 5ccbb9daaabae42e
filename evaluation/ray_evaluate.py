"""Evaluation as Ray tasks, one a shard."""

import logging

from evaluation.evaluate import EvalJob, ShardScore, evaluate_shard, evaluation_path, gallery_of, gather
from evaluation.report import Report, read_report, write_report
from infra import ray_cluster
from preprocessing.shards import ShardSet
from training.recipe import Recipe
from training.run import TrainedRun

log = logging.getLogger("tessera.evaluate")


def evaluate(recipe: Recipe, run: TrainedRun, val_set: ShardSet, store_url: str, gpus: bool) -> Report:
    """Predict and score every image of the val set exactly once, and write the report, unless it is there.

    Each task has a GPU if `gpus`. Needs a Ray connection. Raises TesseraError as `gather` and `pq.compare` do.
    """
    path = evaluation_path(recipe, run.path, val_set.path)
    finished = read_report(recipe, store_url, path)
    if finished is not None:
        log.info("evaluated already: %s", path)
        return finished
    gallery = gallery_of(val_set)
    done: list[int] = []

    def report(score: ShardScore) -> None:
        done.append(len(score.image_ids))
        log.info("evaluated shard %d of %d, %d images", len(done), len(val_set.shards), sum(done))

    device = "cuda" if gpus else "cpu"
    jobs = ((EvalJob(recipe, store_url, run.path, path, val_set.labels, s, gallery, device),) for s in val_set.shards)
    scores = gather(ray_cluster.map_tasks(evaluate_shard, jobs, report, num_gpus=int(gpus)), val_set)
    return write_report(recipe, run, val_set, store_url, path, scores)
