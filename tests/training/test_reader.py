import hashlib
from collections.abc import Callable, Iterator
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
from training.augment import Crop
from training.batch import Batch
from training.reader import BatchStream, ReaderConfig, epoch_part, load_batches

PLAIN = ReaderConfig(shuffle=3, flip=False)
CROPPED = ReaderConfig(shuffle=7, crop=Crop(size=(24, 28), short_side=(12, 48), long_side=60))
Load = Callable[[BatchStream], Iterator[Batch]]


@pytest.fixture(params=[1, 2, 3, 5, 7], ids=lambda count: f"{count} shards")
def uneven(request: pytest.FixtureRequest, make_set: Maker, index: Index) -> ShardSet:
    """Shards of two images; the last one has one."""
    return make_set(index.records[: 2 * request.param - 1], 2)


@pytest.fixture
def five(make_set: Maker, index: Index) -> ShardSet:
    """Shards of 3, 3, 3, 3 and 1 images."""
    return make_set(index.records[:13], 3)


@pytest.fixture
def eight(make_set: Maker, index: Index) -> ShardSet:
    """Shards of 3 images, the last one of 2."""
    return make_set(index.records[:23], 3)


def ids(shards: ShardSet) -> list[int]:
    return sorted(i for shard in shards.shards for i in shard.image_ids)


def keys(batches: Iterator[Batch], count: int) -> list[int]:
    return [int(key) for batch in islice(batches, count) for key in batch.keys]


def epochs(shards: ShardSet, store: Store, count: int, config: ReaderConfig = PLAIN, seed: int = 0) -> list[list[int]]:
    """The images of whole epochs of a single stream, in order."""
    found = keys(iter(BatchStream(shards, store.url, config, 1, seed=seed)), count * shards.samples)
    return [found[i : i + shards.samples] for i in range(0, len(found), shards.samples)]


def by_stream(batches: Iterator[Batch], stream: BatchStream, steps: int) -> list[list[int]]:
    """The images that each stream of each phase gave, in order, of all workers' batches."""
    plan = stream.plan
    found: list[list[int]] = [[] for _ in range(plan.streams * plan.phases)]
    for step, batch in enumerate(islice(batches, steps)):
        for i, key in enumerate(batch.keys):
            found[step % plan.phases * plan.streams + i // plan.images].append(int(key))
    return found


def whole_steps(
    shards: ShardSet,
    store: Store,
    config: ReaderConfig,
    batch: int,
    count: int,
    *,
    world: int = 1,
    start: int = 0,
    load: Load = iter,
) -> list[list[tuple[str, str]]]:
    """Steps over all workers: the key of every image, and a hash of what the augmentation made of it, sorted."""
    ranks = [load(BatchStream(shards, store.url, config, batch, rank, world, start, radius=5)) for rank in range(world)]
    return [
        sorted(image for batch in step for image in images(batch)) for step in islice(zip(*ranks, strict=True), count)
    ]


def images(batch: Batch) -> Iterator[tuple[str, str]]:
    for i, key in enumerate(batch.keys):
        tensors = (batch.images_B3HW[i], batch.labels_BHW[i].int(), batch.d2_BH2W[i])
        yield key, hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), batch=st.integers(1, 12), step=st.integers(0, 25))
def test_steps_have_the_same_images_in_any_world_and_so_does_a_run_resumed_in_another(
    eight: ShardSet, shard_store: Store, data: st.DataObject, batch: int, step: int
):
    """Also those of a world of which some workers have more streams than others."""
    config = replace(
        data.draw(st.sampled_from([ReaderConfig(), CROPPED])),
        streams=data.draw(st.integers(1, 8)),
        workers=data.draw(st.integers(0, 4)),
        shuffle=data.draw(st.integers(1, 40)),
    )
    worlds = st.integers(1, config.plan(batch, 8).streams)
    undisturbed = whole_steps(eight, shard_store, config, batch, step + 6, world=data.draw(worlds))
    assert all(len(images) == batch for images in undisturbed)
    resumed = whole_steps(eight, shard_store, config, batch, 6, world=data.draw(worlds), start=step)
    assert undisturbed[step:] == resumed


@pytest.mark.parametrize("config", [ReaderConfig(), CROPPED], ids=["whole", "cropped"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_run_may_change_its_workers_in_the_middle(
    eight: ShardSet, shard_store: Store, world: int, config: ReaderConfig
):
    alone = whole_steps(eight, shard_store, config, 8, 18)
    assert config.plan(8, 8).streams == 8
    assert len({key for images in alone for key, _ in images}) == eight.samples
    assert alone[:6] == whole_steps(eight, shard_store, config, 8, 6, world=world)
    assert alone[6:13] == whole_steps(eight, shard_store, config, 8, 7, world=5 - world // 2, start=6)
    assert alone[13:] == whole_steps(eight, shard_store, config, 8, 5, world=world, start=13)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_steps_have_the_same_images_in_any_world_of_reader_processes(eight: ShardSet, shard_store: Store, world: int):
    config = replace(CROPPED, workers=2)
    expected = whole_steps(eight, shard_store, config, 12, 9)
    assert config.plan(12, 8).streams == 4
    found = whole_steps(eight, shard_store, config, 12, 6, world=world, start=3, load=load_batches)
    assert found == expected[3:]


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


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("step", [1, 4, 5, 13, 21])
def test_any_step_can_be_reached_again(five: ShardSet, shard_store: Store, world: int, step: int):
    """Of 13 images in batches of 3: within an epoch, at a seam and epochs later."""
    make = [BatchStream(five, shard_store.url, ReaderConfig(), 3, world - 1, world, start) for start in (0, step)]
    undisturbed, resumed = islice(iter(make[0]), step, step + 6), islice(iter(make[1]), 6)
    assert all(same_batches(a, b) for a, b in zip(undisturbed, resumed, strict=True))


@pytest.mark.timeout(20)  # an epoch's shards dealt take 20 us, those of 10**9 epochs hours
def test_a_step_after_any_number_of_epochs_is_reached_at_once(five: ShardSet, shard_store: Store):
    begun = 10**9 * five.samples
    found = keys(iter(BatchStream(five, shard_store.url, PLAIN, 1, start_step=begun)), five.samples)
    assert sorted(found) == ids(five)
    assert found != epochs(five, shard_store, 1)[0]
    inside = keys(iter(BatchStream(five, shard_store.url, PLAIN, 1, start_step=begun + 5)), five.samples - 5)
    assert inside == found[5:]


def as_processes(stream: BatchStream, monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    """What a DataLoader gives: a batch of each of its processes in turn."""
    workers = []
    with monkeypatch.context() as patched:
        for number in range(stream.plan.phases):
            patched.setattr("training.reader.get_worker_info", lambda number=number: SimpleNamespace(id=number))
            batches = iter(stream)
            workers.append(chain([next(batches)], batches))
    return chain.from_iterable(zip(*workers, strict=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), batch=st.integers(1, 6), step=st.integers(0, 25))
def test_any_step_can_be_reached_again_in_processes_and_in_none(
    five: ShardSet, shard_store: Store, monkeypatch, data: st.DataObject, batch: int, step: int
):
    config = ReaderConfig(workers=data.draw(st.integers(1, 7)), shuffle=data.draw(st.integers(1, 20)))
    world = data.draw(st.integers(1, config.plan(batch, 5).streams))
    rank = data.draw(st.integers(0, world - 1))
    make = [BatchStream(five, shard_store.url, config, batch, rank, world, start) for start in (0, step)]
    pairs = zip(islice(iter(make[0]), step, step + 6), islice(as_processes(make[1], monkeypatch), 6), strict=True)
    assert all(same_batches(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_any_step_can_be_reached_again_with_reader_processes(five: ShardSet, shard_store: Store, workers: int):
    """A step that is no multiple of the processes makes them change places. Of nine, five have a shard."""
    config = ReaderConfig(workers=workers)
    undisturbed = list(islice(BatchStream(five, shard_store.url, config, 3), 12))
    for step in (0, 4):
        stream = BatchStream(five, shard_store.url, config, 3, start_step=step)
        assert stream.processes == min(workers, 5)
        resumed = islice(load_batches(stream), 12 - step)
        assert all(same_batches(a, b) for a, b in zip(undisturbed[step:], resumed, strict=True))


def test_one_reader_process_gives_what_none_does(five: ShardSet, shard_store: Store):
    streams = [BatchStream(five, shard_store.url, ReaderConfig(workers=workers), 3) for workers in (0, 1)]
    assert [stream.processes for stream in streams] == [0, 1]
    assert all(same_batches(a, b) for a, b in islice(zip(*streams, strict=True), 6))


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


@pytest.mark.parametrize(
    ("streams", "workers", "batch", "world", "most"),
    [(8, 0, 10, 6, 5), (8, 0, 6, 4, 3), (8, 2, 8, 3, 2), (2, 0, 8, 3, 2), (8, 9, 8, 2, 1), (8, 0, 1, 2, 1)],
)
def test_more_workers_than_streams_are_refused(
    five: ShardSet, shard_store: Store, streams: int, workers: int, batch: int, world: int, most: int
):
    config = ReaderConfig(streams=streams, workers=workers)
    for rank in range(world):
        with pytest.raises(TesseraError, match=f"^{world} training workers cannot share .* drawn from {most} streams"):
            BatchStream(five, shard_store.url, config, batch, rank, world)
    assert BatchStream(five, shard_store.url, config, batch, most - 1, most).plan.streams == most


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
