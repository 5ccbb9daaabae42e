"""Fine-tuning: which weights of a finished run another one starts with, and which runs are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from infra import artifacts
from infra.errors import TesseraError
from infra.store import Store, open_store
from preprocessing.coco import read_index
from preprocessing.labels import LabelTable
from preprocessing.shards import ShardSet
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.every_recipe import every_recipe
from tests.support.examples import table
from tests.support.finished_run import finished_run
from tests.support.shard_sets import make_set
from tests.training.ranks import Recorder
from training.backbones import StemVitConfig
from training.loop import train
from training.parallel import Place
from training.reader import BatchStream
from training.recipe import SCHEMA_VERSION, Recipe
from training.recipes import generalist, panoptic_deeplab
from training.run import WEIGHTS, open_run, start_weights

DEBUG = [recipe for recipe in every_recipe("debug") if "crop" not in recipe.id]
HEADS = {
    "generalist": {"network.semantic_head.bias", "network.semantic_head.weight"},
    "panoptic_deeplab": {"network.heads.classes.1.bias", "network.heads.classes.1.weight"},
    "panoptic_deeplab pisr": {
        "network.final_heads.classes.1.bias",
        "network.final_heads.classes.1.weight",
        "network.heads.classes.1.bias",
        "network.heads.classes.1.weight",
        "network.relations.mix_MM",
        "network.relations.mix_bias_M",
    },
}
"""By method: all whose shape follows from the number of categories."""


class Finished:
    """A finished run on a store of its own; its weights are like no fresh ones."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.store, self.recipe = open_store(str(folder / "store")), recipe
        self.path = finished_run(folder, self.store.url, recipe).removeprefix(f"{self.store.url}/")
        self.labels = open_run(self.store.url, self.path)[1].labels
        self.weights = load(self.store.read(f"{self.path}/{WEIGHTS}"))

    def start(self, recipe: Recipe, labels: LabelTable) -> dict[str, Tensor]:
        return start_weights(recipe, labels, self.store.url, self.path)


@pytest.fixture
def finished(tmp_path: Path) -> Finished:
    return Finished(tmp_path, generalist.debug())


def first_losses(recipe: Recipe, shards: ShardSet, store: Store, init: dict[str, Tensor] | None) -> dict[str, float]:
    recipe = recipe.changed({"train.epochs": 1.0, "train.warmup_epochs": 0.0, "train.bf16": False})
    return train(recipe, shards, store.url, Place(), None, Recorder(), init)[1][0].losses


@pytest.mark.parametrize("make", DEBUG)
def test_with_the_same_categories_all_weights_are_taken(make, tmp_path: Path):
    run = Finished(tmp_path, make())
    found = run.start(replace(run.recipe, name="other", train=replace(run.recipe.train, lr=1.0, seed=7)), run.labels)
    assert found.keys() == run.weights.keys() == run.recipe.build(run.labels).state_dict().keys()
    assert all(torch.equal(value, run.weights[name]) for name, value in found.items())


def test_training_goes_on_from_them(finished: Finished, tmp_path: Path):
    """The first losses are those of the finished weights, on other data of the same categories, whatever the seed."""
    index = read_index(write_set(tmp_path / "new", SyntheticConfig(train=4, val=1, seed=9)), "train2017")
    shards = make_set(finished.store, index, finished.recipe.shards)
    assert shards.labels == finished.labels
    init = finished.start(finished.recipe, shards.labels)
    method = open_run(finished.store.url, finished.path)[1].train()
    for seed in (0, 5):
        recipe = finished.recipe.changed({"train.seed": seed})
        told, fresh = (first_losses(recipe, shards, finished.store, weights) for weights in (init, None))
        assert fresh.keys() == told.keys()
        assert not {*fresh.values()} & {*told.values()}
        batch = next(iter(BatchStream(shards, finished.store.url, recipe.reader, 4, seed=seed, radius=10)))
        assert told == pytest.approx({name: value.item() for name, value in method(batch, 0).items()}, rel=1e-6)


@pytest.mark.parametrize("categories", [3, 9])
@pytest.mark.parametrize("make", DEBUG)
def test_with_other_categories_the_heads_begin_anew(make, categories: int, tmp_path: Path):
    run = Finished(tmp_path, make())
    labels = table(2, categories - 2)
    assert len(labels) != len(run.labels)
    found = run.start(run.recipe, labels)
    kind = next(
        k for k in HEADS if run.recipe.name.startswith(k.split()[0]) and ("pisr" in run.recipe.name) == (" " in k)
    )
    assert run.weights.keys() - found.keys() == HEADS[kind]
    assert all(torch.equal(value, run.weights[name]) for name, value in found.items())
    torch.manual_seed(0)
    fresh = run.recipe.build(labels).state_dict()
    torch.manual_seed(0)
    method = run.recipe.build(labels)
    missing, unexpected = method.load_state_dict(found, strict=False)
    assert {*missing} == HEADS[kind]
    assert not unexpected
    assert all(torch.equal(method.state_dict()[name], fresh[name]) for name in missing)


def test_as_many_categories_that_are_others_begin_anew_too(finished: Finished):
    labels = LabelTable(tuple(replace(c, name=f"other {c.name}") for c in finished.labels.categories))
    assert len(labels) == len(finished.labels)
    assert finished.weights.keys() - finished.start(finished.recipe, labels).keys() == HEADS["generalist"]


def test_training_on_other_categories_starts_with_what_is_left(finished: Finished, tmp_path: Path):
    recipe = finished.recipe.changed(
        {"train.lr": 1e-12, "train.weight_decay": 0.0, "train.epochs": 1.0, "train.seed": 3}
    )
    recipe = recipe.changed({"train.warmup_epochs": 0.0})
    index = read_index(write_set(tmp_path / "new", SyntheticConfig(train=4, val=1, seed=9)), "train2017")
    more = LabelTable((*index.labels.categories, replace(index.labels.categories[0], dataset_id=99, name="new")))
    shards = make_set(finished.store, replace(index, labels=more), recipe.shards)
    init = finished.start(recipe, shards.labels)
    weights, _ = train(recipe, shards, finished.store.url, Place(), None, Recorder(), init)
    torch.manual_seed(3)
    fresh = recipe.build(shards.labels).state_dict()
    for name, value in weights.items():
        expected = fresh[name] if name in HEADS["generalist"] else finished.weights[name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("labels", [None, table(2, 1)], ids=["same categories", "others"])
def test_another_network_is_refused_with_a_weight_and_both_shapes(finished: Finished, labels: LabelTable | None):
    labels = labels or finished.labels
    wider = finished.recipe.changed({"method.decoder_widths": (16, 16, 16, 16, 32)})
    told = (
        rf"{finished.path}: its network is another one than that of recipe generalist/debug: \d+ weights differ, as "
        r"network\.decoder\.\S+: \[.*\] there, \[.*32.*\] here$"
    )
    with pytest.raises(TesseraError, match=told):
        finished.start(wider, labels)
    with pytest.raises(
        TesseraError, match=r"weights differ, as network\.\S+: (None there, \[.*\]|\[.*\] there, None) here"
    ):
        finished.start(panoptic_deeplab.debug(), labels)
    stem = StemVitConfig(widths=(8, 16, 16, 32), depth=1)
    with pytest.raises(TesseraError, match=r"as network\.backbone\."):
        finished.start(replace(finished.recipe, method=replace(finished.recipe.method, backbone=stem)), labels)


def test_what_does_not_change_the_network_is_not_refused(finished: Finished):
    recipe = finished.recipe.changed({"method.eds_distance": 2.0, "method.tasks": "joint", "train.batch": 8})
    assert finished.start(recipe, finished.labels).keys() == finished.weights.keys()


def test_without_a_finished_run_it_is_refused(finished: Finished):
    with pytest.raises(TesseraError, match=r"store/train/none: no finished run to start from"):
        start_weights(finished.recipe, finished.labels, finished.store.url, "train/none")
    finished.store.delete(f"{finished.path}/manifest.json")
    with pytest.raises(TesseraError, match=f"{finished.path}: no finished run to start from"):
        finished.start(finished.recipe, finished.labels)


def test_a_run_whose_data_set_is_gone_is_refused(finished: Finished):
    for entry in list(finished.store.list("precompute/")):
        finished.store.delete(entry.key)
    with pytest.raises(TesseraError, match=r"its data set precompute/\S+ has no manifest any more"):
        finished.start(finished.recipe, finished.labels)


def test_a_run_that_starts_elsewhere_has_a_path_of_its_own():
    recipe = generalist.debug()
    plain = recipe.run_path("precompute/1")
    assert plain == artifacts.step_path("train", SCHEMA_VERSION, recipe.identity, ["precompute/1"])
    assert plain == recipe.run_path("precompute/1", None) == recipe.run_path("precompute/1", "")
    paths = {plain, *(recipe.run_path(*at) for at in [("precompute/1", "train/a"), ("precompute/1", "train/b")])}
    assert len(paths | {recipe.run_path("precompute/2", "train/a")}) == 4
    kept = recipe.changed({"upkeep.check_epochs": 0.5, "upkeep.keep": 9, "upkeep.minutes": 1.0, "train.micro_batch": 1})
    assert kept.run_path("precompute/1", "train/a") == recipe.run_path("precompute/1", "train/a")
