"""The flow evaluate: a finished run and annotated images -> shards -> PQ report."""

import logging
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from evaluation import ray_evaluate
from evaluation.report import Report
from infra import ray_cluster
from infra.text import markdown
from pipelines.evaluate_job import Evaluate
from pipelines.logs import flow_logs
from pipelines.steps import step
from preprocessing.ray_precompute import precompute
from preprocessing.shards import ShardSet
from training.recipe import Recipe
from training.run import labels_of, read_run

log = logging.getLogger("tessera.flow")


@flow(name="evaluate")
def evaluate(job: Evaluate) -> dict[str, Any]:
    """PQ, predictions and the report of a finished run on any data with its categories.

    Shards and reports that are there are not made again. Returns the report's URL and its figures.
    """
    with flow_logs():
        job = job.resolved()
        recipe = check_job(job)
        with ray_cluster.session(job.ray, int(job.gpus)):
            val_set = precompute_split(job, recipe)
            report = evaluate_run(job, recipe, val_set)
        log.info("report: %s", report.url)
    return {"report": report.url, **report.summary}


@step
def check_job(job: Evaluate) -> Recipe:
    """Refuse before Ray starts what cannot be done: no such run, no data, other categories; gives the recipe."""
    return job.check()


@step
def precompute_split(job: Evaluate, recipe: Recipe) -> ShardSet:
    """Shards of the images' own sizes."""
    index = job.index(labels_of(job.storage, job.run_path))
    return precompute(job.split, index, recipe.val_shards, job.storage, job.bad_share)


@step
def evaluate_run(job: Evaluate, recipe: Recipe, val_set: ShardSet) -> Report:
    """The report; its headline is an artifact of the flow run."""
    run = read_run(job.storage, job.run_path)
    assert run is not None  # check_job opened it
    report = ray_evaluate.evaluate(recipe, run, val_set, job.storage, job.gpus)
    create_markdown_artifact(
        f"{report.markdown}\n\n{report.url}", key="pq-report", description=f"PQ on {markdown(job.split)}"
    )
    return report
