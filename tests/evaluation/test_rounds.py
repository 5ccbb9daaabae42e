"""Rounds: begun once, settled once, whoever takes them up, and against the champion of the moment."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from evaluation import rounds
from evaluation.champion import Champion, Verdict, current, give, go_back, history
from evaluation.rounds import Round, begin, finish, round_path, settle
from infra.artifacts import read_manifest
from infra.errors import TesseraError
from infra.store import Store, open_store
from tests.support.retraining import VAL, Base, begin_line, evaluated, write_evaluation, write_run
from training.recipes.generalist import debug
from training.run import read_run

MARGIN = 0.0


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without their page; a comparison's is looked at in one test."""
    monkeypatch.setattr("evaluation.report.to_html", lambda *_: "")


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "line"))


@pytest.fixture
def base(folder: Store, tmp_path: Path) -> Base:
    """Champion 1 has one image right."""
    return begin_line(tmp_path, folder)


def of(champion: Champion) -> str:
    return champion.evaluation


def planned(store: Store, challenger: str, name: str = "a") -> Round:
    """A round that the champion of now begins; challenger: folder of its evaluation to come."""
    champion, run = current(store), read_manifest(store, challenger)["run"]
    return Round(f"retrain/{name}", champion.root, "precompute/f/s", champion.number, champion.run, run, ("up-1",))


def test_a_round_is_begun_once_and_all_who_come_are_told_the_same(store: Store):
    start = Barrier(8)

    def comes(number: int) -> Round:
        start.wait()
        titles = (f"up-{number}", "b-1")
        return begin(
            store, Round("retrain/a", "evaluate/r", "precompute/f/s", number, f"train/{number}", "train/x", titles)
        )

    with ThreadPoolExecutor(8) as pool:
        (told,) = {*pool.map(comes, range(8))}
    assert told.uploads == (f"up-{told.champion}", "b-1")
    assert begin(store, Round("retrain/a", "evaluate/r", "precompute/f/s", 99, "train/else", "train/y", ())) == told


def test_a_round_has_its_own_place_by_settings_line_and_data():
    places = {
        round_path(settings, root, train_set)
        for settings in ({"margin": 0.0}, {"margin": 0.5})
        for root in ("evaluate/a", "evaluate/b")
        for train_set in ("precompute/a", "precompute/b")
    }
    assert len(places) == 8
    assert all(place.startswith("retrain/") for place in places)


def test_a_better_challenger_is_promoted_once_however_often_it_is_settled(folder: Store, base: Base):
    challenger = evaluated(folder, base, VAL, seed=1)
    begun = planned(folder, challenger)
    verdict, against, promoted = settle(folder, begun, challenger, MARGIN, of, "flow")
    assert verdict.better
    assert (against.number, promoted.number, promoted.by) == (1, 2, "flow")
    for _ in range(2):
        assert settle(folder, begun, challenger, MARGIN, of, "another") == (verdict, against, promoted)
    assert history(folder) == [against, promoted]


def test_one_that_is_not_better_is_refused_and_the_champion_stays(folder: Store, base: Base):
    for right, seed in ((1, 1), (0, 2)):
        challenger = evaluated(folder, base, right, seed)
        verdict, against, promoted = settle(folder, planned(folder, challenger), challenger, MARGIN, of, None)
        assert (verdict.better, against.number, promoted) == (False, 1, None)
    assert len(history(folder)) == 1


def test_a_roll_back_between_a_kill_and_the_recovery_is_not_undone(folder: Store, base: Base):
    challenger = evaluated(folder, base, VAL, seed=1)
    begun = planned(folder, challenger)
    settle(folder, begun, challenger, MARGIN, of, None)
    back = go_back(folder)
    verdict, against, promoted = settle(folder, begun, challenger, MARGIN, of, None)
    assert (verdict.better, against.number, promoted.number) == (True, 1, 2)
    assert current(folder) == back


def test_of_two_challengers_one_follows_and_the_other_is_judged_against_it(folder: Store, base: Base):
    """Both are better than champion 1, and compared with it; the second one is no better than the first."""
    challengers, start = [evaluated(folder, base, VAL, seed) for seed in (1, 2)], Barrier(2)
    begun = [planned(folder, challenger, name) for challenger, name in zip(challengers, "ab", strict=True)]

    def runs(number: int) -> tuple[Verdict, Champion, Champion | None]:
        seen = list[int]()

        def evaluation(champion: Champion) -> str:
            if not seen:
                start.wait(10)  # both have seen champion 1
            seen.append(champion.number)
            return champion.evaluation

        found = settle(folder, begun[number], challengers[number], MARGIN, evaluation, str(number))
        assert seen == ([1] if found[2] else [1, 2])
        return found

    with ThreadPoolExecutor(2) as pool:
        found = sorted(pool.map(runs, range(2)), key=lambda settled: settled[1].number)
    (_, _, winner), (verdict, against, loser) = found
    assert history(folder)[1:] == [winner]
    assert (verdict.better, verdict.champion, against, loser) == (False, 2, winner, None)


def test_the_better_one_of_two_is_the_champion_whoever_was_first(folder: Store, base: Base):
    good, best = evaluated(folder, base, 5, 1), evaluated(folder, base, VAL, 2)
    begun = [planned(folder, best, "a"), planned(folder, good, "b")]

    def beaten_to_it(champion: Champion) -> str:
        if champion.number == 1:
            settle(folder, begun[1], good, MARGIN, of, None)
        return champion.evaluation

    verdict, against, promoted = settle(folder, begun[0], best, MARGIN, beaten_to_it, None)
    assert (verdict.better, against.number, promoted.number) == (True, 2, 3)
    assert [e.evaluation for e in history(folder)[1:]] == [good, best]


def after_history(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    """Have `then` done once, just after a round has read the history."""
    real, left = rounds.history, [then]

    def reads(store: Store) -> list[Champion]:
        found = real(store)
        if left:
            left.pop()()
        return found

    monkeypatch.setattr(rounds, "history", reads)


def test_two_runs_of_one_round_come_to_one_verdict(folder: Store, base: Base, monkeypatch: pytest.MonkeyPatch):
    challenger = evaluated(folder, base, VAL, seed=1)
    begun = planned(folder, challenger)
    found = []
    after_history(monkeypatch, lambda: found.append(settle(folder, begun, challenger, MARGIN, of, "first")))
    found.append(settle(folder, begun, challenger, MARGIN, of, "second"))
    assert found[0] == found[1]
    assert len(history(folder)) == 2


def test_a_line_that_began_meanwhile_is_not_taken_over_by_a_challenger_of_the_old_one(folder: Store, base: Base):
    challenger = evaluated(folder, base, VAL, seed=1)
    begun = planned(folder, challenger)
    given = give(folder, folder.url_for(evaluated(folder, base, 2, seed=3)))
    with pytest.raises(TesseraError, match=f"champion 2 begins another line; .* left as it is, {begun.run}"):
        settle(folder, begun, challenger, MARGIN, of, None)
    assert current(folder) == given
    assert len(history(folder)) == 2
    back = go_back(folder)  # and with the line its rounds are back
    assert settle(folder, begun, challenger, MARGIN, of, None)[1:] == (back, current(folder))
    assert (current(folder).number, current(folder).root) == (4, begun.root)


def test_the_manifest_and_the_page_of_a_round_tell_what_came_of_it(tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    base = begin_line(tmp_path, store, pictures=True)
    recipe = debug().changed({"train.lr": 1e-4})
    run = write_run(store, recipe, base.train_set, VAL, current(store).run)
    challenger = write_evaluation(store, recipe, run, base.val_set, pictures=True).url.split("/")[-2]
    begun = planned(store, f"evaluate/{challenger}")
    verdict, against, promoted = settle(store, begun, f"evaluate/{challenger}", MARGIN, of, None)
    outcome = finish(store, begun, verdict, against.evaluation, f"evaluate/{challenger}", promoted)
    assert (outcome.round, outcome.promoted, outcome.verdict) == (begun, 2, verdict)
    content = read_manifest(store, begun.path)
    assert content["round"] == {
        "path": begun.path, "root": against.root, "train_set": begun.train_set, "champion": 1,
        "init": against.run, "run": run.path, "uploads": ["up-1"],
    }  # fmt: skip
    assert (content["promoted"], content["verdict"]["better"], content["runs"]) == (2, True, [run.path])
    assert content["evaluations"] == [against.evaluation, f"evaluate/{challenger}"]
    page = store.read(outcome.page).decode()
    assert all(text in page for text in ("1 generalist/debug", "2 generalist/debug", "train.lr", f"{VAL} images"))
    assert finish(store, begun, verdict, against.evaluation, f"evaluate/{challenger}", promoted) == outcome
    assert read_run(store.url, run.path) == run
