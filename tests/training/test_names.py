"""A name belongs to one config; every difference of another one is told, and nothing else."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from infra.errors import TesseraError
from infra.store import Store, open_store
from training.names import give, refuse_changed
from training.recipe import Recipe
from training.recipes import generalist, panoptic_deeplab

FACTS: dict[str, Any] = {
    "train": {"lr": 0.001, "batch": 4, "betas": (0.9, 0.99), "clip": None},
    "shards": {"grid": (32, 32), "radius": 10},
    "reader": {"crop": None},
    "init": None,
    "version": 1,
}


@pytest.fixture
def folder(tmp_path) -> Store:
    return open_store(str(tmp_path / "store"))


def changed(**options: Any) -> dict[str, Any]:
    """The facts with others, by dotted name with the first _ for the dot."""
    facts = {name: dict(value) if isinstance(value, dict) else value for name, value in FACTS.items()}
    for name, value in options.items():
        part, _, below = name.partition("_")
        if below:
            facts[part][below] = value
        else:
            facts[part] = value
    return facts


def differences(store: Store, facts: dict[str, Any], name: str = "mine") -> list[str]:
    """Of those that are told, between the two fixed sentences."""
    with pytest.raises(TesseraError) as caught:
        refuse_changed(store, name, facts)
    said = str(caught.value)
    start = f"the run named {name!r} has been trained with another config; "
    end = ". Take another name, start the name anew (anew), or fine-tune (init)"
    assert said.startswith(start)
    assert said.endswith(end)
    return said.removeprefix(start).removesuffix(end).split("; ")


def test_a_name_is_free_until_it_is_given_and_then_takes_the_same_config(store: Store):
    refuse_changed(store, "mine", FACTS)
    give(store, "mine", "train/1", FACTS)
    refuse_changed(store, "mine", FACTS)
    refuse_changed(store, "min", changed(version=2))
    refuse_changed(store, "mine.2", changed(version=2))
    assert differences(store, changed(version=2)) == ["version: 1 so far, 2 now"]


CHANGES: list[tuple[dict[str, Any], list[str]]] = [
    ({"train_lr": 0.002}, ["train.lr: 0.001 so far, 0.002 now"]),
    ({"train_lr": 0.002, "version": 2}, ["train.lr: 0.001 so far, 0.002 now", "version: 1 so far, 2 now"]),
    ({"train_betas": (0.9, 0.999)}, ["train.betas: [0.9, 0.99] so far, [0.9, 0.999] now"]),
    ({"train_clip": 1.0}, ["train.clip: None so far, 1.0 now"]),
    ({"shards_grid": None}, ["shards.grid: [32, 32] so far, None now"]),
    ({"reader_crop": {"size": (8, 8), "far": None}}, ["reader.crop.size: None so far, [8, 8] now"]),
    ({"train_new": 3}, ["train.new: None so far, 3 now"]),
    ({"added": "x"}, ["added: None so far, 'x' now"]),
    (
        {"version": {}, "train_clip": {"most": 1.0}},
        ["train.clip.most: None so far, 1.0 now", "version: 1 so far, {} now"],
    ),
]


@pytest.mark.parametrize(("options", "expected"), CHANGES, ids=str)
def test_every_difference_is_told_and_no_other(folder: Store, options: dict[str, Any], expected: list[str]):
    give(folder, "mine", "train/1", FACTS)
    assert differences(folder, changed(**options)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"train_betas": [0.9, 0.99], "shards_grid": [32, 32]},
        {"train_batch": 4.0},
        {"train_extra": None},
    ],
    ids=["lists", "numbers", "none is as not there"],
)
def test_what_json_and_defaults_do_not_tell_apart_is_the_same(folder: Store, options: dict[str, Any]):
    give(folder, "mine", "train/1", FACTS)
    refuse_changed(folder, "mine", changed(**options))


def test_a_nested_config_may_vanish(folder: Store):
    give(folder, "mine", "train/1", changed(reader_crop={"size": (8, 8), "scale": {"most": 2.0}}))
    assert differences(folder, FACTS) == [
        "reader.crop.scale.most: 2.0 so far, None now",
        "reader.crop.size: [8, 8] so far, None now",
    ]


def test_another_start_is_a_fine_tuning_and_the_same_start_is_not(folder: Store):
    give(folder, "mine", "train/1", FACTS)
    tuned = changed(init="train/1", train_lr=1e-5)
    refuse_changed(folder, "mine", tuned)
    give(folder, "mine", "train/2", tuned)
    refuse_changed(folder, "mine", tuned)
    assert differences(folder, tuned | {"version": 2}) == ["version: 1 so far, 2 now"]
    assert "init: 'train/1' so far, None now" in differences(folder, FACTS)


def test_facts_that_are_not_asked_about_are_left_out(folder: Store):
    """Before precompute the data set's folder is not known yet."""
    give(folder, "mine", "train/1", FACTS | {"train_set": "precompute/1"})
    refuse_changed(folder, "mine", FACTS)
    assert differences(folder, FACTS | {"train_set": "precompute/2"}) == [
        "train_set: 'precompute/1' so far, 'precompute/2' now"
    ]


def test_a_name_moves_to_whom_it_is_given(store: Store):
    give(store, "mine", "train/1", FACTS)
    give(store, "other", "train/1", FACTS)
    give(store, "mine", "train/2", changed(train_lr=1.0))
    refuse_changed(store, "mine", changed(train_lr=1.0))
    assert differences(store, FACTS) == ["train.lr: 1.0 so far, 0.001 now"]
    refuse_changed(store, "other", FACTS)


def test_identities_of_recipes_are_told_apart_by_what_decides_the_weights(folder: Store):
    recipe = generalist.debug()
    give(folder, "mine", "train/1", recipe.identity)
    kept = recipe.changed({"train.micro_batch": 1, "upkeep.keep": 7, "method.decode.min_area": 0.5})
    refuse_changed(folder, "mine", replace(kept, name="generalist/other").identity)
    assert differences(folder, recipe.changed({"train.seed": 1, "method.eds_distance": 3.0}).identity) == [
        "method.eds_distance: 4.0 so far, 3.0 now",
        "train.seed: 0 so far, 1 now",
    ]
    other: Recipe = panoptic_deeplab.debug_crop()
    told = differences(folder, other.identity)
    assert "shards.grid: [32, 32] so far, None now" in told
    assert "reader.crop.size: None so far, [32, 40] now" in told
    assert not [line for line in told if line.startswith(("train.", "upkeep", "name", "method.decode."))]
    assert asdict(other)["reader"]["crop"]["size"] == (32, 40)
