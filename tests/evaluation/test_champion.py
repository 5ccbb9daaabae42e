"""The champion: one of all that race gets the next number, nothing is lost, only what is better beyond chance comes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest

from evaluation import champion
from evaluation.champion import Champion, current, follow, give, go_back, history, judge, promote, resolve
from evaluation.report import GroupPQ
from infra import artifacts
from infra.errors import TesseraError
from infra.store import Store, open_store
from preprocessing.shards import ShardConfig
from tests.support.retraining import VAL, Base, begin_line, evaluated, make_base, write_evaluation, write_run
from tests.support.shard_sets import make_set
from training.recipes.generalist import debug

PQ: GroupPQ = {"all": 1.0, "things": 1.0, "stuff": None}
RACERS = 8


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without their page, which takes most of the time and nobody reads here."""
    monkeypatch.setattr("evaluation.report.to_html", lambda *_: "")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Base]:
    """A store with evaluations, for tests that name no champion."""
    folder = tmp_path_factory.mktemp("judged")
    store = open_store(str(folder / "store"))
    return store, make_base(folder, store)


def entry(number: int, run: str = "train/a", how: str = "promoted") -> Champion:
    return Champion(number, run, f"evaluate/of-{run[6:]}", "evaluate/root", PQ, how, None, "2026-01-01T00:00:00+00:00")


def named(store: Store, *runs: str) -> None:
    for number, run in enumerate(runs, start=len(history(store)) + 1):
        assert follow(store, entry(number, f"train/{run}"))
        for name in artifacts.PROMISED["train"]:
            store.write(f"train/{run}/{name}", b"")


def runs(store: Store) -> str:
    return "".join(e.run.removeprefix("train/") for e in history(store))


def test_without_an_entry_there_is_no_champion(store: Store):
    assert history(store) == []
    with pytest.raises(TesseraError, match=f"^{store.url}: no champion yet; name one: python -m pipelines.champion"):
        current(store)
    with pytest.raises(TesseraError, match="no champion yet"):
        go_back(store)


def test_of_all_that_race_for_a_number_one_gets_it(store: Store):
    rounds, start = 3, Barrier(RACERS)

    def race(racer: int) -> list[bool]:
        won = []
        for number in range(1, rounds + 1):
            start.wait()
            won.append(follow(store, entry(number, f"train/{racer}")))
        return won

    with ThreadPoolExecutor(RACERS) as pool:
        won = [*pool.map(race, range(RACERS))]
    assert [sum(of_round) for of_round in zip(*won, strict=True)] == [1] * rounds
    assert [e.number for e in history(store)] == [1, 2, 3]
    assert runs(store) == "".join(str(of_round.index(True)) for of_round in zip(*won, strict=True))
    assert current(store) == history(store)[-1]


def test_of_all_that_see_one_champion_one_takes_its_place(made: tuple[Store, Base], tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    base = begin_line(tmp_path, store)
    seen, start = current(store), Barrier(RACERS)
    challengers = [evaluated(store, base, VAL, seed) for seed in (1, 2)]

    def race(racer: int) -> Champion | None:
        start.wait()
        return promote(store, seen, challengers[racer % 2], f"flow {racer}")

    with ThreadPoolExecutor(RACERS) as pool:
        found = [*pool.map(race, range(RACERS))]
    (won,) = [one for one in found if one is not None]
    assert won == current(store)
    assert (won.number, won.how, won.by, won.root) == (2, "promoted", f"flow {found.index(won)}", seen.root)
    assert won.evaluation == challengers[found.index(won) % 2]
    assert history(store) == [seen, won]


def test_a_roll_back_is_an_entry_like_any_other_and_nothing_is_lost(store: Store):
    named(store, "a", "b")
    before = {e.key: store.read(e.key) for e in store.list("champion/")}
    back = go_back(store)
    assert (back.number, back.run, back.evaluation, back.how, back.by) == (
        3, "train/a", "evaluate/of-a", "rolled back to 1", None,
    )  # fmt: skip
    assert current(store) == back
    assert {e.key: store.read(e.key) for e in store.list("champion/")}.items() > before.items()
    assert go_back(store).run == "train/b"  # a roll-back of the roll-back
    assert [e.how for e in history(store)[2:]] == ["rolled back to 1", "rolled back to 2"]


def test_a_roll_back_goes_to_the_number_that_it_is_told(store: Store):
    named(store, "a", "b", "c")
    assert (go_back(store, 1).number, runs(store)) == (4, "abca")
    assert (go_back(store, 3).how, runs(store)) == ("rolled back to 3", "abcac")
    for number in (6, -1):
        with pytest.raises(TesseraError, match=rf"no entry number {number} to go back to; there are 5"):
            go_back(store, number)
    assert runs(store) == "abcac"


def test_there_is_nothing_to_go_back_to_from_the_only_run(store: Store):
    named(store, "a", "a")
    with pytest.raises(TesseraError, match="no entry of another run to go back to; there are 2"):
        go_back(store)
    assert runs(store) == "aa"


def between(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    """Have `then` done once, just after the history was read."""
    real, left = champion.history, [then]

    def reads(store: Store) -> list[Champion]:
        found = real(store)
        if left:
            left.pop()()
        return found

    monkeypatch.setattr(champion, "history", reads)


def test_a_roll_back_asks_again_when_another_champion_was_named_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    named(store, "a", "b")
    between(monkeypatch, lambda: follow(store, entry(3, "train/c")))
    with pytest.raises(TesseraError, match="another champion was named at the same moment"):
        go_back(store)
    assert runs(store) == "abc"


def test_a_challenger_must_be_better_beyond_chance_and_by_the_margin(made: tuple[Store, Base]):
    store, base = made
    poor, good, best = (evaluated(store, base, right, 10 + right) for right in (1, VAL - 1, VAL))
    same = evaluated(store, base, 1, 20)
    first = replace(entry(1), evaluation=poor)
    for challenger in (poor, same):
        verdict = judge(store, first, poor, challenger, 0.0)
        assert (verdict.better, verdict.difference, verdict.interval) == (False, 0.0, (0.0, 0.0))
    clear = judge(store, first, poor, best, 0.0)
    assert clear.better
    assert clear.interval[0] > 0
    assert clear.interval[0] <= clear.difference <= clear.interval[1]
    assert "against champion 1, above +0.00" in str(clear)
    assert judge(store, first, poor, best, clear.interval[0] - 1e-9).better
    refused = judge(store, first, poor, best, clear.interval[0])
    assert not refused.better
    assert "not above" in str(refused)
    worse = judge(store, first, best, poor, 0.0)
    assert not worse.better
    assert worse.difference == -clear.difference
    chance = judge(store, first, good, best, 0.0)  # one image more, which many resamples lack
    assert chance.difference > 0
    assert not chance.better


def test_evaluations_of_other_images_cannot_be_compared(made: tuple[Store, Base]):
    store, base = made
    run = write_run(store, debug().changed({"train.seed": 30}), base.train_set, 2)
    fewer = make_set(store, replace(base.index, records=base.index.records[:3]), ShardConfig(radius=0))
    other = write_evaluation(store, debug(), run, fewer).url.removeprefix(f"{store.url}/").removesuffix("/report.html")
    with pytest.raises(TesseraError, match="not of the same images"):
        judge(store, entry(1), evaluated(store, base, 1), other, 0.0)
    with pytest.raises(TesseraError, match="/evaluate/none: not finished, or not there"):
        judge(store, entry(1), evaluated(store, base, 1), "evaluate/none", 0.0)


def test_a_line_begins_with_a_finished_evaluation_of_this_storage(tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    base = begin_line(tmp_path, store)
    first = current(store)
    assert (first.number, first.how, first.evaluation) == (1, "given", first.root)
    again = evaluated(store, base, 3, seed=1)
    given = give(store, f"{store.url}/{again}")
    assert given.root == again
    assert f"evaluate/{given.line}" == again
    assert given.line != first.line
    assert [e.number for e in history(store)] == [1, 2]
    for url, told in (
        (f"{store.url}/evaluate/none", "not finished, or not there"),
        (f"{tmp_path}/other/{again}", f"expected an evaluation of this storage, {store.url}"),
        (f"{store.url}/{first.run}", "expected the URL of what is finished"),
    ):
        with pytest.raises(TesseraError, match=told):
            give(store, url)
    assert [e.number for e in history(store)] == [1, 2]


def test_the_champion_of_a_storage_is_a_run_like_any_other(store: Store):
    run = f"{store.url}/train/abc"
    assert resolve(run) == run
    with pytest.raises(TesseraError, match="no champion yet"):
        resolve(f"{store.url}/champion")
    named(store, "a", "b")
    assert resolve(f"{store.url}/champion") == resolve(f"{store.url}/champion/") == f"{store.url}/train/b"
    assert resolve("champion") == "champion"


def test_a_missing_number_is_named_and_what_is_no_entry_is_not_one(store: Store):
    named(store, "a", "b", "c")
    store.write("champion/.DS_Store", b"")
    assert runs(store) == "abc"
    store.delete("champion/000002.json")
    for look in (history, current):
        with pytest.raises(TesseraError, match=r"champion/000002\.json: it is missing, and champion/000003"):
            look(store)


def test_a_run_whose_weights_are_gone_becomes_no_champion(store: Store):
    named(store, "a", "b")
    store.delete("train/a/model.safetensors")
    with pytest.raises(TesseraError, match=r"train/a: .*model\.safetensors of it is gone.*delete .*train/a"):
        go_back(store)
    assert runs(store) == "ab"
