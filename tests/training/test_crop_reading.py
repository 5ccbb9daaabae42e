"""Random crops of shards: batches, resuming, and a recipe that trains on them."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from infra.errors import TesseraError
from infra.store import Store
from preprocessing.coco import read_index
from preprocessing.geometry import PADDING, Frame
from preprocessing.shards import ShardConfig, ShardSet
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.examples import same_batches
from tests.support.shard_sets import make_set
from tests.training.test_augment import READER, SMALL
from training.augment import Crop
from training.batch import Batch
from training.loop import Watcher, train
from training.parallel import Place
from training.reader import BatchStream, ReaderConfig
from training.recipes.generalist import debug


@pytest.fixture(scope="module")
def own_sizes(tmp_path_factory: pytest.TempPathFactory, shard_store: Store) -> ShardSet:
    """Five shards of 13 images of two sizes, without distances."""
    made = []
    for count, size, seed in [(6, (32, 32), 0), (7, (20, 41), 1)]:
        config = SyntheticConfig(train=count, val=1, size=size, seed=seed)
        index = read_index(write_set(tmp_path_factory.mktemp("own sizes"), config), "train2017")
        numbered = tuple(replace(r, image_id=r.image_id + 100 * seed) for r in index.records)
        made.append(make_set(shard_store, replace(index, records=numbered), ShardConfig(radius=0, samples=3)))
    return replace(made[0], shards=tuple(shard for shards in made for shard in shards.shards))


def batches(
    shards: ShardSet, store: Store, config: ReaderConfig, radius: int = 0, start: int = 0, seed: int = 0
) -> Iterator[Batch]:
    return iter(BatchStream(shards, store.url, config, 3, start_step=start, radius=radius, seed=seed))


def by_key(stream: Iterator[Batch], count: int) -> list[tuple[str, torch.Tensor]]:
    return [pair for batch in islice(stream, count) for pair in zip(batch.keys, batch.images_B3HW, strict=True)]


@pytest.mark.parametrize("radius", [0, 5])
def test_batches_have_one_size_though_images_differ(own_sizes: ShardSet, shard_store: Store, radius: int):
    for batch in islice(batches(own_sizes, shard_store, READER, radius), 9):
        assert batch.images_B3HW.shape == (3, 3, 24, 28)
        assert batch.labels_BHW.shape == (3, 24, 28)
        assert (batch.d2_BH2W is None) == (radius == 0)
        assert radius == 0 or batch.d2_BH2W.shape == (3, 24, 2, 28)
        assert radius == 0 or batch.d2_BH2W.max() == radius**2


@pytest.mark.parametrize("step", [1, 4, 5, 13])
def test_a_resumed_run_sees_the_crops_it_would_have_seen(own_sizes: ShardSet, shard_store: Store, step: int):
    undisturbed = islice(batches(own_sizes, shard_store, READER, 5), step, step + 6)
    resumed = islice(batches(own_sizes, shard_store, READER, 5, step), 6)
    for left, right in zip(undisturbed, resumed, strict=True):
        assert same_batches(left, right)


def test_a_crop_is_the_same_in_any_order_of_reading(own_sizes: ShardSet, shard_store: Store):
    """As the flip: a function of seed, epoch and image alone."""
    configs = [replace(READER, shuffle=shuffle) for shuffle in (1, 13)]
    plain, mixed = (dict(by_key(batches(own_sizes, shard_store, config), 4)) for config in configs)
    shared = plain.keys() & mixed.keys()
    assert len(shared) >= 11
    assert all(torch.equal(plain[key], mixed[key]) for key in shared)


def test_epochs_and_seeds_crop_each_image_anew(own_sizes: ShardSet, shard_store: Store):
    seen_by_key: dict[str, list[torch.Tensor]] = {}
    config = replace(READER, flip=False, streams=1)  # 13 batches are three epochs, of each image
    for seed in (0, 1):
        for key, image in by_key(batches(own_sizes, shard_store, config, seed=seed), 13):
            seen_by_key.setdefault(key, []).append(image)
    for images in seen_by_key.values():
        distinct = {image.numpy().tobytes() for image in images}
        assert len(images) == 6
        assert len(distinct) >= 5  # where the crop has room for all of the image, a size may come twice


def test_half_of_the_crops_are_mirrored_and_padding_stays_where_it_is(own_sizes: ShardSet, shard_store: Store):
    crop = Crop(size=(24, 60), short_side=(16, 16), long_side=60)
    configs = [replace(READER, flip=flip, crop=crop) for flip in (True, False)]
    flipped, plain = (by_key(batches(own_sizes, shard_store, config), 26) for config in configs)
    mirrored, padding = 0, torch.tensor(PADDING, dtype=torch.uint8)[:, None, None]
    for (key, image), (same_key, original) in zip(flipped, plain, strict=True):
        assert key == same_key
        width = 16 if int(key) < 100 else 33
        assert (image[:, 16:] == padding).all()
        assert (image[:, :, width:] == padding).all()
        if not torch.equal(image, original):
            difference = image[:, :16, :width].int() - original[:, :16, :width].flip(-1).int()
            assert difference.abs().max() <= 1
            mirrored += 1
    assert 20 <= mirrored <= 58


def test_a_recipe_that_crops_and_wants_distances_beyond_all_measure_is_refused():
    wide = replace(debug(), reader=READER, frame=Frame(size=(24, 32)))
    assert wide.changed({"method.eds_distance": 72}).method.distance_radius == 180
    with pytest.raises(TesseraError, match=r"distances up to 182.5 px, they are exact up to 181"):
        wide.changed({"method.eds_distance": 73})


def test_a_recipe_that_crops_trains_with_the_distances_its_method_wants(own_sizes: ShardSet, shard_store: Store):
    recipe, frame = debug(), Frame(size=(24, 32), keep_aspect=True)
    method = replace(recipe.method, eds_distance=2.5)
    config = replace(recipe.train, epochs=recipe.train.batch * 2 / own_sizes.samples, warmup_epochs=0)
    reader = replace(READER, crop=replace(SMALL, size=frame.size))
    recipe = replace(recipe, method=method, shards=own_sizes.config, frame=frame, reader=reader, train=config)
    assert recipe.method.distance_radius == 6.25
    quiet = Mock(spec=Watcher, **{"wants_checkpoint.return_value": False})
    _, rows = train(recipe, own_sizes, shard_store.url, Place(), None, quiet)
    assert rows[-1].step == 2
    assert all(np.isfinite(value) for value in rows[-1].losses.values())
