"""The flow retrain: what came into the inbox -> shards -> a challenger -> a new champion, or not."""

import logging
import time
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from evaluation import rounds
from evaluation.champion import Champion, history
from evaluation.checkup import ValCheck
from evaluation.evaluate import evaluation_path
from evaluation.ray_evaluate import evaluate
from evaluation.rounds import Outcome, Round
from infra import artifacts, ray_cluster
from infra.errors import TesseraError
from infra.in_use import in_use
from infra.store import Store, open_store
from infra.text import SENTENCE, markdown, shown
from pipelines.logs import flow_logs
from pipelines.progress import TrainProgress
from pipelines.retrain_job import Line, Retrain, decoded, read_line
from pipelines.steps import step
from preprocessing import shards
from preprocessing.inbox import SETTLED, Decision, Upload, decisions, uploads
from preprocessing.ray_inbox import take_in
from preprocessing.shards import ShardSet, join, lost_shards, read_set
from training.ray_train import run_training
from training.recipe import Recipe
from training.run import RunFacts, TrainedRun, read_run, start_weights

log = logging.getLogger("tessera.flow")


@flow(name="retrain")
def retrain(job: Retrain = Retrain()) -> State[Any]:  # noqa: B008 (frozen)
    """Fine-tune the champion on what came into the inbox, and promote the result if it is better beyond chance.

    Ends as completed: NothingNew, Promoted or Refused, with a message that says why. A run that was killed is taken up
    by the next one: each step is done when its output is on the store.
    """
    job = job.absolute()
    with flow_logs():
        if not uploads(open_store(job.storage)) and not history(open_store(job.storage)):
            return Completed(name="NothingNew", message="nothing new: no upload, and no champion yet")
        line = check_job(job)
        waiting = look(job, line)
        if not waiting and (why := idle(job, line)):
            return Completed(name="NothingNew", message=why)
        check_recipe(job, line)
        with ray_cluster.session(job.ray, **job.needs):
            found = take_in_uploads(job, line, waiting)
            if why := idle(job, line):
                return Completed(
                    name="NothingNew", message="; ".join([why, *(f"upload {d.brief(job.storage)}" for d in found)])
                )
            begun = begin_round(job, line)
            run = train_challenger(job, line, begun)
            outcome = settle_round(job, line, begun, run)
    name = "Refused" if outcome.promoted is None else "Promoted"
    return Completed(name=name, message=str(outcome.verdict), data={"page": outcome.page, "run": begun.run})


@step
def check_job(job: Retrain) -> Line:
    """Refuse a store that cannot be written, and one without a champion."""
    store = open_store(job.storage)
    store.check()
    line = read_line(store)
    log.info("champion %s", line.champion)
    return line


@step
def look(job: Retrain, line: Line) -> list[Upload]:
    """The uploads that are whole and not decided on."""
    store = open_store(job.storage)
    known, found = decisions(store, line.champion.line), uploads(store)
    settling = [shown(upload.name) for upload in found if upload.settles and upload.title not in known]
    if settling:
        seconds = SETTLED.total_seconds() + 1  # the store's times may have whole seconds
        log.info("waiting %.0f s for what has just changed: %s", seconds, ", ".join(settling))
        time.sleep(seconds)
        found = uploads(store)
    waiting = [upload for upload in found if upload.whole and upload.title not in known]
    log.info("inbox: %d uploads, %d of them new", len(found), len(waiting))
    for upload in found:
        if upload.waits:
            log.info("left alone: %s, %s", shown(upload.name), upload.waits)
        for key, why in upload.faults if upload.title not in known else ():
            log.warning("upload %s: %s: %s", shown(upload.name), shown(key), why)
    return waiting


@step
def check_recipe(job: Retrain, line: Line) -> None:
    """Refuse at once the options, workers or weights that training would refuse hours later."""
    recipe = line.tuned(job)
    if recipe.shards != line.base.config:
        raise TesseraError(f"options {job.options}: they ask for other shards than the champion's line has")
    job.crew.told(recipe.plan(line.base), recipe.train.micro_batch)
    start_weights(recipe, line.base.labels, job.storage, line.champion.run)


@step
def take_in_uploads(job: Retrain, line: Line, waiting: list[Upload]) -> list[Decision]:
    """Shards of each upload, or its quarantine, one after the other: each knows the images of those before."""
    store, data, found = open_store(job.storage), all_data(job, line), list[Decision]()
    val_ids = frozenset(i for shard in line.val_set.shards for i in shard.image_ids)
    known = decisions(store, line.champion.line)  # of an attempt before
    for upload in (upload for upload in waiting if upload.title not in known):
        log.info("upload %s: %d objects, %.1f MB", shown(upload.name), upload.objects, upload.bytes / 1e6)
        with in_use(store, f"{shards.FOLDER}/"):
            decision = take_in(store, line.champion.line, upload, job.layout, job.split, data, val_ids, job.bad_share)
        data = data if decision.shards is None else join(data, [there(store, decision.shards)])
        tell = log.info if decision.report is None and not decision.known else log.warning
        tell("upload %s", decision)
        found.append(decision)
    if aside := [decision for decision in found if decision.report is not None]:
        lines = [f"- {markdown(decision, SENTENCE)}: {store.url_for(str(decision.report))}" for decision in aside]
        create_markdown_artifact("\n".join(lines), key="quarantine", description="What was set aside, and why")
    return found


def there(store: Store, path: str) -> ShardSet:
    """A set that something refers to. TesseraError if it is gone."""
    found = read_set(store, path)
    if found is None:
        raise TesseraError(f"{store.url_for(path)}: an accepted upload, or a round, refers to this set, and it is gone")
    if gone := lost_shards(store, found):
        raise TesseraError(
            f"{store.url_for(path)}: an accepted upload, or a round, refers to this set, and {len(gone)} of its shards "
            f"are gone, as {min(gone)}; put them back, or delete the upload's decision (uploads/) to take it in anew"
        )
    return found


def accepted(store: Store, line: Line) -> list[Decision]:
    """What the line has accepted so far, in the order of its sets."""
    found = (decision for decision in decisions(store, line.champion.line).values() if decision.state == "accepted")
    return sorted(found, key=lambda decision: str(decision.shards))


def all_data(job: Retrain, line: Line) -> ShardSet:
    """The line's base with all accepted uploads."""
    store = open_store(job.storage)
    return join(line.base, [there(store, str(decision.shards)) for decision in accepted(store, line)])


def idle(job: Retrain, line: Line) -> str:
    """Why there is nothing to do; empty if there is."""
    store, train_set = open_store(job.storage), all_data(job, line).path
    if train_set == line.base.path:
        return "nothing new: of the inbox nothing is accepted for the champion's line"
    path = rounds.round_path(job.settings, line.champion.root, train_set)
    if artifacts.read_manifest(store, path) is not None:
        with in_use(store, f"{path}/", "evaluate/"):
            rounds.mend(store, path)
        return f"nothing new: all that was accepted has been tried with these settings, {store.url_for(path)}"
    trained = artifacts.read_manifest(store, line.champion.run, RunFacts)
    begun = store.exists(f"{path}/plan.json")  # by a round that was killed after its promotion
    if trained is not None and trained.train_set == train_set and not begun:
        return f"nothing new: champion {line.champion.number} was trained on all that was accepted"
    return ""


@step
def begin_round(job: Retrain, line: Line) -> Round:
    """Write the joined set, and from which weights the challenger starts."""
    store, train_set, recipe = open_store(job.storage), all_data(job, line), line.tuned(job)
    job.crew.told(recipe.plan(train_set), recipe.train.micro_batch)  # of more shards than the base has
    taken, champion = accepted(store, line), line.champion
    shards.write_set(store, train_set, [line.base.path, *(str(decision.shards) for decision in taken)])
    path = rounds.round_path(job.settings, champion.root, train_set.path)
    run = recipe.run_path(train_set.path, champion.run)
    titles = tuple(decision.title for decision in taken)
    planned = Round(path, champion.root, train_set.path, champion.number, champion.run, run, titles)
    begun = rounds.begin(store, planned)
    log.info("round %s: %d samples, %d uploads, from champion %d", path, train_set.samples, len(titles), begun.champion)
    return begun


@step
def train_challenger(job: Retrain, line: Line, begun: Round) -> TrainedRun:
    """Fine-tuned weights; how far it is shows as a progress artifact of the flow run."""
    store, recipe = open_store(job.storage), line.tuned(job)
    train_set, upkeep = there(store, begun.train_set), recipe.upkeep
    check = None if upkeep.check_epochs is None else ValCheck(store.url, line.val_set.path, upkeep.check_images)
    with in_use(store, f"{begun.path}/"):
        return run_training(recipe, train_set, store.url, job.crew, init=begun.init, check=check, watch=TrainProgress())


@step
def settle_round(job: Retrain, line: Line, begun: Round, run: TrainedRun) -> Outcome:
    """Evaluate both on the same images, promote or refuse; the comparison is an artifact of the flow run."""
    store, recipe = open_store(job.storage), line.tuned(job)
    reports = f"{evaluation_path(recipe, run.path, line.val_set.path)}/", f"{line.champion.evaluation}/"
    with in_use(store, f"{begun.path}/", *reports):
        outcome, beaten = _settled(job, line, begun, run)
    log.info("%s: %s", "refused" if outcome.promoted is None else "promoted", outcome.verdict)
    create_markdown_artifact(to_markdown(outcome, beaten, store.url), key="retrain", description="What came of it")
    return outcome


def _settled(job: Retrain, line: Line, begun: Round, run: TrainedRun) -> tuple[Outcome, Champion]:
    store, challenger = open_store(job.storage), evaluate_on(job, line, line.tuned(job), run)

    def evaluated(champion: Champion) -> str:
        found = read_run(store.url, champion.run)
        if found is None:
            raise TesseraError(f"{store.url_for(champion.run)}: the champion's run is not there")
        return evaluate_on(job, line, decoded(store, champion), found)

    verdict, beaten, promoted = rounds.settle(store, begun, challenger, job.margin, evaluated, flow_run.id)
    return rounds.finish(store, begun, verdict, evaluated(beaten), challenger, promoted), beaten


def evaluate_on(job: Retrain, line: Line, recipe: Recipe, run: TrainedRun) -> str:
    """Folder of a run's evaluation on the line's val set, made where it is not there."""
    evaluate(recipe, run, line.val_set, job.storage, job.gpus)
    return evaluation_path(recipe, run.path, line.val_set.path)


def to_markdown(outcome: Outcome, beaten: Champion, storage: str) -> str:
    """The verdict and the two runs."""
    what = "refused" if outcome.promoted is None else f"promoted, champion {outcome.promoted}"
    rows = ((f"champion {beaten.number}", beaten.pq, beaten.run), ("challenger", outcome.pq, outcome.round.run))
    lines = [f"### {what}: {outcome.verdict}", "", "| | PQ | things | stuff | run |", "|---|---:|---:|---:|---|"]
    for name, pq, run in rows:
        figures = ["-" if pq[group] is None else f"{pq[group]:.2f}" for group in ("all", "things", "stuff")]
        lines.append(f"| {name} | {' | '.join(figures)} | {run} |")
    lines += [
        "",
        f"trained on the base and {markdown(', '.join(outcome.round.uploads), SENTENCE)}",
        "",
        f"{storage}/{outcome.page}",
    ]
    if outcome.promoted is None:
        lines += [
            "",
            "The uploads stay accepted: the next challenger learns from them, too, unless they are withdrawn.",
        ]
    return "\n".join(lines)
