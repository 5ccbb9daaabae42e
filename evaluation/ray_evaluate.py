"""Evaluation as Ray tasks, one a shard."""

import logging
from dataclasses import replace

from evaluation.evaluate import (
    EvalJob,
    ShardScore,
    draw_shard,
    evaluate_shard,
    evaluation_path,
    galleries_of,
    gather,
    lost,
)
from evaluation.oracle import OracleScore, oracle_parts, oracle_shard
from evaluation.report import Gallery, Report, read_report, write_report
from infra import artifacts, ray_cluster
from infra.in_use import in_use
from infra.store import open_store
from preprocessing.shards import ShardSet
from training.recipe import Recipe
from training.run import TrainedRun

log = logging.getLogger("tessera.evaluate")


def evaluate(recipe: Recipe, run: TrainedRun, val_set: ShardSet, store_url: str, gpus: bool) -> Report:
    """Predict and score every image of the val set exactly once, and write the report, unless all of it is there.

    Each task has a GPU if `gpus`. Needs a Ray connection. Raises TesseraError as `gather` and `pq.compare` do.
    """
    path = evaluation_path(recipe, run.path, val_set.path)
    with in_use(open_store(store_url), f"{path}/"):
        gone, finished = lost(store_url, path, val_set), None
        if artifacts.read_manifest(open_store(store_url), path) is not None and gone:
            log.warning("%s: %d objects of it are gone, the first is %s: made again", path, len(gone), gone[0])
        elif not gone:
            finished = read_report(recipe, store_url, path)
        if finished is not None:
            log.info("evaluated already: %s", path)
            return finished
        return _evaluate(recipe, run, val_set, store_url, path, gpus)


def _evaluate(recipe: Recipe, run: TrainedRun, val_set: ShardSet, store_url: str, path: str, gpus: bool) -> Report:
    device, options = "cuda" if gpus else "cpu", {"num_gpus": int(gpus)}
    jobs = {s.key: EvalJob(recipe, store_url, run.path, path, val_set.labels, s, device) for s in val_set.shards}
    done: list[int] = []

    def report(score: ShardScore) -> None:
        done.append(len(score.by_image))
        log.info("evaluated shard %d of %d, %d images", len(done), len(val_set.shards), sum(done))

    scores = gather(
        ray_cluster.map_tasks(evaluate_shard, ((job,) for job in jobs.values()), report, **options), val_set
    )
    parts = [(jobs[shard.key], images) for shard, images in oracle_parts(val_set)]
    bound = sum(
        ray_cluster.map_tasks(oracle_shard, parts, lambda part: None, **options), OracleScore.zero(val_set.labels)
    )
    scores = replace(scores, oracle=bound.summary(val_set.labels))
    galleries = galleries_of(scores)
    wanted = frozenset(i for ids in galleries.values() for i in ids)
    drawing = [(job, wanted) for job in jobs.values() if wanted.intersection(job.shard.image_ids)]
    pictures = {
        image_id: views
        for drawn in ray_cluster.map_tasks(draw_shard, drawing, lambda drawn: None, **options)
        for image_id, views in drawn.items()
    }
    return write_report(recipe, run, val_set, store_url, path, scores, Gallery(galleries, pictures))
