from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infra.store import Store
from preprocessing.shards import ShardSet
from tests.training.ranks import train_alone, train_ranks
from training.backbones import StemVitConfig
from training.recipe import Recipe
from training.recipes import debug


def recipe_of(micro_batch: int, **options) -> Recipe:
    base = debug()
    method = replace(base.method, **options)
    return replace(base, method=method, train=replace(base.train, bf16=False, micro_batch=micro_batch))


def mean_of(ranks: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    return [{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} for rows in zip(*ranks, strict=True)]


STEM = StemVitConfig(widths=(8, 16, 16, 32), depth=1)


@pytest.mark.parametrize(
    "recipe",
    [recipe_of(1), recipe_of(32, backbone=STEM, tasks="joint")],
    ids=["alternating tasks in two passes", "both tasks in one pass"],
)
def test_two_ranks_train_as_one_does(labelled_throughout: ShardSet, shard_store: Store, tmp_path: Path, recipe: Recipe):
    """Two shards of two images: every step of either run sees all four, however they are dealt out."""
    one = train_alone(recipe, labelled_throughout, shard_store.url)
    ranks = train_ranks(recipe, labelled_throughout, shard_store.url, 2, tmp_path)
    assert len(one.losses) == 6
    for mean, expected in zip(mean_of([rank.losses for rank in ranks]), one.losses, strict=True):
        assert mean == pytest.approx(expected, abs=1e-5)
    for name, value in ranks[0].weights.items():
        assert torch.equal(ranks[1].weights[name], value), name
