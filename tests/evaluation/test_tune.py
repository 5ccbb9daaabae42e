"""Tuning on a run that has learned four scenes by heart."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluation.evaluate import EvalJob, evaluate_shard
from evaluation.pq import PQStats, summarise
from evaluation.tune import tune
from infra.errors import TesseraError
from infra.store import open_store
from preprocessing.coco import read_index
from preprocessing.shards import ShardSet
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.shard_sets import make_set
from tests.training.ranks import train_alone
from training.recipe import Recipe
from training.recipes.generalist import demo
from training.run import write_weights

RUN = "train/by-heart"


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, ShardSet, str]:
    """(recipe, shards, store) with the weights of 80 steps under RUN."""
    folder = tmp_path_factory.mktemp("learned")
    recipe = demo().changed({"train.epochs": 80, "train.batch": 4, "train.warmup_epochs": 5, "reader.flip": False})
    index = read_index(write_set(folder, SyntheticConfig(train=4, val=1, seed=1)), "train2017")
    url, threads = str(folder / "store"), torch.get_num_threads()
    shards = make_set(open_store(url), index, recipe.shards)
    torch.set_num_threads(1)
    write_weights(open_store(url), RUN, train_alone(recipe, shards, url).weights)
    torch.set_num_threads(threads)
    return recipe, shards, url


def evaluated(recipe: Recipe, shards: ShardSet, url: str, name: str) -> float:
    """PQ as the evaluation step finds it."""
    jobs = [EvalJob(recipe, url, RUN, f"evaluate/{name}", shards.labels, shard) for shard in shards.shards]
    total = sum((evaluate_shard(job).score.pq for job in jobs), PQStats.zero(len(shards.labels)))
    return summarise(total, shards.labels)["pq"]["all"]


def test_the_first_trial_is_the_evaluation_and_the_options_found_reach_the_best(learned):
    recipe, shards, url = learned
    spoiled = recipe.changed({"method.decode.min_area": 0.3})  # drops nearly all things
    found = tune(spoiled, RUN, shards, url)
    assert found.trials[0].decode == spoiled.method.decode
    assert found.trials[0].pq == pytest.approx(evaluated(spoiled, shards, url, "before"), abs=1e-9)
    assert found.best.pq > found.trials[0].pq + 5
    assert "method.decode.min_area" in found.options()
    again = spoiled.changed(found.options())
    assert evaluated(again, shards, url, "after") == pytest.approx(found.best.pq, abs=1e-9)


def test_what_was_found_lies_on_the_store(learned):
    recipe, shards, url = learned
    found = tune(recipe, RUN, shards, url, images=2)
    written = json.loads(Path(url, found.path, "manifest.json").read_text())
    assert written["pq"] == found.best.pq
    assert written["images"] == 2
    assert len(written["trials"]) == len(found.trials) > 10


def test_a_config_without_candidates_is_refused(learned):
    recipe, shards, url = learned
    with pytest.raises(TesseraError, match="names no candidates"):
        tune(replace(recipe, method=replace(recipe.method, decode=object())), RUN, shards, url)
