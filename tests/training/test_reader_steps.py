"""A step has the same images with any number of workers and processes, and any step can be reached again."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.errors import TesseraError
from infra.store import Store
from preprocessing.shards import ShardSet
from preprocessing.source import Index
from tests.support.examples import same_batches
from tests.support.reader_streams import PLAIN, epochs, ids, keys
from tests.training.conftest import Maker
from training.augment import Crop
from training.batch import Batch
from training.reader import BatchStream, ReaderConfig, load_batches

CROPPED = ReaderConfig(shuffle=7, crop=Crop(size=(24, 28), short_side=(12, 48), long_side=60))
Load = Callable[[BatchStream], Iterator[Batch]]


@pytest.fixture
def five(make_set: Maker, index: Index) -> ShardSet:
    """Shards of 3, 3, 3, 3 and 1 images."""
    return make_set(index.records[:13], 3)


@pytest.fixture
def eight(make_set: Maker, index: Index) -> ShardSet:
    """Shards of 3 images, the last one of 2."""
    return make_set(index.records[:23], 3)


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
