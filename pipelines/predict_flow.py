"""The flow predict: a finished run over many images, as Ray tasks."""

import logging
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from evaluation.predict_files import Summary, load_predictor
from evaluation.predict_plan import claim
from evaluation.ray_predict import predict_plan
from infra import ray_cluster
from infra.errors import TesseraError
from infra.text import SENTENCE, markdown
from pipelines.logs import flow_logs
from pipelines.predict_job import Predict
from pipelines.steps import step

log = logging.getLogger("tessera.flow")

_SHOWN = 30


@flow(name="predict")
def predict(job: Predict) -> dict[str, Any]:
    """Panoptic predictions of a finished run in COCO's format, overlays, and what could not be done.

    Images that are done already are not done again. Fails in the end, with all others done, if an image failed.
    Returns the URLs and the counts.
    """
    with flow_logs():
        job = job.resolved()
        check_job(job)
        with ray_cluster.session(job.ray, int(job.gpus)):
            summary = predict_images(job)
        log.info("%d images, %d of them now: %s", summary.images, summary.fresh, summary.predictions)
        if summary.failed:
            raise TesseraError(f"{len(summary.failed)} images failed, the others are done: {summary.problems}")
    return {
        "predictions": summary.predictions,
        "problems": summary.problems,
        "archive": summary.archive,
        "images": summary.images,
        "empty": len(summary.empty),
    }


@step
def check_job(job: Predict) -> None:
    """Refuse before Ray starts what cannot be done: no such run, no images, an output that holds something else."""
    work = job.plan().work
    load_predictor(work.storage, work.run, work.options, "cpu")
    claim(work)


@step
def predict_images(job: Predict) -> Summary:
    """All predictions; the summary is an artifact of the flow run."""
    plan = job.plan()
    labels = load_predictor(plan.work.storage, plan.work.run, plan.work.options, "cpu").labels
    summary = predict_plan(plan, labels, job.gpus)
    create_markdown_artifact(to_markdown(summary), key="predictions", description="What became of each image")
    return summary


def to_markdown(summary: Summary) -> str:
    """Counts, URLs, and the first of what failed or came out empty."""
    counts = [len(summary.failed), len(summary.empty), summary.ignored, len(summary.outputs)]
    lines = [
        f"### {summary.images} images predicted, {summary.fresh} of them now",
        "",
        "| failed | without a segment | other files | outputs left out |",
        "|---:|---:|---:|---:|",
        f"| {' | '.join(map(str, counts))} |",
        "",
        f"{summary.archive or summary.predictions}, {summary.problems}",
        "",
    ]
    lines += [
        f"- {markdown(f.file_name)}: {markdown(f.why, SENTENCE)}" for f in (*summary.failed, *summary.empty)[:_SHOWN]
    ]
    return "\n".join(lines)
