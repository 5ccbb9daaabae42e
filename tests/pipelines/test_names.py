"""A name of a run through the flow's steps, without a server: refused before anything is computed."""

from pathlib import Path

import pytest

from infra.errors import TesseraError
from infra.store import open_store
from pipelines import train_coco as flow
from pipelines.job import TrainCoco
from preprocessing.shards import ShardSet
from preprocessing.synthetic import CATEGORIES, SyntheticConfig, write_set
from training.run import TrainedRun

STEPS = ("check_job", "find_data", "check_recipe", "precompute_split", "train", "evaluate_run")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, str]]:
    """(init, train set) of each training that would have been."""
    found = list[tuple[str | None, str]]()

    def run_training(chosen, train_set, url, crew, *, init, check, watch) -> TrainedRun:
        found.append((init, train_set.path))
        return TrainedRun(chosen.run_path(train_set.path, init), 1, 1.0)

    monkeypatch.setattr(flow, "run_training", run_training)
    monkeypatch.setattr(flow, "TrainProgress", lambda: None)
    return found


@pytest.fixture
def job(tmp_path: Path) -> TrainCoco:
    return TrainCoco(storage=str(tmp_path / "store"), recipe="debug", name="mine")


def shards_at(path: str) -> ShardSet:
    return ShardSet(path, CATEGORIES, TrainCoco(recipe="debug").resolved().shards, (), ())


def go(job: TrainCoco, data: str = "precompute/1") -> TrainedRun:
    """The two steps that know of names."""
    chosen = job.resolved()
    flow.check_recipe.fn(job, chosen)
    return flow.train.fn(job, chosen, shards_at(data), shards_at("precompute/val"))


def changed(job: TrainCoco, **fields) -> TrainCoco:
    return TrainCoco.model_validate(job.model_dump() | fields)


def test_a_name_takes_the_config_that_it_was_given_first(job: TrainCoco, trained: list):
    go(job)
    go(changed(job, options={"train.micro_batch": 2, "upkeep.keep": 5, "method.decode.min_area": 0.1}, workers=2))
    assert len(trained) == 2
    other = changed(job, options={"train.lr": 0.5}, epochs=7)
    told = "train.epochs: 6 so far, 7.0 now; train.lr: 0.001 so far, 0.5 now; train.warmup_epochs: "
    with pytest.raises(TesseraError, match=f"^the run named 'mine' has been trained with another config; {told}"):
        flow.check_recipe.fn(other, other.resolved())
    go(changed(other, name="other"))
    go(changed(other, name=None))
    assert len(trained) == 4


def test_a_changed_data_set_is_refused_where_it_is_known(job: TrainCoco, trained: list):
    go(job)
    with pytest.raises(
        TesseraError, match=r"; train_set: 'precompute/1' so far, 'precompute/2' now\. Take another name"
    ):
        go(job, "precompute/2")
    assert len(trained) == 1


def test_anew_gives_the_name_to_the_other_config(job: TrainCoco, trained: list):
    first = go(job)
    other = changed(job, options={"train.seed": 1})
    second = go(changed(other, anew=True), "precompute/2")
    assert first.path != second.path
    go(other, "precompute/2")
    with pytest.raises(TesseraError, match=r"train\.seed: 1 so far, 0 now"):
        go(job)
    assert len(trained) == 3


def test_to_go_on_from_another_run_is_no_accident(job: TrainCoco, trained: list):
    first = go(job)
    tuned = changed(job, init=f"{job.storage}/{first.path}", options={"train.lr": 1e-5})
    go(tuned, "precompute/2")
    assert trained[-1] == (first.path, "precompute/2")
    with pytest.raises(TesseraError, match=f"init: '{first.path}' so far, None now"):
        go(job)


def test_the_flow_refuses_a_changed_config_before_precompute(
    job: TrainCoco, trained: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    go(job)
    for name in STEPS:
        monkeypatch.setattr(flow, name, getattr(flow, name).fn)
    root = write_set(tmp_path, SyntheticConfig(train=4, val=1, size=(32, 32)))
    before = {entry.key for entry in open_store(job.storage).list()}
    monkeypatch.setattr(flow.ray_cluster, "session", lambda *_, **__: pytest.fail("Ray was started"))
    with pytest.raises(TesseraError, match=r"train\.seed: 0 so far, 1 now"):
        flow.train_coco.fn(changed(job, data=str(root), options={"train.seed": 1}))
    assert {entry.key for entry in open_store(job.storage).list()} == before
