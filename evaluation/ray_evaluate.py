"""Evaluation as Ray tasks, one a shard."""

import logging

from evaluation.evaluate import (
    EvalJob,
    Scores,
    ShardScore,
    evaluate_shard,
    evaluation_path,
    gallery_of,
    gather,
)
from infra import ray_cluster
from preprocessing.shards import ShardSet
from training.recipe import Recipe
from training.run import TrainedRun

log = logging.getLogger("tessera.evaluate")


def evaluate(recipe: Recipe, run: TrainedRun, val_set: ShardSet, store_url: str) -> tuple[str, Scores]:
    """Predict and score every image of the val set exactly once; the evaluation's folder and its scores.

    Needs a Ray connection. Raises TesseraError as `gather` and `pq.compare` do.
    """
    path = evaluation_path(recipe, run.path, val_set.path)
    gallery = gallery_of(val_set)
    done: list[int] = []

    def report(score: ShardScore) -> None:
        done.append(len(score.image_ids))
        log.info("evaluated shard %d of %d, %d images", len(done), len(val_set.shards), sum(done))

    jobs = ((EvalJob(recipe, store_url, run.path, path, val_set.labels, shard, gallery),) for shard in val_set.shards)
    return path, gather(ray_cluster.map_tasks(evaluate_shard, jobs, report), val_set)
