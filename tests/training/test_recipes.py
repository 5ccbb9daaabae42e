import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from infra.errors import TesseraError
from tests.support.examples import table
from training.recipe import Recipe
from training.recipes import RECIPES, debug, demo, recipe

ALL = pytest.mark.parametrize("name", RECIPES)


@ALL
def test_a_recipe_says_what_to_expect_where_and_what_was_measured(name: str):
    said = " ".join((RECIPES[name].__doc__ or "").split())
    for word in ("Expected: ", "Hardware: ", "Measured: "):
        assert said.partition(word)[2].strip(), word


@ALL
def test_a_recipe_is_found_by_its_own_name(name: str):
    assert recipe(name).name == name
    assert recipe(name) == recipe(name)


@ALL
def test_a_recipe_builds_without_memory(name: str):
    with torch.device("meta"):
        method = recipe(name).build(table(5, 3))
    assert all(p.is_meta for p in method.parameters())
    assert method.grid == recipe(name).shards.grid


@ALL
def test_batches_of_a_recipe_divide_among_1_2_4_and_8_workers(name: str):
    for workers in (1, 2, 4, 8):
        if recipe(name).train.batch >= workers:
            images, passes = recipe(name).train.split_batch(workers)
            assert images * passes * workers == recipe(name).train.batch


def test_an_unknown_recipe_is_answered_with_all_names():
    with pytest.raises(TesseraError) as caught:
        recipe("nope")
    assert all(name in str(caught.value) for name in ["'nope'", *RECIPES])


def leaves(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every option that is no dataclass itself."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, (*path, field.name))
        else:
            yield (*path, field.name)


def another(value: Any) -> Any:
    """A value of the same type that a config may well accept."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return 0.75 * value or 0.25
        case "alternate" | "joint":
            return {"alternate": "joint", "joint": "alternate"}[value]
        case str():
            return f"{value} too"
        case tuple():
            return (another(value[0]), *value[1:])
    raise AssertionError(f"how does one change {value!r}?")


def changed(config: Any, path: tuple[str, ...]) -> Any:
    value = getattr(config, path[0])
    return dataclasses.replace(config, **{path[0]: changed(value, path[1:]) if path[1:] else another(value)})


def options(base: Recipe) -> list:
    return [pytest.param(base, path, id=f"{base.name}-{'.'.join(path)}") for path in leaves(base)]


@pytest.mark.parametrize(("base", "path"), options(debug()) + options(demo()))
def test_a_runs_path_depends_on_every_option_but_those_of_decoding(base: Recipe, path: tuple[str, ...]):
    assert (changed(base, path).run_path("set") == base.run_path("set")) == (path[:2] == ("method", "decode"))


def test_a_runs_path_depends_on_the_train_set_and_only_on_values():
    assert debug().run_path("a") == debug().run_path("a")
    assert debug().run_path("a") != debug().run_path("b")
    assert debug().run_path("a").startswith("train/")


def test_a_recipe_may_last_longer():
    longer = debug().lasting(7)
    assert longer.train.epochs == 7
    assert dataclasses.replace(longer, train=debug().train) == debug()
    assert longer.run_path("a") != debug().run_path("a")


def test_evaluation_shards_keep_the_images_sizes():
    assert demo().val_shards == dataclasses.replace(demo().shards, grid=None)
