"""The flow ablate: one precompute, a training and an evaluation for each row of a grid and each seed, one table.

Not with Ray Tune: a run resumes and is known by its path already, so Tune would add a second scheduler and a second
store of checkpoints and nothing else.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from evaluation.evaluate import evaluation_path
from evaluation.grid import Outcome, Written, failures, write_grid
from evaluation.report import Report, percent
from infra import artifacts, ray_cluster
from infra.errors import TesseraError
from infra.in_use import in_use
from infra.store import Store, open_store
from pipelines.ablate_job import Ablate, Trial, blaming
from pipelines.ablate_threads import named, named_lines, side_by_side
from pipelines.logs import flow_logs
from pipelines.steps import step
from pipelines.train_coco import check_fit, data_root, evaluate_run, precompute_split, read_train_index, train
from preprocessing.shards import ShardConfig, ShardSet
from training.recipe import Recipe

log = logging.getLogger("tessera.flow")


@dataclass(frozen=True)
class Plan:
    """A trial and its data."""

    trial: Trial
    chosen: Recipe
    train_set: ShardSet
    val_set: ShardSet
    run: str
    """Folder under the store's root."""
    evaluation: str
    """The same."""


@flow(name="ablate")
def ablate(job: Ablate) -> dict[str, Any]:
    """A table of PQ, mean and spread over seeds, for a grid of options: trained and evaluated side by side.

    What is finished is only read, what was interrupted goes on. A trial that fails does not stop the others; in the
    end the flow fails and says where the table is. Returns the report's URL and the table.
    """
    job = job.absolute()
    with flow_logs(), named_lines():
        check_grid(job)
        root = find_data(job)
        check_recipes(job)
        with ray_cluster.session(job.ray, **job.needs):
            plans = precompute_all(job, root)
            store = open_store(job.storage)
            with in_use(store, *(f"{path}/" for plan in plans for path in (plan.run, plan.evaluation))):
                written = write_table(job, run_trials(job, store, plans))
        log.info("report: %s", written.url)
        _tell_failures(written, len(plans))
    table = {line.title: line.over_seeds("PQ") for line in written.lines}
    return {
        "report": written.url,
        "pq": {title: dataclasses.asdict(mean) if mean else None for title, mean in table.items()},
    }


def _tell_failures(written: Written, trials: int) -> None:
    failed = failures(written.lines)
    if len(failed) == trials:
        raise TesseraError(f"all {trials} trials failed, the first with: {failed[0].error}; see {written.url}")
    if failed:
        raise TesseraError(f"{len(failed)} of {trials} trials failed, the table has the others: {written.url}")


@step
def check_grid(job: Ablate) -> None:
    """Refuse at once what would fail hours later, in the last row too."""
    job.check()


@step
def find_data(job: Ablate) -> str:
    """The data set's folder or URL, as train-coco finds it. Refuses rows that do not go with the data."""
    root = data_root(job)
    train_index = read_train_index(job, root)
    for trial in job.rows_once():
        with blaming(trial.row):
            check_fit(trial.job, trial.chosen, train_index)
    return root


@step
def check_recipes(job: Ablate) -> None:
    """Refuse now the networks or weights that training would refuse after hours of precompute."""
    for trial in job.rows_once():
        with blaming(trial.row):
            trial.chosen.rehearse()


def precompute_all(job: Ablate, root: str) -> list[Plan]:
    """The trials with their shards; each kind of shards is made once, and most grids need but one."""
    made: dict[tuple[str, ShardConfig], ShardSet] = {}
    plans = []
    for trial in job.trials():
        chosen = trial.chosen
        train_kind, val_kind = (job.train_split, chosen.shards), (job.val_split, chosen.val_shards)
        for split, config in (train_kind, val_kind):
            if (split, config) not in made:
                labels = made[train_kind].labels if train_kind in made else None
                made[split, config] = precompute_split(job, root, split, config, labels)
        train_set, val_set = made[train_kind], made[val_kind]
        run = chosen.run_path(train_set.path, job.init_path)
        plans.append(Plan(trial, chosen, train_set, val_set, run, evaluation_path(chosen, run, val_set.path)))
    return plans


def run_trials(job: Ablate, store: Store, plans: Sequence[Plan]) -> list[Outcome]:
    """What became of each trial, in their order. Those of one run, which differ in decoding, follow one another."""
    there = sum(artifacts.read_manifest(store, plan.evaluation) is not None for plan in plans)
    log.info("%d trials, %d of them are there already; %d at once", len(plans), there, job.at_once)
    options = list(dict.fromkeys(name for plan in plans for name in plan.trial.row.options))
    by_run: dict[str, list[Plan]] = {}
    for plan in plans:
        by_run.setdefault(plan.run, []).append(plan)
    groups = side_by_side([partial(_outcomes, group, options) for group in by_run.values()], job.at_once)
    found = {outcome.evaluation: outcome for outcomes in groups for outcome in outcomes}
    return [found[plan.evaluation] for plan in plans]


def _outcomes(plans: Sequence[Plan], options: Sequence[str]) -> list[Outcome]:
    return [_outcome(plan, options) for plan in plans]


def _outcome(plan: Plan, options: Sequence[str]) -> Outcome:
    """Runs in a thread of its own."""
    trial = plan.trial
    with named(trial.name):
        found = _run_named(trial.name, plan, return_state=True).result(raise_on_failure=False)
        error = _told(found) if isinstance(found, Exception) else None
        if not isinstance(found, Exception):
            log.info("PQ %s", percent(found.summary["pq"]["all"]))
    values = {name: _option(plan.chosen, name) for name in options}
    return Outcome(trial.row.title, trial.seed, values, trial.row.published, plan.run, plan.evaluation, error)


def _told(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    return str(error) if isinstance(error, TesseraError) else f"{type(error).__name__}: {first}"


def _option(chosen: Recipe, name: str) -> Any:
    """Ready for JSON; None below a group that is taken out."""
    try:
        value = attrgetter(name)(chosen)
    except AttributeError:
        return None
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def run_trial(name: str, plan: Plan) -> Report:
    """Train and evaluate, or read what is there; `name` is the task run's."""
    job = plan.trial.job
    run = train.fn(job, plan.chosen, plan.train_set, plan.val_set)
    return evaluate_run.fn(job, plan.chosen, run, plan.val_set)


_run_named = step(run_trial, task_run_name="{name}")


@step
def write_table(job: Ablate, outcomes: Sequence[Outcome]) -> Written:
    """The table is an artifact of the flow run, too."""
    grid = job.grid if isinstance(job.grid, str) else "grid"
    written = write_grid(open_store(job.storage), f"{job.method}/{job.recipe}: {grid}", outcomes)
    create_markdown_artifact(f"{written.markdown}\n\n{written.url}", key="ablation", description="PQ of the grid")
    return written
