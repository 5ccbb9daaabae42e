"""Retraining through the flow's own steps, without server, Ray and training: killed anywhere, raced, rolled back.

What is killed leaves the store as it was before one of its changes. So a run is watched once, and the store of each
moment is what a kill there leaves behind.
"""

import shutil
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from threading import Barrier, Thread

import pytest

from evaluation.champion import current, give, go_back, history
from evaluation.evaluate import evaluation_path
from infra.artifacts import read_manifest
from infra.errors import TesseraError
from infra.store import Store, open_store
from pipelines import champion as champion_command
from pipelines import retrain as flow
from pipelines.retrain_job import read_line
from preprocessing import inbox, ray_inbox
from preprocessing.coco import read_index
from preprocessing.inbox import decisions
from preprocessing.shards import ShardConfig, ShardSet, read_set
from tests.support.retrain_stage import (
    STEPS,
    Stage,
    base_of,
    champions,
    everything,
    moments,
    retrain,
    rounds_of,
    upload,
)
from tests.support.retraining import (
    TRAIN,
    VAL,
    begin_line,
    clone,
    evaluated,
    ids_of,
    precompute,
    watch_changes,
    write_evaluation,
    write_run,
    write_upload,
)
from tests.support.shard_sets import make_set
from training.recipe import Recipe
from training.recipes.generalist import debug

NOTHING = "nothing new: of the inbox nothing is accepted for the champion's line"


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    found = Stage()
    for name in STEPS:
        monkeypatch.setattr(flow, name, getattr(flow, name).fn)
    monkeypatch.setattr(flow, "flow_logs", nullcontext)
    monkeypatch.setattr(flow, "TrainProgress", lambda: None)
    monkeypatch.setattr(flow, "create_markdown_artifact", lambda text, **_: found.told.append(text))
    monkeypatch.setattr(flow, "run_training", found.run_training)
    monkeypatch.setattr(flow, "evaluate", found.evaluate)
    monkeypatch.setattr(flow.ray_cluster, "session", found.session)
    monkeypatch.setattr(ray_inbox, "precompute", precompute)
    monkeypatch.setattr(inbox, "SETTLED", timedelta())
    monkeypatch.setattr("evaluation.report.to_html", lambda *_: "")
    monkeypatch.setattr("evaluation.rounds.to_html", lambda rows: str([row.title for row in rows]))
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with champion 1, copied for each test."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.report.to_html", lambda *_: "")
        begin_line(folder, open_store(str(folder / "store")))
    return folder / "store"


@pytest.fixture
def line(first: Path, tmp_path: Path, stage: Stage) -> Store:
    clone(first, tmp_path / "store")
    return open_store(str(tmp_path / "store"))


def test_what_came_is_trained_on_and_a_better_challenger_is_promoted(line: Store, stage: Stage, tmp_path: Path):
    before = current(line)
    upload(line, tmp_path, "a", 101)
    name, message = retrain(line)
    assert name == "Promoted"
    assert message.startswith("PQ +")
    now = current(line)
    assert (now.number, now.how, now.root) == (2, "promoted", before.root)
    run = read_manifest(line, now.run)
    assert run["init"] == before.run
    assert ids_of([read_set(line, run["train_set"])]) == [*range(1, TRAIN + 1), 101, 102]
    recipe = Recipe.from_json(run["recipe"])
    assert (recipe.train.epochs, recipe.train.lr) == (debug().train.epochs / 10, debug().train.lr / 10)
    assert stage.evaluated == [now.run]  # the champion's evaluation is there already
    assert (len(stage.told), stage.told[0].startswith("### promoted, champion 2: PQ +")) == (1, True)
    assert history(line)[0] == before


def test_the_next_challenger_starts_from_the_champion_and_learns_all_that_was_accepted(
    line: Store, stage: Stage, tmp_path: Path
):
    stage.skill = lambda recipe, train_set: 5 if train_set.samples == TRAIN + 2 else VAL
    for name, first_id in (("a", 101), ("b", 201)):
        upload(line, tmp_path, name, first_id)
        assert retrain(line)[0] == "Promoted"
    runs = [read_manifest(line, entry.run) for entry in history(line)]
    assert [run["init"] for run in runs[1:]] == [entry.run for entry in history(line)[:2]]
    ids = ids_of([read_set(line, runs[2]["train_set"])])
    assert ids == [*range(1, TRAIN + 1), 101, 102, 201, 202]


def test_one_that_is_no_better_is_refused_and_kept(line: Store, stage: Stage, tmp_path: Path):
    stage.skill = lambda *_: 1
    before, entry = everything(line), current(line)
    upload(line, tmp_path, "a", 101)
    assert retrain(line)[0] == "Refused"
    assert current(line) == entry
    assert everything(line).items() >= before.items()
    assert read_manifest(line, stage.trained[0])["right"] == 1
    assert retrain(line) == (
        "NothingNew",
        f"nothing new: all that was accepted has been tried with these settings, {line.url}/{rounds_of(line)[0]}",
    )


def test_with_nothing_new_the_flow_ends_at_once_and_writes_nothing(line: Store, stage: Stage, monkeypatch):
    touched = list[str]()
    watch_changes(monkeypatch, line, touched.append)
    before = {entry.key: entry for entry in line.list()}
    told = NOTHING
    assert retrain(line) == ("NothingNew", told)
    line.write("inbox/a/half.jpg", b"")
    del touched[:]
    assert retrain(line) == ("NothingNew", told)
    assert [key for key in touched if not key.startswith(("probe-", "running/"))] == []
    line.delete("inbox/a/half.jpg")
    assert {entry.key: entry for entry in line.list()} == before
    assert stage.sessions == 0


def test_what_has_just_changed_is_waited_for_once(line: Store, stage: Stage, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(inbox, "SETTLED", timedelta(seconds=60))
    slept = list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        monkeypatch.setattr(inbox, "SETTLED", timedelta())

    monkeypatch.setattr(flow.time, "sleep", sleep)
    upload(line, tmp_path, "a", 101)
    assert retrain(line)[0] == "Promoted"
    assert slept == [61]


def test_a_store_without_a_champion_has_nothing_to_train_from(store: Store, stage: Stage):
    assert retrain(store) == ("NothingNew", "nothing new: no upload, and no champion yet")
    store.write("inbox/a/_SUCCESS", b"")
    with pytest.raises(TesseraError, match="no champion yet; name one"):
        retrain(store)


def test_a_bad_upload_goes_to_quarantine_and_nothing_is_trained(line: Store, stage: Stage, tmp_path: Path):
    upload(line, tmp_path, "bad", 101, spoiled=2)
    before = everything(line)
    name, message = retrain(line)
    assert name == "NothingNew"
    (decision,) = decisions(line, current(line).line).values()
    assert (decision.state, decision.samples, len(decision.rejected)) == ("quarantined", 0, 2)
    assert message.endswith(f"upload bad quarantined, 0 new samples, 2 set aside, see {line.url}/{decision.report}"), (
        message
    )
    assert (stage.trained, len(history(line))) == ([], 1)
    assert everything(line).items() >= before.items()
    assert stage.told[0].endswith("/report.html")
    assert retrain(line)[1] == NOTHING


def test_options_that_training_would_refuse_are_refused_before_uploads_are_looked_at(
    line: Store, stage: Stage, tmp_path: Path
):
    upload(line, tmp_path, "a", 101)
    for options, told in (({"train.lrr": 1}, "there is none"), ({"shards.radius": 11}, "they ask for other shards")):
        with pytest.raises(TesseraError, match=told):
            retrain(line, options=options)
    with pytest.raises(TesseraError, match="training workers cannot share"):
        retrain(line, workers=64)
    assert (decisions(line, current(line).line), stage.sessions) == ({}, 0)


@pytest.mark.parametrize("better", [True, False], ids=["promoted", "refused"])
def test_killed_anywhere_the_next_run_finishes_the_work(line: Store, stage: Stage, tmp_path: Path, better: bool):
    stage.skill = lambda *_: VAL if better else 1
    upload(line, tmp_path, "a", 101)
    upload(line, tmp_path, "bad", 201, spoiled=2)
    states = moments(line, tmp_path / "kills", lambda: retrain(line))
    whole, names = everything(line), champions(line)
    assert (len(states) > 15, len(names)) == (True, 2 if better else 1)
    for state in states:
        clone(state, Path(line.url))
        retrain(line)
        assert champions(line) == names, state
        assert everything(line) == whole, state
        assert retrain(line)[0] == "NothingNew"


@pytest.mark.slow
def test_killed_anywhere_and_again_in_the_recovery_nothing_is_lost(line: Store, stage: Stage, tmp_path: Path):
    upload(line, tmp_path, "a", 101)
    states = moments(line, tmp_path / "kills", lambda: retrain(line))
    whole, names = everything(line), champions(line)
    for number, state in enumerate(states):
        clone(state, Path(line.url))
        again = moments(line, tmp_path / "again", lambda: retrain(line))
        for second in again:
            clone(second, Path(line.url))
            retrain(line)
            assert (champions(line), everything(line)) == (names, whole), (number, second)
        shutil.rmtree(tmp_path / "again")


def test_what_comes_between_a_kill_and_the_recovery_is_trained_on_with_the_rest(
    line: Store, stage: Stage, tmp_path: Path
):
    upload(line, tmp_path, "a", 101)
    states = moments(line, tmp_path / "kills", lambda: retrain(line))
    for state in states[::3]:
        clone(state, Path(line.url))
        upload(line, tmp_path, "b", 201)
        shutil.rmtree(tmp_path / "upload b")
        retrain(line)
        entries = history(line)
        trained = ids_of([read_set(line, read_manifest(line, stage.trained[-1])["train_set"])])
        assert trained == [*range(1, TRAIN + 1), 101, 102, 201, 202], state
        # where a was promoted before, the challenger is no better than that: both have all right
        assert (len(entries), entries[0].number) == (2, 1), state
        assert retrain(line)[0] == "NothingNew"


def test_a_roll_back_between_a_kill_and_the_recovery_is_not_undone(line: Store, stage: Stage, tmp_path: Path):
    upload(line, tmp_path, "a", 101)
    states = moments(line, tmp_path / "kills", lambda: retrain(line))
    promoted = 0
    for state in states:
        clone(state, Path(line.url))
        if len(history(line)) < 2:
            continue
        promoted, back = promoted + 1, go_back(line)
        retrain(line)
        assert current(line) == back, state
        assert retrain(line)[0] == "NothingNew"
        assert current(line) == back, state
    assert promoted


def test_after_a_roll_back_nothing_is_done_until_something_new_comes(line: Store, stage: Stage, tmp_path: Path):
    upload(line, tmp_path, "a", 101)
    retrain(line)
    back = go_back(line)
    assert retrain(line)[0] == "NothingNew"
    assert current(line) == back
    upload(line, tmp_path, "b", 201)
    assert retrain(line)[0] == "Promoted"
    assert read_manifest(line, current(line).run)["init"] == back.run


def test_of_two_flows_that_race_one_is_judged_against_the_other(
    line: Store, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Other settings, so other challengers; both are ready when the first one is settled."""
    stage.skill = lambda recipe, _: VAL if recipe.train.lr == 1e-5 else 5
    upload(line, tmp_path, "a", 101)
    both, ended, real = Barrier(2), {}, flow.settle_round

    def settled(*arguments):
        both.wait(30)
        return real(*arguments)

    monkeypatch.setattr(flow, "settle_round", settled)
    jobs = {"good": {}, "best": {"options": {"train.lr": 1e-5}}}
    threads = [Thread(target=lambda n=n, o=o: ended.update({n: retrain(line, **o)})) for n, o in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    entries = history(line)
    assert [entry.number for entry in entries] == [*range(1, len(entries) + 1)]
    best = next(run for run in stage.trained if read_manifest(line, run)["right"] == VAL)
    assert entries[-1].run == best
    assert ended["best"][0] == "Promoted"
    if len(entries) == 3:  # the good one was first
        assert ended["good"][0] == "Promoted"
        assert "against champion 2" in ended["best"][1]
    else:
        assert ended["good"][0] == "Refused"
        assert "against champion 2" in ended["good"][1]


def test_two_flows_with_the_same_job_are_one_round(line: Store, stage: Stage, tmp_path: Path):
    """The second one runs whole while the first is about to begin each of its steps."""
    upload(line, tmp_path, "a", 101)
    clone(Path(line.url), start := tmp_path / "start")
    retrain(line)
    whole = everything(line)
    for name in STEPS[3:]:
        clone(start, Path(line.url))
        with pytest.MonkeyPatch.context() as patch:
            real, left = getattr(flow, name), [retrain]

            def step(*arguments, real=real, left=left):
                if left:
                    left.pop()(line)
                return real(*arguments)

            patch.setattr(flow, name, step)
            retrain(line)
        assert everything(line) == whole, name


def begin_another(store: Store, recipe: Recipe, train_set: ShardSet, val_set: ShardSet) -> None:
    run = write_run(store, recipe, train_set, 0)
    write_evaluation(store, recipe, run, val_set)
    give(store, store.url_for(evaluation_path(recipe, run.path, val_set.path)))


def test_a_line_of_another_recipe_can_begin_where_uploads_were_accepted(line: Store, stage: Stage, tmp_path: Path):
    upload(line, tmp_path, "a", 101)
    retrain(line)
    recipe, before = debug().changed({"shards.radius": 12}), read_line(line)
    old = before.champion
    (accepted,) = decisions(line, old.line).values()
    index = read_index(write_upload(tmp_path / "more", 301, 4), "train2017")
    begin_another(line, recipe, make_set(line, index, recipe.shards), before.val_set)
    assert before.base.config != recipe.shards
    assert retrain(line)[0] == "Promoted"
    trained = read_set(line, read_manifest(line, current(line).run)["train_set"])
    assert (trained.config, ids_of([trained])) == (recipe.shards, [101, 102, 301, 302, 303, 304])
    assert [*decisions(line, old.line).values()] == [accepted]


def test_what_is_in_the_val_set_of_a_new_line_is_not_trained_on(line: Store, stage: Stage, tmp_path: Path):
    upload(line, tmp_path, "a", 101)
    retrain(line)
    index = read_index(write_upload(tmp_path / "val", 101, 2), "train2017")
    val_set = make_set(line, index, ShardConfig(radius=0))
    begin_another(line, debug().changed({"train.seed": 9}), read_line(line).base, val_set)
    upload(line, tmp_path, "b", 201)
    retrain(line)
    trained = read_set(line, read_manifest(line, stage.trained[-1])["train_set"])
    assert ids_of([trained]) == [*range(1, TRAIN + 1), 201, 202]
    states = {decision.upload: decision.state for decision in decisions(line, current(line).line).values()}
    assert states == {"a": "quarantined", "b": "accepted"}


def test_an_accepted_set_that_is_gone_is_told(line: Store, stage: Stage, tmp_path: Path):
    upload(line, tmp_path, "a", 101)
    retrain(line)
    (decision,) = decisions(line, current(line).line).values()
    line.delete(f"{decision.shards}/manifest.json")
    with pytest.raises(TesseraError, match=f"{decision.shards}: an accepted upload.* it is gone"):
        retrain(line)


def test_the_command_names_rolls_back_and_lists(line: Store, capsys: pytest.CaptureFixture):
    other = evaluated(line, base_of(line), 3, seed=4)
    assert champion_command.main([line.url, "--set", f"{line.url}/{other}"]) == 0
    assert champion_command.main([line.url, "--back"]) == 0
    assert champion_command.main([line.url, "--back", "2"]) == 0
    assert [e.how for e in history(line)] == ["given", "given", "rolled back to 1", "rolled back to 2"]
    lines = capsys.readouterr().out.splitlines()
    assert [text[0] for text in lines[-4:]] == [" ", " ", " ", "*"]
    assert champion_command.main([line.url, "--back", "9"]) == 1
    assert champion_command.main([line.url, "--set", "nowhere"]) == 1
    assert capsys.readouterr().err.count("error: ") == 2
    assert len(history(line)) == 4


@pytest.mark.parametrize(
    "number",
    ["0", "-1"],
)
def test_the_command_refuses_to_go_back_to_what_is_no_entry(line: Store, number: str):
    give(line, line.url_for(evaluated(line, base_of(line), 3, seed=4)))
    assert champion_command.main([line.url, "--back", number]) == 1
    assert len(history(line)) == 2
