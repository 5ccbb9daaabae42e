"""The flow train-coco: annotations -> shards -> trained weights -> PQ report."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

from prefect import Task, flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from evaluation.ray_evaluate import evaluate
from evaluation.report import Report
from infra import ray_cluster
from infra.errors import TesseraError
from infra.store import open_store
from pipelines.logs import flow_logs, worth_a_retry
from preprocessing.layouts import LAYOUTS, read_index
from preprocessing.ray_precompute import precompute
from preprocessing.shards import ShardConfig, ShardSet
from preprocessing.synthetic import SyntheticConfig, write_set
from training.ray_train import run_training
from training.recipe import Recipe
from training.recipes import RECIPES, recipe
from training.run import TrainedRun

log = logging.getLogger("tessera.flow")

P = ParamSpec("P")
R = TypeVar("R")

SYNTHETIC = "synthetic"


def _known(name: str) -> str:
    recipe(name)
    return name


def _readable(layout: str) -> str:
    if layout not in LAYOUTS:
        raise TesseraError(f"layout {layout!r}: there is none, there are {', '.join(LAYOUTS)}")
    return layout


class TrainCoco(BaseModel):
    """Parameters of train-coco."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(
        SYNTHETIC, description="Folder of the data set, which every Ray worker can read, or 'synthetic': made here."
    )
    layout: Annotated[str, AfterValidator(_readable)] = Field(
        "coco",
        description="How the data set is laid out; see docs/data.md.",
        json_schema_extra={"enum": [*LAYOUTS]},
    )
    train_split: str = Field("train2017", description="The split that is trained on.")
    val_split: str = Field("val2017", description="The split that PQ is measured on.")
    storage: str = Field(
        ".tessera/store", description="Root of all results: a folder, or s3://bucket/prefix (server and keys: AWS_*)."
    )
    recipe: Annotated[str, AfterValidator(_known)] = Field(
        "demo",
        description="Method, options and training; see training/recipes.py.",
        json_schema_extra={"enum": [*RECIPES]},
    )
    epochs: PositiveFloat | None = Field(None, description="Passes over the train split, if not the recipe's.")
    options: dict[str, Any] = Field(
        {}, description='Other options of the recipe by dotted name, as {"method.eds_distance": 0, "train.seed": 1}.'
    )
    workers: PositiveInt = Field(1, description="Training workers; they share the recipe's total batch.")
    gpus: bool = Field(False, description="One GPU per training worker and evaluation task.")
    ray: str = Field("local", description="'local' starts Ray here; 'auto' or host:port joins a cluster.")
    bad_share: float = Field(0.01, ge=0, le=1, description="Share of unusable samples that fails the run.")
    synthetic: SyntheticConfig = Field(SyntheticConfig(), description="Size of the set if data is 'synthetic'.")

    @model_validator(mode="after")
    def _options_fit(self) -> "TrainCoco":
        self.resolved()
        return self

    def resolved(self) -> Recipe:
        """The recipe with all that this job changes; TesseraError for options that it does not have."""
        chosen = recipe(self.recipe).changed(self.options)
        return chosen if self.epochs is None else chosen.lasting(self.epochs)


def _step(function: Callable[P, R]) -> Task[P, R]:
    """A step of the flow; done steps are known by their manifests, so Prefect caches nothing."""
    return task(retries=2, retry_delay_seconds=5, retry_condition_fn=worth_a_retry, cache_policy=NO_CACHE)(function)


@flow(name="train-coco")
def train_coco(job: TrainCoco = TrainCoco()) -> dict[str, Any]:  # noqa: B008 (frozen)
    """From panoptic annotations in COCO's layout to trained weights and a PQ report.

    Every step is skipped whose output is on the store already; an interrupted one goes on. Returns the
    report's URL and its figures.
    """
    chosen = job.resolved()
    job = job.model_copy(update={"storage": open_store(job.storage).url})  # absolute: workers stand elsewhere
    with flow_logs():
        chosen.train.split_batch(job.workers)  # refuses now what training would refuse after hours of precompute
        check_storage(job.storage)
        root = find_data(job)
        check_recipe(chosen)
        with ray_cluster.session(job.ray, job.workers if job.gpus else 0):
            train_set = precompute_split(job, root, job.train_split, chosen.shards)
            val_set = precompute_split(job, root, job.val_split, chosen.val_shards)
            run = train(job, chosen, train_set)
            report = evaluate_run(job, chosen, run, val_set)
        log.info("report: %s", report.url)
    return {"report": report.url, **report.summary}


@_step
def check_storage(storage: str) -> None:
    """Refuse at once a store that cannot be written."""
    open_store(storage).check()


@_step
def find_data(job: TrainCoco) -> Path:
    """The data set's folder; the synthetic one is written where it is not there yet."""
    root = data_root(job)
    train_index, val_index = (read_index(root, split, job.layout) for split in (job.train_split, job.val_split))
    if train_index.labels != val_index.labels:  # weights know categories by their place in the table
        raise TesseraError(f"{root}: {job.train_split} and {job.val_split} list different categories")
    return root


def data_root(job: TrainCoco) -> Path:
    """Folder of the data; writes the synthetic set where it is not there yet."""
    if job.data != SYNTHETIC:
        return Path(job.data).resolve()
    log.info("synthetic set: %d train and %d val images", job.synthetic.train, job.synthetic.val)
    return write_set(Path(".tessera/data").resolve(), job.synthetic)


@_step
def check_recipe(chosen: Recipe) -> None:
    """Refuse now the network or the weights that training would refuse after hours of precompute."""
    report = chosen.rehearse()
    if report is not None:
        log.info("weights %s: %s", chosen.method.backbone.weights, report)


@_step
def precompute_split(job: TrainCoco, root: Path, split: str, config: ShardConfig) -> ShardSet:
    """Shards of one split."""
    return precompute(split, read_index(root, split, job.layout), config, job.storage, job.bad_share)


@_step
def train(job: TrainCoco, chosen: Recipe, train_set: ShardSet) -> TrainedRun:
    """Weights."""
    return run_training(chosen, train_set, job.storage, job.workers, job.gpus)


@_step
def evaluate_run(job: TrainCoco, chosen: Recipe, run: TrainedRun, val_set: ShardSet) -> Report:
    """PQ, predictions and the report; its headline is an artifact of the flow run."""
    report = evaluate(chosen, run, val_set, job.storage, job.gpus)
    create_markdown_artifact(f"{report.markdown}\n\n{report.url}", key="pq-report", description="PQ on the val split")
    return report
