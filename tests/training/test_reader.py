from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations, islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.errors import TesseraError
from infra.store import Store
from preprocessing.sample import from_fields
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import Shard, ShardSet
from preprocessing.source import Index
from tests.support.examples import same_batches
from tests.training.conftest import Maker, shard_set
from training.batch import Batch
from training.reader import BatchStream, ReaderConfig, epoch_shards, load_batches

PLAIN = ReaderConfig(shuffle=3, flip=False)


@pytest.fixture(params=[1, 2, 3, 5, 7], ids=lambda count: f"{count} shards")
def uneven(request: pytest.FixtureRequest, make_set: Maker, index: Index) -> ShardSet:
    """Shards of two images; the last one has one."""
    return make_set(index.records[: 2 * request.param - 1], 2)


@pytest.fixture
def five(make_set: Maker, index: Index) -> ShardSet:
    """Shards of 3, 3, 3, 3 and 1 images."""
    return make_set(index.records[:13], 3)


def ids(shards: ShardSet) -> list[int]:
    return sorted(i for shard in shards.shards for i in shard.image_ids)


def keys(batches: Iterator[Batch], count: int) -> list[int]:
    return [int(key) for batch in islice(batches, count) for key in batch.keys]


def epochs(shards: ShardSet, store: Store, count: int, config: ReaderConfig = PLAIN) -> list[list[int]]:
    """The images of whole epochs of a single reader, in order."""
    found = keys(iter(BatchStream(shards, store.url, config, 1)), count * shards.samples)
    return [found[i : i + shards.samples] for i in range(0, len(found), shards.samples)]


def per_reader(shards: ShardSet, epoch: int, readers: int) -> list[int]:
    """Samples of each reader in one epoch."""
    dealt = [epoch_shards(shards.shards, PLAIN.seed, epoch, r, readers) for r in range(readers)]
    return [sum(len(shard.image_ids) for shard in mine) for mine in dealt]


def test_ranks_share_an_epoch_without_overlap(uneven: ShardSet, shard_store: Store):
    for world in range(1, min(3, len(uneven.shards)) + 1):
        counts = per_reader(uneven, 0, world)
        streams = [iter(BatchStream(uneven, shard_store.url, PLAIN, 1, rank, world)) for rank in range(world)]
        assert sorted(key for s, count in zip(streams, counts, strict=True) for key in keys(s, count)) == ids(uneven)


@pytest.mark.parametrize("world", [1, 2])
def test_reader_processes_share_an_epoch_without_overlap(five: ShardSet, shard_store: Store, world: int):
    """A DataLoader takes from its processes in turn."""
    counts, seen = per_reader(five, 0, 2 * world), []
    for rank in range(world):
        stream = BatchStream(five, shard_store.url, replace(PLAIN, workers=2), 1, rank, world)
        mine = counts[2 * rank : 2 * rank + 2]
        found = keys(load_batches(stream), 2 * max(mine))
        seen += [key for worker in range(2) for key in found[worker::2][: mine[worker]]]
    assert sorted(seen) == ids(five)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_an_epoch_are_dealt_out_once(uneven: ShardSet, world: int, workers: int):
    readers = world * max(1, workers)
    for epoch in range(3):
        dealt = [epoch_shards(uneven.shards, 0, epoch, reader, readers) for reader in range(readers)]
        assert sorted(s.key for mine in dealt for s in mine) == sorted(s.key for s in uneven.shards)


def unread(count: int) -> tuple[Shard, ...]:
    return tuple(Shard(str(number), (number,), (number,), 1, "", ()) for number in range(count))


SEEDS, EPOCHS = st.integers(0, 2**63 - 1), st.integers(0, 10**6)


@given(st.integers(1, 300), st.data(), SEEDS, EPOCHS)
def test_any_number_of_readers_gets_every_shard_once_and_evenly(count: int, data: st.DataObject, seed: int, epoch: int):
    readers = data.draw(st.integers(1, count))
    dealt = [epoch_shards(unread(count), seed, epoch, reader, readers) for reader in range(readers)]
    assert sorted(int(shard.key) for mine in dealt for shard in mine) == list(range(count))
    assert {len(mine) for mine in dealt} <= {count // readers, -(-count // readers)}


@given(st.integers(12, 300), SEEDS, EPOCHS)
def test_no_two_epochs_have_the_same_order_of_shards(count: int, seed: int, epoch: int):
    orders = [epoch_shards(unread(count), seed, number, 0, 1) for number in range(epoch, epoch + 5)]
    assert all(a != b for a, b in combinations(orders, 2))


def test_every_epoch_has_all_images_in_another_order(five: ShardSet, shard_store: Store):
    found = epochs(five, shard_store, 4)
    assert all(sorted(epoch) == ids(five) for epoch in found)
    assert len({tuple(epoch) for epoch in found}) == 4


def test_a_buffer_mixes_images_of_several_shards(five: ShardSet, shard_store: Store):
    (order,) = epochs(five, shard_store, 1, replace(PLAIN, shuffle=64))
    shard_of = {i: number for number, shard in enumerate(five.shards) for i in shard.image_ids}
    changes = sum(shard_of[a] != shard_of[b] for a, b in pairwise(order))
    assert changes > len(five.shards) - 1


def test_a_seed_gives_one_order_and_another_seed_another(five: ShardSet, shard_store: Store):
    same, again, other = (epochs(five, shard_store, 2, replace(PLAIN, seed=seed)) for seed in (1, 1, 2))
    assert same == again
    assert same != other


def test_half_of_the_images_are_mirrored_and_not_the_same_half_twice(images_of_16: ShardSet, shard_store: Store):
    streams = [iter(BatchStream(images_of_16, shard_store.url, ReaderConfig(flip=flip), 16)) for flip in (True, False)]
    halves = []
    for flipped, plain in islice(zip(*streams, strict=True), 4):
        assert flipped.keys == plain.keys
        mirrored = []
        for key, image, original in zip(plain.keys, flipped.images_B3HW, plain.images_B3HW, strict=True):
            if not torch.equal(image, original):
                assert torch.equal(image, original.flip(-1))
                mirrored.append(key)
        halves.append(tuple(sorted(mirrored)))
    assert 20 <= sum(len(half) for half in halves) <= 44
    assert len(set(halves)) == 4


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("step", [1, 4, 5, 13, 21])
def test_any_step_can_be_reached_again(five: ShardSet, shard_store: Store, world: int, step: int):
    """Of 13 images in batches of 3: within an epoch, at a seam and epochs later."""
    make = [BatchStream(five, shard_store.url, ReaderConfig(), 3, world - 1, world, start) for start in (0, step)]
    undisturbed, resumed = islice(iter(make[0]), step, step + 6), islice(iter(make[1]), 6)
    assert all(same_batches(a, b) for a, b in zip(undisturbed, resumed, strict=True))


def as_processes(stream: BatchStream, monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    """What a DataLoader gives: a batch of each of its processes in turn."""
    workers = []
    for number in range(stream.per_rank):
        monkeypatch.setattr("training.reader.get_worker_info", lambda number=number: SimpleNamespace(id=number))
        batches = iter(stream)
        workers.append(chain([next(batches)], batches))
    return chain.from_iterable(zip(*workers, strict=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), world=st.integers(1, 3), batch=st.integers(1, 5), step=st.integers(0, 25))
def test_any_step_can_be_reached_again_in_any_world(
    five: ShardSet, shard_store: Store, monkeypatch, data: st.DataObject, world: int, batch: int, step: int
):
    workers, rank = data.draw(st.integers(0, 5 // world)), data.draw(st.integers(0, world - 1))
    config = ReaderConfig(workers=workers, shuffle=data.draw(st.integers(1, 20)))
    make = [BatchStream(five, shard_store.url, config, batch, rank, world, start) for start in (0, step)]
    undisturbed, resumed = (as_processes(stream, monkeypatch) for stream in make)
    pairs = zip(islice(undisturbed, step, step + 6), islice(resumed, 6), strict=True)
    assert all(same_batches(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_step_can_be_reached_again_with_reader_processes(five: ShardSet, shard_store: Store, workers: int):
    """A step that is no multiple of the processes makes them change places."""
    config = ReaderConfig(workers=workers)
    undisturbed = list(islice(load_batches(BatchStream(five, shard_store.url, config, 3)), 12))
    for step in (1, 6):
        resumed = load_batches(BatchStream(five, shard_store.url, config, 3, start_step=step))
        assert all(same_batches(a, b) for a, b in zip(undisturbed[step:], islice(resumed, 12 - step), strict=True))


def test_batches_are_of_one_size_however_uneven_the_shards(uneven: ShardSet, shard_store: Store):
    for batch in islice(BatchStream(uneven, shard_store.url, ReaderConfig(), 4), 8):
        assert len(batch.keys) == len(batch.images_B3HW) == len(batch.category_BN) == 4


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_a_shard_of_one_image_beside_one_of_59_starves_nobody(
    shard_store: Store, make_set: Maker, index: Index, world: int, workers: int
):
    """Whoever has the single image in an epoch goes on with the next one, alone."""
    sets = [make_set(index.records[:1], 1), make_set(index.records[1:60], 59)]
    both = replace(sets[0], shards=tuple(shard for made in sets for shard in made.shards))
    assert sorted(len(shard.image_ids) for shard in both.shards) == [1, 59]
    config, seen = ReaderConfig(workers=workers), set()
    for rank in range(world):
        batches = list(islice(load_batches(BatchStream(both, shard_store.url, config, 16, rank, world)), 12))
        assert [len(batch.keys) for batch in batches] == [16] * 12
        seen |= {int(key) for batch in batches for key in batch.keys}
    assert sorted(seen) == ids(both)


@pytest.mark.parametrize(("world", "workers"), [(6, 0), (3, 2), (1, 6)])
def test_fewer_shards_than_readers_are_refused(five: ShardSet, shard_store: Store, world: int, workers: int):
    with pytest.raises(TesseraError, match="5 shards for 6 readers"):
        BatchStream(five, shard_store.url, ReaderConfig(workers=workers), 4, 0, world)


def test_a_store_of_either_kind_is_read(store: Store, index: Index):
    shards = shard_set(store, replace(index, records=index.records[:5]), 2)
    assert sorted(epochs(shards, store, 1)[0]) == ids(shards)


def test_a_store_in_a_folder_of_any_name_is_read(odd_folder: Store, index: Index):
    shards = shard_set(odd_folder, replace(index, records=index.records[:2]), 2)
    assert sorted(epochs(shards, odd_folder, 1)[0]) == ids(shards)


def test_a_shards_samples_come_in_its_order(five: ShardSet, shard_store: Store):
    for shard in five.shards:
        found = [from_fields(fields).image_id for fields in read_shard_samples(shard_store.url, shard)]
        assert tuple(found) == shard.image_ids


def test_a_shard_that_is_gone_is_named(five: ShardSet, shard_store: Store):
    gone = replace(five, shards=(replace(five.shards[0], key="precompute/shards/gone.tar"),))
    with pytest.raises(TesseraError, match=r"gone\.tar"):
        next(iter(BatchStream(gone, shard_store.url, PLAIN, 1)))


@pytest.mark.parametrize("scheme", ["pipe:", "http://x';", "gs://x';", "hf://x';", "scp://x';", "s3://"])
def test_no_key_of_a_manifest_runs_a_shell(five: ShardSet, shard_store: Store, tmp_path: Path, scheme: str):
    key = f"{scheme}touch {tmp_path}/ran;'.tar"
    evil = replace(five, shards=(replace(five.shards[0], key=key),))
    with pytest.raises((TesseraError, OSError)):
        next(iter(BatchStream(evil, shard_store.url, PLAIN, 1)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_a_shard_that_lost_its_end_is_named(five: ShardSet, shard_store: Store, keep: float):
    whole = shard_store.read(five.shards[0].key)
    shard_store.write("cut.tar", whole[: 512 * int(keep * len(whole) / 512)])
    with pytest.raises(TesseraError, match=r"cut\.tar"):
        list(read_shard_samples(shard_store.url, replace(five.shards[0], key="cut.tar")))
