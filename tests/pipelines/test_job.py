"""Which method and recipe a job may ask for. A flow run refuses the same: tests/pipelines/test_train_coco.py."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.errors import TesseraError
from pipelines.job import TrainCoco
from training.recipes import RECIPES
from training.recipes.generalist import debug, demo
from training.shares import Crew


def test_the_schema_lists_all_methods_and_the_recipes_of_all():
    fields = TrainCoco.model_json_schema()["properties"]
    assert fields["method"]["enum"] == [*RECIPES]
    listed = fields["recipe"]["enum"]
    assert len(listed) == len({*listed})
    assert {*listed} == {name for named in RECIPES.values() for name in named}


def test_every_recipe_can_be_asked_for_by_method_and_name():
    for method, named in RECIPES.items():
        for name, make in named.items():
            assert TrainCoco(method=method, recipe=name).resolved() == make()


def test_the_demo_is_what_a_job_is_about_that_says_nothing():
    assert TrainCoco().resolved() == demo()


def test_a_job_changes_the_recipe_of_its_method(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(RECIPES, "other", {"demo": debug})
    assert TrainCoco(method="other").resolved() == debug()
    job = TrainCoco(method="other", epochs=12, options={"train.seed": 3})
    assert job.resolved() == debug().changed({"train.seed": 3}).lasting(12)


@pytest.mark.parametrize(
    ("job", "told"),
    [
        ({"method": "nope"}, "unknown method 'nope'; there are generalist, .*other$"),
        ({"method": "nope", "recipe": "nope"}, "unknown method 'nope'"),
        ({"recipe": "nope"}, "unknown recipe 'nope' of generalist; there are base_420, .*, debug$"),
        ({"recipe": "only"}, "unknown recipe 'only' of generalist; .*; 'only' is a recipe of other$"),
        ({"method": "other", "recipe": "demo"}, "unknown recipe 'demo' of other; there are only; .* of generalist"),
        ({"method": "other", "recipe": "only", "options": {"methd.x": 1}}, "option 'methd'"),
    ],
    ids=str,
)
def test_a_job_that_asks_for_what_there_is_not_is_refused(job: dict, told: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(RECIPES, "other", {"only": debug})
    with pytest.raises(TesseraError, match=told):
        TrainCoco.model_validate(job)


@pytest.mark.parametrize("name", ["a", "0", "coco-base_420.v2", "a" * 63])
def test_names_are_those_that_keys_and_shells_take(name: str):
    assert TrainCoco(name=name).name == name


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "_a", "a b", "a/b", "../a", "a\n", "ä", "a" * 64, "a:b", 7])
def test_other_names_are_refused(name: object):
    with pytest.raises(ValidationError, match="name"):
        TrainCoco.model_validate({"name": name})


def test_to_start_a_name_anew_needs_one():
    assert TrainCoco(name="mine", anew=True).anew
    with pytest.raises(TesseraError, match=r"^anew: expected a name to give to this config$"):
        TrainCoco(anew=True)


@pytest.mark.parametrize(("workers", "least"), [(1, 2), (4, 5)])
def test_the_least_workers_are_no_more_than_all(workers: int, least: int):
    with pytest.raises(TesseraError, match=f"^least_workers {least} is more than workers {workers}$"):
        TrainCoco(workers=workers, least_workers=least)
    assert TrainCoco(workers=least, least_workers=least).crew.least == least


@pytest.mark.parametrize(
    "job", [{"workers": 0}, {"least_workers": 0}, {"least_workers": -1}, {"workers": 1.5}], ids=str
)
def test_workers_are_counted(job: dict):
    with pytest.raises(ValidationError, match="workers"):
        TrainCoco.model_validate(job)


def test_the_crew_is_what_the_job_says():
    assert TrainCoco().crew == Crew()
    job = TrainCoco(workers=4, least_workers=2, gpus=True, sharded=True)
    assert job.crew == Crew(workers=4, least=2, gpus=True, sharded=True)


def test_a_run_of_the_same_storage_can_be_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However its URL is written: the storage as the job has it, or absolute."""
    monkeypatch.chdir(tmp_path)
    for storage in ("store", "./store", str(tmp_path / "store"), f"file://{tmp_path}/store"):
        for init in ("store/train/0123", f"{tmp_path}/store/train/0123", f"file://{tmp_path}/store/train/0123/"):
            job = TrainCoco(storage=storage, init=init)
            assert job.init_path == "train/0123"
            job.check()
    assert TrainCoco().init_path is None
    assert TrainCoco(storage="s3://b/x", init="s3://b/x/train/0123").init_path == "train/0123"


@pytest.mark.parametrize(
    ("init", "told"),
    [
        ("other/train/0123", "other/train/0123: expected a run of this storage, .*/store$"),
        ("store/inner/train/0123", "expected a run of this storage"),
        ("s3://bucket/train/0123", "s3://bucket/train/0123: expected a run of this storage"),
        ("train/0123", "expected a run of this storage"),
        ("store/evaluate/0123", "store/evaluate/0123: expected the URL of what is finished, <storage>/train/<hash>"),
        ("store/train/0123/model.safetensors", "expected the URL of what is finished"),
        ("store/train", "expected the URL of what is finished"),
        ("ftp://x/train/0", "is no store"),
    ],
)
def test_a_run_of_elsewhere_is_refused_before_anything_starts(
    init: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TesseraError, match=told):
        TrainCoco(storage="store", init=init).check()
