"""The flow train-coco: annotations -> shards -> trained weights -> PQ report."""

import logging
import math
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from evaluation.checkup import ValCheck
from evaluation.ray_evaluate import evaluate
from evaluation.report import Report
from infra import ray_cluster
from infra.errors import TesseraError
from infra.store import open_store
from pipelines.job import SYNTHETIC, TrainCoco
from pipelines.logs import flow_logs
from pipelines.progress import TrainProgress
from pipelines.steps import step
from preprocessing.labels import LabelTable
from preprocessing.layouts import read_index
from preprocessing.ray_precompute import precompute
from preprocessing.shards import ShardConfig, ShardSet
from preprocessing.source import Index, shared_pictures
from preprocessing.synthetic import stored_set
from training import names
from training.ray_train import run_training
from training.recipe import Recipe
from training.run import TrainedRun, start_weights

log = logging.getLogger("tessera.flow")


@flow(name="train-coco")
def train_coco(job: TrainCoco = TrainCoco()) -> dict[str, Any]:  # noqa: B008 (frozen)
    """From panoptic annotations in COCO's layout to trained weights and a PQ report.

    Every step is skipped whose output is on the store already; an interrupted one goes on. Returns the
    report's URL and its figures.
    """
    chosen = job.resolved()
    job = job.absolute()
    with flow_logs():
        check_job(job)
        root = find_data(job, chosen)
        check_recipe(job, chosen)
        with ray_cluster.session(job.ray, **job.needs):
            train_set = precompute_split(job, root, job.train_split, chosen.shards)
            val_set = precompute_split(job, root, job.val_split, chosen.val_shards, train_set.labels)
            run = train(job, chosen, train_set, val_set)
            report = evaluate_run(job, chosen, run, val_set)
        log.info("%s\nreport: %s", report.markdown, report.url)
        log.info("to make it the champion: python -m pipelines.champion --set %s", report.url.rpartition("/")[0])
    return {"report": report.url, **report.summary}


@step
def check_job(job: TrainCoco) -> None:
    """Refuse at once what would fail hours later."""
    job.check()


@step
def find_data(job: TrainCoco, chosen: Recipe) -> str:
    """The data set's folder; the synthetic one is written where it is not there yet.

    Refuses splits that do not belong together, a batch that is larger than the data or that the workers cannot share
    exactly, and weights to start with that are not there or of another network.
    """
    root = data_root(job)
    check_fit(job, chosen, read_train_index(job, root))
    return root


def read_train_index(job: TrainCoco, root: str) -> Index:
    """Of the train split. TesseraError unless the val split belongs to it."""
    train_index, val_index = (read_index(root, split, job.layout) for split in (job.train_split, job.val_split))
    if differ := train_index.labels.difference(val_index.labels):
        raise TesseraError(f"{root}: {job.train_split} and {job.val_split} list different categories: {differ}")
    if shared := shared_pictures(val_index, train_index):
        told = "%s: %d of the %d images of %s are in %s, too, as %s: PQ on them says nothing of new images"
        log.warning(told, root, len(shared), len(val_index.records), job.val_split, job.train_split, shared[0].image)
    return train_index


def check_fit(job: TrainCoco, chosen: Recipe, train_index: Index) -> None:
    """Refuse a batch, workers or weights to start with that do not go with the data, as `find_data` says."""
    if chosen.train.batch > len(train_index.records):
        raise TesseraError(
            f"{job.data}: {job.train_split} has {len(train_index.records)} images, fewer than a step (train.batch "
            f"{chosen.train.batch})"
        )
    if job.init_path is not None:
        start_weights(chosen, train_index.labels, job.storage, job.init_path)
    shards = math.ceil(len(train_index.records) / chosen.shards.samples)
    job.crew.told(chosen.reader.plan(chosen.train.batch, shards), chosen.train.micro_batch)


def data_root(job: TrainCoco) -> str:
    """Folder or URL of the data, absolute; writes the synthetic set where it is not there yet."""
    if job.data != SYNTHETIC:
        return open_store(job.data).url
    log.info("synthetic set: %d train and %d val images", job.synthetic.train, job.synthetic.val)
    return stored_set(open_store(job.storage), job.synthetic)


@step
def check_recipe(job: TrainCoco, chosen: Recipe) -> None:
    """Refuse now the network, the weights or the name that training would refuse after hours of precompute."""
    check_name(job, facts_of(job, chosen))
    report = chosen.rehearse()
    if report is not None:
        log.info("weights %s: %s", chosen.method.backbone.weights, report)


@step
def precompute_split(
    job: TrainCoco, root: str, split: str, config: ShardConfig, labels: LabelTable | None = None
) -> ShardSet:
    """Shards of one split. labels: the train set's table, if this is another split: places in it are what weights know.

    Its order and colours may be other ones than this split's own.
    """
    index = read_index(root, split, job.layout)
    return precompute(split, index if labels is None else index.under(labels), config, job.storage, job.bad_share)


def facts_of(job: TrainCoco, chosen: Recipe) -> dict[str, Any]:
    """What a run's name stands for, but for the data."""
    return chosen.identity | {"init": job.init_path}


def check_name(job: TrainCoco, facts: dict[str, Any]) -> None:
    """Refuse a name that has trained something else so far, unless told to go on differently."""
    if job.name is not None and not job.anew:
        names.refuse_changed(open_store(job.storage), job.name, facts)


@step
def train(job: TrainCoco, chosen: Recipe, train_set: ShardSet, val_set: ShardSet) -> TrainedRun:
    """Weights; how far it is shows as a progress artifact of the flow run."""
    store, facts = open_store(job.storage), facts_of(job, chosen) | {"train_set": train_set.path}
    check_name(job, facts)
    path, init, upkeep = chosen.run_path(train_set.path, job.init_path), job.init_path, chosen.upkeep
    if job.name is not None:
        names.give(store, job.name, path, facts)
    check = None if upkeep.check_epochs is None else ValCheck(store.url, val_set.path, upkeep.check_images)
    return run_training(chosen, train_set, store.url, job.crew, init=init, check=check, watch=TrainProgress())


@step
def evaluate_run(job: TrainCoco, chosen: Recipe, run: TrainedRun, val_set: ShardSet) -> Report:
    """PQ, predictions and the report; its headline is an artifact of the flow run."""
    report = evaluate(chosen, run, val_set, job.storage, job.gpus)
    create_markdown_artifact(f"{report.markdown}\n\n{report.url}", key="pq-report", description="PQ on the val split")
    return report
