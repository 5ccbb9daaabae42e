"""Retention deletes what nothing refers to, and nothing else, however often it is killed."""

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import champion, grid, retention, rounds
from evaluation.champion import Champion, Verdict, history
from evaluation.compare import compare, read_evaluation
from evaluation.evaluate import EvalJob, evaluate_shard, evaluation_path, gather
from evaluation.report import Gallery, write_report
from evaluation.retention import KINDS, kind_of, survey, sweep
from evaluation.rounds import Round
from infra import artifacts, in_use
from infra.errors import StoreError, TesseraError
from infra.store import FolderStore, Store, open_store
from preprocessing import inbox, shards
from preprocessing.coco import read_index
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import ShardConfig, ShardSet, compute_shard, plan, read_set
from preprocessing.synthetic import STORED, SyntheticConfig, write_set
from tests.support.finished_run import finished_run
from tests.support.shard_sets import make_set
from training import checkpoints, names
from training.recipes.generalist import debug
from training.run import WEIGHTS, open_run, read_run

AT_ONCE = timedelta()
GONE = "0" * 16  # of what is to go
KEPT = "f" * 16
Objects = dict[str, bytes]


def silent(text: str) -> None:
    pass


def deleted(store: Store, older: timedelta = AT_ONCE) -> set[str]:
    """What a sweep deletes, by the listing."""
    before = {entry.key for entry in store.list()}
    sweep(store, older, silent)
    return before - {entry.key for entry in store.list()}


def evaluated(store: Store, run: str, val_set: ShardSet) -> str:
    """Folder of a finished evaluation."""
    recipe, trained = debug(), read_run(store.url, run)
    assert trained is not None
    path = evaluation_path(recipe, run, val_set.path)
    jobs = [EvalJob(recipe, store.url, run, path, val_set.labels, shard) for shard in val_set.shards]
    write_report(
        recipe, trained, val_set, store.url, path, gather([*map(evaluate_shard, jobs)], val_set), Gallery({}, {})
    )
    return path


def build(folder: Path, store: Store) -> None:
    """A champion, its challenger and their round, with all that they need, on a store."""
    first = finished_run(folder, store.url).removeprefix(f"{store.url}/")
    second = finished_run(folder, store.url, debug().changed({"train.seed": 1})).removeprefix(f"{store.url}/")
    index = read_index(write_set(folder / "val", SyntheticConfig(train=2, val=1, size=(32, 40), seed=5)), "train2017")
    val_set = make_set(store, index, ShardConfig(radius=0, samples=1))
    before, after = evaluated(store, first, val_set), evaluated(store, second, val_set)
    entry = champion.give(store, store.url_for(before))
    begun = rounds.begin(store, Round(f"retrain/{KEPT}", before, val_set.path, 1, first, second, ("a-1",)))
    rounds.finish(store, begun, Verdict(entry.number, 0.0, (0.0, 0.0), 0.0, False), before, after, None)
    artifacts.write_manifest(store, f"ablate/{KEPT}", {"runs": [first], "evaluations": [f"evaluate/{KEPT}"]})
    artifacts.write_manifest(store, f"evaluate/{KEPT}", {"run": first, "val_set": val_set.path})
    names.give(store, "mine", f"train/{KEPT}", {"init": None})
    alone = {
        f"train/{KEPT}/checkpoints/00000001.pt": b"named",
        f"{first}/tensorboard/scalars/events": b"kept",
        f"inbox/up/{artifacts.MANIFEST}": b"not ours, and no JSON",
        "uploads/line/up-1.json": b"{}",
        "evaluate/notes/mine.txt": b"",
        "train/notes.txt": b"",
        "precompute/shards/readme.txt": b"",
        "elsewhere/a.bin": b"12",
        "top": b"",
    }
    for key, data in alone.items():
        store.write(key, data)


def litter(folder: Path, store: Store) -> None:
    """What may go."""
    index = read_index(write_set(folder / "lost", SyntheticConfig(train=2, val=1, size=(32, 40), seed=8)), "train2017")
    for job in plan(store, index, ShardConfig(radius=0, samples=1)).jobs:
        compute_shard(store.url, job)  # never committed
    runs = sorted({entry.key.split("/")[1] for entry in store.list("train/") if entry.key.endswith("/manifest.json")})
    val_set = next(found for found in sets(store) if found.config.radius == 0)
    report = evaluated(store, f"train/{runs[0]}", val_set)
    whole = [entry.key for entry in store.list(f"{report}/")]
    for key in whole:  # the same in another folder, to which nothing refers
        store.write(f"evaluate/{GONE}/{key.removeprefix(f'{report}/')}", store.read(key))
        if not key.endswith(("manifest.json", "report.html")):
            store.write(f"evaluate/{'1' * 16}/{key.removeprefix(f'{report}/')}", store.read(key))
    alone = {
        f"precompute/shards/{GONE}.tar": b"its record was not written",
        f"train/{runs[0]}/checkpoints/00000004.pt": b"4",
        f"train/{runs[0]}/checkpoints/00000008.pt": b"8",
        f"train/{GONE}/checkpoints/00000001.pt": b"1",
        f"train/{GONE}/metrics.parquet": b"m",
        f"train/{'1' * 16}/{WEIGHTS}": b"of a best checkpoint, without manifest",
        f"retrain/{GONE}/plan.json": json.dumps(
            {"train_set": "precompute/-/-", "init": "train/-", "run": "train/-"}
        ).encode(),
        f"probe-{'a' * 32}": b"tessera",
    }
    for key, data in alone.items():
        store.write(key, data)


def sets(store: Store) -> Iterator[ShardSet]:
    for entry in store.list("precompute/"):
        if entry.key.endswith("/manifest.json"):
            found = read_set(store, entry.key.removesuffix("/manifest.json"))
            assert found is not None
            yield found


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> tuple[Objects, Objects]:
    """What must stay, and what may go, by key."""
    folder = tmp_path_factory.mktemp("retention")
    source = open_store(str(folder / "store"))
    build(folder, source)
    kept = {entry.key: source.read(entry.key) for entry in source.list()}
    litter(folder, source)
    everything = {entry.key: source.read(entry.key) for entry in source.list()}
    return kept, {key: data for key, data in everything.items() if key not in kept}


@pytest.fixture
def filled(store: Store, objects: tuple[Objects, Objects]) -> Store:
    fill(store, objects)
    return store


def fill(store: Store, objects: tuple[Objects, Objects]) -> None:
    """Write what is not there."""
    there = {entry.key for entry in store.list()}
    for key, data in (objects[0] | objects[1]).items():
        if key not in there:
            store.write(key, data)


def check_whole(store: Store, whole: Objects) -> None:
    """All that says of itself that it is finished is, and what it names is there."""
    keys = {entry.key for entry in store.list()}
    for found in sets(store):
        for shard in found.shards:
            assert {shard.key, shard.key.replace(".tar", ".json")} <= keys
    needed = {key for key in whole if "/checkpoints/" not in key}
    for key in keys:
        folder = key.removesuffix("/manifest.json")
        if folder != key:
            assert {other for other in needed if other.startswith(f"{folder}/")} <= keys
        if re.fullmatch(r"evaluate/\w+/shards/\w+\.json", key):
            named = json.loads(store.read(key))["annotations"]
            pngs = {f"{key.split('/shards/')[0]}/predictions/{row['file_name']}" for row in named}
            assert pngs
            assert pngs <= keys
        if re.fullmatch(r"precompute/shards/\w+\.json", key):
            assert key.replace(".json", ".tar") in keys


def test_the_folders_are_called_as_elsewhere():
    ours = [shards.FOLDER, rounds.FOLDER, champion.FOLDER, inbox.INBOX, inbox.DECISIONS, inbox.QUARANTINE, STORED]
    assert {*ours, in_use.FOLDER, "train", "evaluate", "ablate", "tune", "names"} == {*KINDS}
    assert debug().run_path("x").startswith("train/")
    assert evaluation_path(debug(), "x", "y").startswith("evaluate/")
    assert names._key("x").startswith("names/")
    assert grid._path("x", []).startswith("ablate/")
    assert kind_of(checkpoints._key(f"train/{KEPT}", 12)) == "checkpoints"


def test_what_is_referred_to_stays_and_works_and_all_else_goes(filled: Store, objects: tuple[Objects, Objects]):
    kept, gone = objects
    assert deleted(filled) == gone.keys()
    assert {entry.key: filled.read(entry.key) for entry in filled.list()} == kept
    assert deleted(filled) == set()
    for found in sets(filled):
        for shard in found.shards:
            assert len([*read_shard_samples(filled.url, shard)]) == len(shard.image_ids)
    (entry,) = history(filled)
    assert open_run(filled.url, entry.run)
    (key,) = (e.key for e in filled.list("retrain/") if e.key.endswith("/manifest.json"))
    both = json.loads(filled.read(key))["evaluations"]
    assert both[0] == entry.evaluation
    assert len(compare([read_evaluation(filled.url_for(path)) for path in both])) == 2


def test_looking_changes_nothing(filled: Store, objects: tuple[Objects, Objects]):
    before = [*filled.list()]
    found = survey(filled, AT_ONCE)
    assert [*filled.list()] == before
    assert {entry.key for one in found.candidates for entry in one.entries} == objects[1].keys()
    sizes = [one.bytes for one in found.candidates]
    assert sizes == sorted(sizes, reverse=True)
    assert all(entry.key.startswith(one.key) for one in found.candidates for entry in one.entries)


def test_what_is_young_stays_and_a_folder_is_as_young_as_its_newest_object(filled: Store, objects):
    assert deleted(filled, timedelta(days=30)) == set()
    time.sleep(3.1)  # times of listings have whole seconds
    young = f"train/{GONE}/checkpoints/00000001.pt"
    filled.write(young, b"1")
    again = {key for key in objects[1] if key.startswith(f"train/{GONE}/")}
    assert deleted(filled, timedelta(seconds=2)) == objects[1].keys() - again


def test_what_work_in_progress_needs_stays(filled: Store, objects: tuple[Objects, Objects]):
    gone = objects[1].keys()
    needs = [f"evaluate/{GONE}/", f"train/{GONE}/", "precompute"]
    with in_use.in_use(filled, *needs):
        done = deleted(filled)
    # With anything in progress, a round may be of it; while a run trains, the weights of its best may be written.
    other = {key for key in gone if key.startswith(("retrain/", f"train/{'1' * 16}/"))}
    assert done == {key for key in gone if not key.startswith(tuple(needs))} - other
    assert deleted(filled) == gone - done


@pytest.mark.parametrize("prefix", ["", "train/", "train/0"])
def test_any_prefix_that_meets_a_folder_keeps_it(tmp_path: Path, prefix: str):
    store = open_store(str(tmp_path))
    store.write(f"train/{GONE}/checkpoints/00000001.pt", b"")
    with in_use.in_use(store, prefix):
        assert deleted(store) == set()


DEAD = {f"{in_use.FOLDER}/{'a' * 32}.json", f"{in_use.FOLDER}/retention-{'b' * 32}.json"}


def test_what_dead_work_left_goes(store: Store, monkeypatch: pytest.MonkeyPatch):
    for key in DEAD:
        store.write(key, b'{"prefixes": ["train/"]}')
    store.write(f"train/{GONE}/metrics.parquet", b"")
    assert deleted(store) == set()
    monkeypatch.setattr(in_use, "_DEAD_SECONDS", 1.0)
    monkeypatch.setattr(in_use, "_BEAT_SECONDS", 0.2)
    time.sleep(2.1)
    assert deleted(store) == {*DEAD, f"train/{GONE}/metrics.parquet"}


def test_killed_at_any_delete_it_leaves_nothing_half_and_the_next_one_finishes(
    store: Store, objects: tuple[Objects, Objects], monkeypatch: pytest.MonkeyPatch
):
    kept, gone = objects
    delete, lock = type(store).delete, threading.Lock()
    for last in range(0, len(gone), 1 if isinstance(store, FolderStore) else 5):  # a server takes its time
        fill(store, objects)
        calls = iter(range(last))

        def dies(self: Store, key: str, calls: Iterator[int] = calls) -> None:
            with lock:
                if next(calls, None) is None:
                    raise StoreError("killed")
            delete(self, key)

        with monkeypatch.context() as patched:
            patched.setattr(type(store), "delete", dies)
            with pytest.raises(StoreError, match="killed"):
                sweep(store, AT_ONCE, silent)
        left = {entry.key for entry in store.list()}
        assert len(gone.keys() - left) == last
        check_whole(store, kept | gone)
        sweep(store, AT_ONCE, silent)
        assert {e.key for e in store.list() if not e.key.startswith(f"{in_use.FOLDER}/")} == kept.keys()
        for entry in store.list(f"{in_use.FOLDER}/"):
            store.delete(entry.key)


BROKEN = {
    f"train/{KEPT}/manifest.json": b'{"recipe": 1',
    f"evaluate/{KEPT}/manifest.json": b'{"run": "train/x"}',
    f"precompute/{KEPT}/{KEPT}/manifest.json": b'{"shards": ["a"]}',
    "champion/000001.json": b"[]",
    f"retrain/{KEPT}/plan.json": b"\xff",
    f"ablate/{KEPT}/manifest.json": b"{}",
    "elsewhere/manifest.json": b"nothing of ours",
}


@pytest.mark.parametrize("key", BROKEN)
def test_a_manifest_that_cannot_be_read_stops_it(tmp_path: Path, key: str):
    store = open_store(str(tmp_path))
    store.write(key, BROKEN[key])
    store.write(f"train/{GONE}/checkpoints/00000001.pt", b"")
    before = [*store.list()]
    for look in (lambda: survey(store, AT_ONCE), lambda: sweep(store, AT_ONCE, silent)):
        with pytest.raises(TesseraError, match=f"{key}: .*nothing was deleted"):
            look()
    assert [*store.list()] == before


def test_long_deletions_tell_how_far_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retention, "_TELL_SECONDS", 0.0)
    store, told = open_store(str(tmp_path)), list[str]()
    for number in range(3):
        store.write(f"train/{GONE}/checkpoints/{number:08d}.pt", b"0" * 500)
    sweep(store, AT_ONCE, told.append)
    assert told[1:] == [
        "deleted 1 of 3 objects, 500 B of 1.5 kB",
        "deleted 2 of 3 objects, 1.0 kB of 1.5 kB",
        "deleted 3 of 3 objects, 1.5 kB of 1.5 kB",
        "deleted 3 of 3 objects, 1.5 kB of 1.5 kB",
    ]


HASHES = [f"{number:016x}" for number in range(6)]
some = st.sets(st.sampled_from(HASHES))


@settings(max_examples=40, deadline=None)
@given(
    on_disk=some,
    old=some,
    listed=st.lists(some, max_size=3),
    reports=some,
    finished=some,
    champions=st.lists(st.sampled_from(HASHES), max_size=3),
    compared=some,
    used=some,
)
def test_any_graph(on_disk, old, listed, reports, finished, champions, compared, used):
    """What goes is what is old, in use by nobody, and reached by no manifest."""
    objects: dict[str, object] = {f"precompute/shards/{h}{end}": 0 for h in on_disk for end in (".tar", ".json")}
    for number, members in enumerate(listed):
        rows = [{"key": f"precompute/shards/{h}.tar"} for h in sorted(members)]
        objects[f"precompute/{KEPT}/{number:016x}/manifest.json"] = {"shards": rows}
    objects |= {f"evaluate/{h}/predictions/1.png": 0 for h in reports}
    objects |= {
        f"evaluate/{h}/manifest.json": {"run": "train/-", "val_set": "precompute/-/-"} for h in reports & finished
    }
    for number, h in enumerate(champions, start=1):
        entry = Champion(number, f"train/{h}", f"evaluate/{h}", f"evaluate/{HASHES[0]}", {"all": 1.0}, "", None, "")
        objects[f"champion/{number:06d}.json"] = vars(entry)
    objects[f"retrain/{KEPT}/manifest.json"] = {"evaluations": [f"evaluate/{h}" for h in sorted(compared)]}
    with TemporaryDirectory() as folder:
        for key, content in objects.items():
            path = Path(folder, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
            days = 60 if old.intersection(re.findall("[0-9a-f]{16}", key)) else 1
            os.utime(path, (time.time() - 86400 * days,) * 2)
        store = open_store(folder)
        free_shards = (on_disk & old) - {h for members in listed for h in members}
        free_reports = (reports & old) - {*champions, *compared, *([HASHES[0]] if champions else [])}
        with in_use.in_use(store, *(f"evaluate/{h}/" for h in used), *(f"precompute/shards/{h}" for h in used)):
            gone = deleted(store, timedelta(days=30))
            assert {key.split("/")[2][:16] for key in gone if key.startswith("precompute/")} == free_shards - used
            assert {key.split("/")[1] for key in gone if key.startswith("evaluate/")} == free_reports - used
            assert deleted(store, timedelta(days=30)) == set()
