"""Batches from real shards: who reads what, in which order, and where a resumed run goes on."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch

from infra.errors import TesseraError
from infra.store import open_store
from preprocessing.coco import read_index
from preprocessing.shards import ShardConfig, commit, compute_shard, plan, set_path
from preprocessing.synthetic import SyntheticConfig, write_set
from training.reader import BatchStream, ReaderConfig, epoch_shards, load_batches, read_shard_samples

CONFIG = ReaderConfig(seed=3, shuffle=8)


def make_set(folder, store):
    """Five shards: four of 5 samples, one of 2."""
    index = read_index(write_set(folder, SyntheticConfig(train=22, val=1, size=(32, 32))), "train2017")
    config = ShardConfig(grid=(32, 32), radius=10, samples=5)
    jobs = plan(index, config)
    shards = [compute_shard(store.url, job) for job in jobs]
    return commit(store, set_path(index, config, jobs), index, config, shards, 0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    store = open_store(str(folder / "store"))
    return make_set(folder, store), store


def take(made, count, config=CONFIG, **place):
    shards, store = made
    return list(islice(load_batches(BatchStream(shards, store.url, config, 3, **place)), count))


def same(left, right):
    return left.keys == right.keys and torch.equal(left.images_B3HW, right.images_B3HW)


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
def test_the_readers_of_an_epoch_share_its_shards_without_overlap(made, readers):
    shards = made[0].shards
    orders = []
    for epoch in range(4):
        parts = [epoch_shards(shards, 0, epoch, reader, readers) for reader in range(readers)]
        assert Counter(s.key for part in parts for s in part) == Counter(s.key for s in shards)
        orders.append([s.key for s in epoch_shards(shards, 0, epoch, 0, 1)])
    assert len(set(map(tuple, orders))) > 1


def test_one_reader_sees_every_sample_once_an_epoch_and_in_another_order_the_next(made):
    keys = [key for batch in take(made, 15) for key in batch.keys]
    first, second = keys[:22], keys[22:44]
    assert Counter(first) == Counter(second)
    assert set(Counter(first).values()) == {1}
    assert first != second


def test_the_same_seed_gives_the_same_batches_and_another_one_others(made):
    assert all(map(same, take(made, 8), take(made, 8)))
    assert not all(map(same, take(made, 8), take(made, 8, replace(CONFIG, seed=4))))


def test_every_batch_has_the_same_size_though_shards_are_uneven(made):
    for rank in range(3):
        assert {len(batch.keys) for batch in take(made, 12, rank=rank, world=3)} == {3}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 4, 9, 16])
def test_a_stream_can_be_entered_at_any_step(made, start, workers):
    config = replace(CONFIG, workers=workers)
    whole = take(made, start + 4, config)
    resumed = take(made, 4, config, start_step=start)
    assert all(map(same, whole[start:], resumed))


def test_about_half_of_the_samples_are_flipped_and_none_if_not_wanted(made):
    plain = {
        k: i for b in take(made, 8, replace(CONFIG, flip=False)) for k, i in zip(b.keys, b.images_B3HW, strict=True)
    }
    drawn = [(k, i) for b in take(made, 30) for k, i in zip(b.keys, b.images_B3HW, strict=True)]
    flipped = sum(torch.equal(image, plain[key].flip(-1)) for key, image in drawn)
    straight = sum(torch.equal(image, plain[key]) for key, image in drawn)
    assert flipped + straight == len(drawn)
    assert 0.3 < flipped / len(drawn) < 0.7


def test_fewer_shards_than_readers_are_refused(made):
    with pytest.raises(TesseraError, match="5 shards for 6 readers"):
        BatchStream(made[0], made[1].url, CONFIG, 3, world=6)


def test_shards_are_read_from_any_store(tmp_path, store):
    shards = make_set(tmp_path, store)
    keys = [fields["__key__"] for shard in shards.shards for fields in read_shard_samples(store.url, shard)]
    assert [int(key) for key in keys] == [i for shard in shards.shards for i in shard.image_ids]
    assert len(take((shards, store), 3)) == 3


def test_a_url_cannot_run_a_shell(made, tmp_path):
    shards, store = made
    shard = replace(shards.shards[0], key=f"pipe:touch {tmp_path}/pwned")
    with pytest.raises((TesseraError, OSError, ValueError)):
        list(read_shard_samples(store.url, shard))
    assert not (tmp_path / "pwned").exists()
