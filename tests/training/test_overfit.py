"""A method fits eight images of COCO: what it cannot fit, it cannot learn."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluation.evaluate import load_samples
from evaluation.pq import PQStats, compare, summarise
from infra.store import open_store
from preprocessing.coco import read_index
from preprocessing.sample import decode_image
from preprocessing.shards import ShardConfig, ShardSet
from tests.support.every_recipe import every_recipe
from tests.support.shard_sets import make_set
from tests.training.ranks import train_alone
from training.batch import Example, collate
from training.methods.base import Method
from training.recipe import Recipe

COCO_MINI = Path(__file__).resolve().parents[3] / "shared/data/coco_mini"
STEPS = 500


def eight(recipe: Recipe) -> Recipe:
    """The recipe on its first eight images, all in every batch."""
    options = {
        "train.batch": 8,
        "train.epochs": STEPS,
        "train.warmup_epochs": 30,
        "train.lr": 3e-3,
        "reader.flip": False,
    }
    nothing_dropped: dict[str, float] = {
        f"method.decode.{name}": 0 for name in vars(recipe.method.decode) if name.endswith("_area")
    }
    if "dropout" in vars(recipe.method):
        nothing_dropped["method.dropout"] = 0
    if "window" in vars(recipe.method.decode):  # the recipe's suits a net that is unsure: it merges sure centres
        nothing_dropped["method.decode.window"] = 13
    return recipe.changed(options | nothing_dropped | {"train.weight_decay": 0, "shards.samples": 8})


def shards(url: str, config: ShardConfig) -> ShardSet:
    index = read_index(COCO_MINI, "train2017")
    return make_set(open_store(url), replace(index, records=index.records[:8]), config)


def pq(method: Method, url: str, own_size: ShardSet, on_grid: ShardSet | None) -> float:
    """At the images' own sizes; of the ideal outputs on the grid's targets, if given."""
    method.eval()
    stats = PQStats.zero(len(own_size.labels))
    (samples,), (gridded,) = (list(load_samples(url, s.shards[0])) for s in (own_size, on_grid or own_size))
    for truth, sample in zip(samples, gridded, strict=True):
        if on_grid is None:
            outputs = method.predict(method.inputs([decode_image(sample.image)]))
        else:
            outputs = method.ideal(collate([Example.of("", sample)]))
        (predicted,) = method.decode(outputs, [truth.panoptic.size])
        stats += compare(truth.panoptic, predicted, len(own_size.labels))
    return summarise(stats, own_size.labels)["pq"]["all"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("make", every_recipe("coco_mini"))
def test_eight_images_are_fitted_to_nine_tenths_of_what_decoding_allows(make, tmp_path, record_property):
    if not COCO_MINI.exists():
        pytest.skip(f"needs {COCO_MINI}")
    torch.set_num_threads(2)
    recipe, url = eight(make()), str(tmp_path)
    train_set, own_size = shards(url, recipe.shards), shards(url, recipe.val_shards)
    method = recipe.build(train_set.labels)
    method.load_state_dict(train_alone(recipe, train_set, url).weights)
    reached, ideal = pq(method, url, own_size, None), pq(method, url, own_size, train_set)
    record_property("reached", reached)
    record_property("ideal", ideal)
    assert reached >= 0.9 * ideal, f"PQ {reached:.1f} after {STEPS} steps, ideal outputs {ideal:.1f}"
