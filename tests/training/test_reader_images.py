"""Every image comes once an epoch, in an order of its own, from any shards and stores; what cannot be read is named."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, islice, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import TesseraError
from infra.store import Store
from preprocessing.sample import from_fields
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import Shard, ShardSet
from preprocessing.source import Index
from tests.support.examples import same_batches
from tests.support.reader_streams import PLAIN, epochs, ids
from tests.training.conftest import Maker, shard_set
from training.batch import Batch
from training.reader import BatchStream, ReaderConfig, epoch_part, load_batches


@pytest.fixture(params=[1, 2, 3, 5, 7], ids=lambda count: f"{count} shards")
def uneven(request: pytest.FixtureRequest, make_set: Maker, index: Index) -> ShardSet:
    """Shards of two images; the last one has one."""
    return make_set(index.records[: 2 * request.param - 1], 2)


@pytest.fixture
def five(make_set: Maker, index: Index) -> ShardSet:
    """Shards of 3, 3, 3, 3 and 1 images."""
    return make_set(index.records[:13], 3)


def by_stream(batches: Iterator[Batch], stream: BatchStream, steps: int) -> list[list[int]]:
    """The images that each stream of each phase gave, in order, of all workers' batches."""
    plan = stream.plan
    found: list[list[int]] = [[] for _ in range(plan.streams * plan.phases)]
    for step, batch in enumerate(islice(batches, steps)):
        for i, key in enumerate(batch.keys):
            found[step % plan.phases * plan.streams + i // plan.images].append(int(key))
    return found


def unread(sizes: list[int]) -> tuple[Shard, ...]:
    return tuple(Shard(str(number), (), tuple(range(size)), 1, "", ()) for number, size in enumerate(sizes))


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=60)
SEEDS, EPOCHS = st.integers(0, 2**63 - 1), st.integers(0, 10**6)


@given(SIZES, st.data(), SEEDS, EPOCHS)
def test_any_number_of_streams_share_an_epochs_images_evenly(
    sizes: list[int], data: st.DataObject, seed: int, epoch: int
):
    """More streams than shards, too: then they are cut more than once."""
    streams, shards = data.draw(st.integers(1, sum(sizes))), unread(sizes)
    parts = [epoch_part(shards, seed, epoch, stream, streams) for stream in range(streams)]
    dealt = [(shard.key, i) for part in parts for shard, where in part for i in where]
    assert dealt == [(s.key, i) for s, where in epoch_part(shards, seed, epoch, 0, 1) for i in where]
    assert sorted(dealt) == sorted((shard.key, i) for shard in shards for i in shard.image_ids)
    counts = [sum(len(where) for _, where in part) for part in parts]
    assert set(counts) <= {sum(sizes) // streams, -(-sum(sizes) // streams)}


@given(SIZES, st.data(), SEEDS, EPOCHS, EPOCHS)
def test_a_stream_has_as_many_images_in_every_epoch(
    sizes: list[int], data: st.DataObject, seed: int, epoch: int, other: int
):
    streams = data.draw(st.integers(1, sum(sizes)))
    stream = data.draw(st.integers(0, streams - 1))
    parts = [epoch_part(unread(sizes), seed, number, stream, streams) for number in (epoch, other)]
    assert len({sum(len(where) for _, where in part) for part in parts}) == 1


@given(st.integers(12, 300), SEEDS, EPOCHS)
def test_no_two_epochs_have_the_same_order_of_shards(count: int, seed: int, epoch: int):
    orders = [epoch_part(unread([1] * count), seed, number, 0, 1) for number in range(epoch, epoch + 5)]
    assert all(a != b for a, b in combinations(orders, 2))


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_every_image_comes_once_an_epoch(uneven: ShardSet, shard_store: Store, most: int, workers: int):
    """Over all streams, two epochs long; most streams begin or end in the middle of a shard."""
    config = replace(PLAIN, streams=most, workers=workers)
    for batch in range(1, most + 1):
        stream = BatchStream(uneven, shard_store.url, config, batch)
        count = stream.plan.streams * stream.plan.phases
        lengths = [
            sum(len(where) for _, where in epoch_part(uneven.shards, 0, 0, number, count)) for number in range(count)
        ]
        steps = stream.plan.phases * -(-2 * max(lengths) // stream.plan.images)
        given = [iter(found) for found in by_stream(iter(stream), stream, steps)]
        for _ in range(2):
            epoch = [key for found, length in zip(given, lengths, strict=True) for key in islice(found, length)]
            assert sorted(epoch) == ids(uneven)


def test_streams_cut_shards(five: ShardSet):
    """Or the tests above were about whole shards."""
    parts = [epoch_part(five.shards, 0, epoch, stream, 4) for epoch in range(3) for stream in range(4)]
    assert sum(map(len, parts)) >= 3 * (len(five.shards) + 1)


@pytest.mark.parametrize("world", [1, 2])
def test_reader_processes_share_an_epoch_without_overlap(five: ShardSet, shard_store: Store, world: int):
    """Two streams of 3 images in one phase, of 3 and 4 in the other."""
    config = replace(PLAIN, workers=2)
    seen: list[list[tuple[int, int, tuple[str, ...]]]] = [[], []]
    for rank in range(world):
        stream = BatchStream(five, shard_store.url, config, 2, rank, world)
        for step, batch in enumerate(islice(load_batches(stream), 8)):
            seen[step % 2].append((step, rank, batch.keys))
    first, second = ([key for _, _, batch in sorted(phase) for key in batch] for phase in seen)
    epoch = first[:6] + second[:6] + second[7:]  # what the shorter stream gave fourth is of its next epoch
    assert sorted(map(int, epoch)) == ids(five)


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
    same, again, other = (epochs(five, shard_store, 2, seed=seed) for seed in (1, 1, 2))
    assert same == again
    assert same != other


def test_seeds_epochs_and_streams_mix_a_shards_images_differently(shard_store: Store, make_set: Maker, index: Index):
    """Two streams of a whole shard each, the order of shards left out."""
    shards = make_set(index.records[:24], 12)
    first, orders = {shard.image_ids: min(shard.image_ids) for shard in shards.shards}, set()
    for seed in (1, 2):
        stream = BatchStream(shards, shard_store.url, replace(PLAIN, shuffle=64), 2, seed=seed)
        for found in by_stream(iter(stream), stream, 24):
            for epoch in (found[:12], found[12:]):
                orders.add(tuple(key - first[tuple(sorted(epoch))] for key in epoch))
    assert len(orders) == 2 * 2 * 2


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


def test_batches_are_of_one_size_however_uneven_the_shards(uneven: ShardSet, shard_store: Store):
    for batch in islice(BatchStream(uneven, shard_store.url, ReaderConfig(), 4), 8):
        assert len(batch.keys) == len(batch.images_B3HW) == len(batch.category_BN) == 4


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_a_shard_of_one_image_beside_one_of_59_starves_nobody(
    shard_store: Store, make_set: Maker, index: Index, world: int, workers: int
):
    """As 30 of 30 images, whatever the shards."""
    sets = [make_set(index.records[:1], 1), make_set(index.records[1:60], 59)]
    both = replace(sets[0], shards=tuple(shard for made in sets for shard in made.shards))
    assert sorted(len(shard.image_ids) for shard in both.shards) == [1, 59]
    config, seen = ReaderConfig(workers=workers), set()
    for rank in range(world):
        batches = list(islice(load_batches(BatchStream(both, shard_store.url, config, 16, rank, world)), 12))
        assert [len(batch.keys) for batch in batches] == [16 // world] * 12
        seen |= {int(key) for batch in batches for key in batch.keys}
    assert sorted(seen) == ids(both)


def without_images(shard: Shard) -> Shard:
    """All of its samples were rejected, so that it has no tar."""
    return replace(shard, key="precompute/shards/none.tar", image_ids=(), bytes=0, sha256="")


@pytest.mark.parametrize("workers", [0, 3])
def test_shards_without_images_are_left_out(five: ShardSet, shard_store: Store, workers: int):
    empty = without_images(five.shards[0])
    padded = replace(five, shards=(empty, *five.shards[:2], empty, *five.shards[2:], empty))
    streams = [BatchStream(s, shard_store.url, replace(PLAIN, workers=workers), 5) for s in (five, padded)]
    assert streams[0].plan == streams[1].plan
    assert all(same_batches(a, b) for a, b in islice(zip(*streams, strict=True), 9))


@pytest.mark.parametrize("count", [0, 2])
def test_a_set_without_images_is_refused(five: ShardSet, shard_store: Store, count: int):
    empty = replace(five, shards=tuple(without_images(shard) for shard in five.shards[:count]))
    with pytest.raises(TesseraError, match=f"^{shard_store.url_for(five.path)}: no images to train on$"):
        BatchStream(empty, shard_store.url, PLAIN, 1)


@pytest.mark.parametrize("options", [{"shuffle": 0}, {"streams": 0}, {"workers": -1}], ids=str)
def test_reader_options_out_of_range_are_refused(options: dict):
    with pytest.raises(TesseraError, match=f"^reader: .*{next(iter(options.values()))} "):
        ReaderConfig(**options)


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
