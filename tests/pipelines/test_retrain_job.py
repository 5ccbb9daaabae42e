"""What a challenger starts from is what the champion's run and evaluation were."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.champion import Champion
from evaluation.evaluate import evaluation_path
from evaluation.report import GroupPQ
from infra.store import open_store
from pipelines.retrain_job import decoded
from tests.support.every_recipe import every_recipe
from training.recipe import Recipe


@pytest.mark.parametrize("make", every_recipe())
def test_the_decoding_of_a_champion_is_read_back_as_it_was(make: Callable[[], Recipe], tmp_path: Path):
    """Or the champion would be evaluated anew in each round."""
    store, recipe = open_store(str(tmp_path)), make()
    facts = {"train_set": "precompute/a/a", "steps": 1, "seconds": 1.0}
    content = json.dumps({"recipe": recipe, **facts}, default=vars)
    store.write("train/a/manifest.json", content.encode())
    decode = json.loads(content)["recipe"]["method"]["decode"]
    pq: GroupPQ = {"all": 1.0, "things": None, "stuff": None}
    found = {"recipe": recipe.name, "run": "train/a", "val_set": "precompute/a/b", "images": 1, "pq": pq}
    store.write("evaluate/a/manifest.json", json.dumps({"decode": decode, **found}).encode())
    entry = Champion(1, "train/a", "evaluate/a", "evaluate/a", pq, "given", None, "")
    assert evaluation_path(decoded(store, entry), "train/a", "v") == evaluation_path(recipe, "train/a", "v")
