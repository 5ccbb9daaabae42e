"""Sets that are joined: the samples of a set made at once, in any order, none twice; training reads them."""

from dataclasses import replace
from itertools import islice, permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import TesseraError
from infra.store import Store, open_store
from preprocessing.coco import read_index
from preprocessing.labels import LabelTable
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import Shard, ShardConfig, ShardSet, join, read_set, write_set
from preprocessing.source import Index, Origin, Rejected
from preprocessing.synthetic import CATEGORIES, SyntheticConfig
from preprocessing.synthetic import write_set as write_synthetic
from tests.support.retraining import ids_of
from tests.support.shard_sets import make_set
from training.reader import BatchStream, ReaderConfig

CONFIG = ShardConfig(grid=(20, 30), radius=9, samples=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Index:
    root = write_synthetic(tmp_path_factory.mktemp("joined"), SyntheticConfig(train=14, val=1, size=(32, 32)))
    return read_index(root, "train2017")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("joined") / "store"))


@pytest.fixture(scope="module")
def parts(whole: Index, folder: Store) -> list[ShardSet]:
    """Images 1-6, 7-9, 10-11 and 12-14."""
    cuts = ((0, 6), (6, 9), (9, 11), (11, 14))
    return [make_set(folder, replace(whole, records=whole.records[a:b]), CONFIG) for a, b in cuts]


def samples(store: Store, shards: ShardSet) -> dict[int, dict[str, bytes]]:
    """The fields of each sample, byte for byte, by image id."""
    found = dict[int, dict[str, bytes]]()
    for shard in shards.shards:
        found |= zip(shard.image_ids, read_shard_samples(store.url, shard), strict=True)
    return found


def test_joined_sets_hold_the_samples_of_a_set_made_at_once(
    whole: Index, folder: Store, parts: list[ShardSet], tmp_path: Path
):
    alone = open_store(str(tmp_path / "alone"))  # where no shard can be taken over
    at_once, joined = make_set(alone, whole, CONFIG), join(parts[0], parts[1:])
    assert samples(folder, joined) == samples(alone, at_once)
    assert joined.samples == at_once.samples == 14
    assert (joined.labels, joined.config) == (at_once.labels, at_once.config)


def test_the_order_of_the_others_decides_nothing(parts: list[ShardSet]):
    joined = {join(parts[0], order) for order in permutations(parts[1:])}
    assert len(joined) == 1
    assert {one.path for one in joined}.isdisjoint(part.path for part in parts)


def test_without_another_image_the_first_set_is_the_answer(parts: list[ShardSet]):
    assert join(parts[0], []) == join(parts[0], [parts[0]]) == parts[0]


def test_other_labels_or_settings_are_refused(parts: list[ShardSet]):
    labels = LabelTable(CATEGORIES.categories[::-1])
    for other in (replace(parts[1], labels=labels), replace(parts[1], config=replace(CONFIG, radius=8))):
        with pytest.raises(TesseraError, match=f"^{other.path}: its categories or settings are other ones than"):
            join(parts[0], [other])


def test_what_was_set_aside_anywhere_is_told(parts: list[ShardSet]):
    aside = Rejected(99, "99.jpg", "torn")
    joined = join(parts[0], [replace(parts[1], rejected=(aside,)), parts[2]])
    assert joined.rejected == (aside,)
    assert joined.path != join(parts[0], parts[1:3]).path


def test_where_samples_come_from_is_kept_and_names_no_set(folder: Store, parts: list[ShardSet]):
    one, two = (Origin("/data/ADE20K", split, "ade20k") for split in ("training", "more"))
    named = [replace(part, origins=(origin,)) for part, origin in zip(parts, (one, two, two, one), strict=True)]
    joined = join(named[0], named[1:])
    assert joined.origins == (one, two)
    assert joined == join(parts[0], parts[1:])
    write_set(folder, replace(joined, path="precompute/f/named"), ())
    found = read_set(folder, "precompute/f/named")
    assert found is not None
    assert found.origins == joined.origins


def test_training_sees_every_image_of_a_joined_set_once_an_epoch(folder: Store, parts: list[ShardSet]):
    joined = join(parts[0], parts[1:])
    write_set(folder, joined, [part.path for part in parts])
    assert read_set(folder, joined.path) == joined
    stream = BatchStream(joined, folder.url, ReaderConfig(shuffle=5), 1)
    seen = [int(key) for batch in islice(iter(stream), 2 * joined.samples) for key in batch.keys]
    for epoch in (seen[: joined.samples], seen[joined.samples :]):
        assert sorted(epoch) == [*range(1, 15)]


def test_what_is_left_out_is_told(whole: Index, folder: Store, parts: list[ShardSet], caplog: pytest.LogCaptureFixture):
    join(parts[0], parts[1:])
    assert not caplog.messages
    overlapping = make_set(folder, replace(whole, records=whole.records[4:10]), CONFIG)  # shards of 7-9 and of 5, 6, 10
    joined = join(parts[0], [overlapping])
    assert ids_of([joined]) == [*range(1, 10)]
    (told,) = caplog.messages
    assert told.startswith(f"{overlapping.path}: 3 samples are left out")


def sets(ids: st.SearchStrategy[list[list[int]]]) -> st.SearchStrategy[ShardSet]:
    """Sets of shards in memory, named by what they hold."""

    def made(groups: list[list[int]]) -> ShardSet:
        unique, seen = [], set[int]()
        for group in groups:
            fresh = tuple(i for i in dict.fromkeys(group) if i not in seen)
            seen.update(fresh)
            unique += [fresh] if fresh else []
        shards = tuple(Shard(f"precompute/shards/{g}.tar", g, g, 1, "", ()) for g in unique)
        return ShardSet(f"precompute/f/{unique}", CATEGORIES, CONFIG, shards, ())

    return ids.map(made)


GROUPS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=3)


@given(sets(GROUPS), st.lists(sets(GROUPS), max_size=4))
def test_no_image_is_there_twice_and_none_of_the_first_set_is_lost(first: ShardSet, others: list[ShardSet]):
    joined = join(first, others)
    assert joined.shards[: len(first.shards)] == first.shards
    assert len(set(ids_of([joined]))) == joined.samples
    assert {*joined.shards} <= {shard for one in (first, *others) for shard in one.shards}
    assert join(first, others[::-1]) == joined
    assert join(joined, others).shards == joined.shards
