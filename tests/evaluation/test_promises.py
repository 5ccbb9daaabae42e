"""What is finished and has lost something is made again, or named with what to delete."""

from pathlib import Path

import pytest

from evaluation import ray_evaluate, rounds
from evaluation.evaluate import lost
from infra import artifacts
from infra.errors import TesseraError
from infra.store import Store, open_store
from preprocessing.coco import read_index
from preprocessing.shards import ShardConfig, lost_shards
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.finished_run import finished_run
from tests.support.retraining import VAL, begin_line, evaluated
from tests.support.shard_sets import make_set
from training.recipes.generalist import debug
from training.run import forget_lost, open_run, read_run

PATH = "train/x"


@pytest.fixture
def run(tmp_path: Path) -> tuple[Store, str]:
    store = open_store(str(tmp_path / "store"))
    return store, finished_run(tmp_path, store.url).removeprefix(f"{store.url}/")


def test_a_run_whose_weights_are_gone_is_no_longer_finished(run: tuple[Store, str], caplog: pytest.LogCaptureFixture):
    store, path = run
    forget_lost(store, path)
    assert read_run(store.url, path) is not None
    store.delete(f"{path}/model.safetensors")
    with pytest.raises(TesseraError, match=rf"{path}: it is finished, and model\.safetensors of it is gone; .*delete"):
        open_run(store.url, path)
    forget_lost(store, path)
    assert read_run(store.url, path) is None
    assert f"{path}/model.safetensors is gone: the run is trained again" in caplog.text


def test_a_run_whose_table_is_gone_is_named_and_keeps_its_weights(run: tuple[Store, str]):
    store, path = run
    store.delete(f"{path}/metrics.parquet")
    with pytest.raises(TesseraError, match=rf"metrics\.parquet of it is gone; .*delete {store.url}/{path}"):
        forget_lost(store, path)
    assert store.exists(f"{path}/model.safetensors")
    assert read_run(store.url, path) is not None


@pytest.mark.parametrize("content", [b"null", b"[]", b"", b"3", b"{"])
def test_a_manifest_that_is_none_is_named(tmp_path: Path, content: bytes):
    store = open_store(str(tmp_path))
    store.write(f"{PATH}/manifest.json", content)
    for look in (
        lambda: read_run(store.url, PATH),
        lambda: open_run(store.url, PATH),
        lambda: forget_lost(store, PATH),
    ):
        with pytest.raises(TesseraError, match=f"{store.url}/{PATH}/manifest.json"):
            look()


def test_an_evaluation_knows_what_it_has_lost_and_a_shard_without_its_pngs_is_done_again(tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    base = begin_line(tmp_path, store, pictures=True)
    path = evaluated(store, base, 1, pictures=True)
    for number, shard in enumerate(base.val_set.shards):
        store.write(f"{path}/shards/{shard.key.split('/')[-1][:-4]}.json", b"%d" % number)
    assert lost(store.url, path, base.val_set) == []
    first = base.val_set.shards[0].image_ids[0]
    gone = [f"{path}/report.html", f"{path}/predictions/{first:012d}.png"]
    records = [entry.key for entry in store.list(f"{path}/shards/")]
    for key in gone:
        store.delete(key)
    assert lost(store.url, path, base.val_set) == gone
    assert len([*store.list(f"{path}/shards/")]) == len(records) - 1
    store.delete(base.val_set.shards[0].key)
    assert lost_shards(store, base.val_set) == {base.val_set.shards[0].key}


def test_a_rounds_page_is_written_again_and_nothing_is_judged_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = open_store(str(tmp_path / "store"))
    base = begin_line(tmp_path, store)
    both = [evaluated(store, base, right, seed) for right, seed in ((1, 0), (VAL, 1))]
    monkeypatch.setattr(rounds, "to_html", lambda rows: str(len(rows)))
    path = f"retrain/{'f' * 16}"
    artifacts.write_manifest(store, path, {"evaluations": both})
    before = [*store.list("champion/")]
    rounds.mend(store, path)
    assert store.read(f"{path}/compare.html") == b"2"
    assert [*store.list("champion/")] == before


def test_the_same_command_makes_an_evaluation_whole_again(run: tuple[Store, str], tmp_path: Path, monkeypatch, caplog):
    def here(act, arguments, report, **_):
        found = [act(*one) for one in arguments]
        for one in found:
            report(one)
        return found

    monkeypatch.setattr(ray_evaluate.ray_cluster, "map_tasks", here)
    store, path = run
    index = read_index(write_set(tmp_path / "val", SyntheticConfig(train=2, val=1, size=(32, 40), seed=5)), "train2017")
    val_set, trained = make_set(store, index, ShardConfig(radius=0, samples=1)), read_run(store.url, path)
    assert trained is not None
    report = ray_evaluate.evaluate(debug(), trained, val_set, store.url, gpus=False)
    folder = report.url.removeprefix(f"{store.url}/").rpartition("/")[0]
    whole = {entry.key: store.read(entry.key) for entry in store.list(f"{folder}/") if not entry.key.endswith(".html")}
    for name in ("report.html", "report.json", "predictions/000000000001.png"):
        store.delete(f"{folder}/{name}")
    assert ray_evaluate.evaluate(debug(), trained, val_set, store.url, gpus=False) == report
    assert "3 objects of it are gone" in caplog.text
    assert store.exists(f"{folder}/report.html")
    assert {key: store.read(key) for key in whole} == whole
