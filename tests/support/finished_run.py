"""A finished run without training: fresh weights, and the table and the manifest that training writes."""

from pathlib import Path

import torch

from infra import artifacts
from infra.store import open_store
from preprocessing.coco import read_index
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.rows import course
from tests.support.shard_sets import make_set
from training.metrics import write_metrics
from training.recipe import Recipe
from training.recipes.generalist import debug
from training.run import write_weights


def finished_run(folder: Path, store_url: str, recipe: Recipe | None = None) -> str:
    """URL of the run's folder on the store."""
    recipe, store = recipe or debug(), open_store(store_url)
    index = read_index(write_set(folder / "data", SyntheticConfig(train=4, val=1, seed=1)), "train2017")
    shards = make_set(store, index, recipe.shards)
    path = recipe.run_path(shards.path)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        weights = recipe.build(index.labels).state_dict()
    write_weights(store, path, weights)
    write_metrics(store, path, course())
    content = {"recipe": recipe, "train_set": shards.path, "steps": 0, "workers": 1, "seconds": 0.0}
    artifacts.write_manifest(store, path, content)
    return store.url_for(path)
