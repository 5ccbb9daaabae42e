"""Which method and recipe a job may ask for. A flow run refuses the same: tests/pipelines/test_train_coco.py."""

import pytest

from infra.errors import TesseraError
from pipelines.job import TrainCoco
from training.recipes import RECIPES
from training.recipes.generalist import debug, demo


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
