"""Data sets that grow, shrink, or lose shards: what is computed again, and what stays readable."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from infra.artifacts import MANIFEST
from infra.store import Store, open_store
from preprocessing.coco import read_index
from preprocessing.ray_precompute import precompute
from preprocessing.shards import ShardConfig, forget_lost, plan, read_set
from preprocessing.source import Index
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.coco_folder import CocoFolder
from tests.support.shard_sets import make_set

CONFIG = ShardConfig(grid=(20, 30), radius=9, samples=5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Index:
    root = write_set(tmp_path_factory.mktemp("growing"), SyntheticConfig(train=23, val=1, size=(32, 32)))
    return read_index(root, "train2017")


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def part(whole: Index, *ids: int) -> Index:
    """Records of these image ids, in the order of the JSON."""
    return replace(whole, records=tuple(r for r in whole.records if r.image_id in ids))


def made(store: Store) -> set[str]:
    return {entry.key for entry in store.list("precompute/shards/") if entry.key.endswith(".tar")}


def ids_of(path: str, store: Store) -> list[tuple[int, ...]]:
    found = read_set(store, path)
    assert found is not None
    return [shard.image_ids for shard in found.shards]


def test_added_images_cost_their_own_shards_alone_wherever_they_stand(whole: Index, folder: Store):
    old = make_set(folder, part(whole, *range(2, 24, 2)), CONFIG)  # 2, 4, .. 22: every added one stands between two
    before = made(folder)
    grown = make_set(folder, whole, CONFIG)
    assert grown.shards[:3] == old.shards
    assert [s.image_ids for s in grown.shards[3:]] == [(1, 3, 5, 7, 9), (11, 13, 15, 17, 19), (21, 23)]
    assert made(folder) - before == {shard.key for shard in grown.shards[3:]}


def test_the_old_manifest_stays_as_it_was_and_the_new_one_names_it(whole: Index, folder: Store):
    old = make_set(folder, part(whole, *range(1, 12)), CONFIG)
    bytes_before = folder.read(f"{old.path}/{MANIFEST}")
    grown = make_set(folder, whole, CONFIG)
    assert folder.read(f"{old.path}/{MANIFEST}") == bytes_before
    assert read_set(folder, old.path) == old
    assert json.loads(folder.read(f"{grown.path}/{MANIFEST}"))["extends"] == [old.path]
    assert json.loads(bytes_before)["extends"] == []


def test_a_rerun_of_every_version_finds_it_finished(whole: Index, folder: Store):
    sizes = 7, 12, 13, 23
    paths = [make_set(folder, part(whole, *range(1, n + 1)), CONFIG).path for n in sizes]
    assert len(set(paths)) == 4
    assert [plan(folder, part(whole, *range(1, n + 1)), CONFIG).path for n in sizes] == paths
    assert sorted(i for ids in ids_of(paths[-1], folder) for i in ids) == list(range(1, 24))


def test_an_image_taken_away_costs_its_shard(whole: Index, folder: Store):
    make_set(folder, whole, CONFIG)
    less = part(whole, *(i for i in range(1, 24) if i != 8))
    assert ids_of(make_set(folder, less, CONFIG).path, folder) == [
        (1, 2, 3, 4, 5),
        (11, 12, 13, 14, 15),
        (16, 17, 18, 19, 20),
        (21, 22, 23),
        (6, 7, 9, 10),
    ]


def test_a_changed_image_is_made_again_and_others_of_its_shard_with_it(coco: CocoFolder, folder: Store):
    before = make_set(folder, coco.index(), CONFIG)
    with coco.editing() as content:
        content["annotations"][6]["segments_info"][0]["category_id"] = 200
    after = make_set(folder, coco.index(), CONFIG)
    assert [s.image_ids for s in after.shards] == [(1, 2, 3, 4, 5), (11, 12), (6, 7, 8, 9, 10)]
    assert [s in before.shards for s in after.shards] == [True, True, False]


@pytest.mark.parametrize("other", [{"radius": 8}, {"samples": 4}, {"grid": None}])
def test_sets_of_other_settings_are_no_ancestors(whole: Index, folder: Store, other: dict):
    make_set(folder, part(whole, *range(1, 12)), replace(CONFIG, **other))
    assert plan(folder, whole, CONFIG).extends == ()


def test_an_interrupted_growth_is_planned_again_alike(whole: Index, folder: Store):
    make_set(folder, part(whole, *range(1, 12)), CONFIG)
    first = plan(folder, whole, CONFIG)
    assert plan(folder, whole, CONFIG) == first
    make_set(folder, part(whole, 12), replace(CONFIG, radius=8))  # another set, meanwhile
    assert plan(folder, whole, CONFIG) == first


@pytest.mark.usefixtures("ray_local")
def test_lost_and_cut_shards_of_a_finished_set_are_made_again(whole: Index, folder: Store):
    done = precompute("train", whole, CONFIG, folder.url)
    whole_bytes = {shard.key: folder.read(shard.key) for shard in done.shards}
    folder.delete(done.shards[1].key)
    folder.write(done.shards[3].key, whole_bytes[done.shards[3].key][:-100])
    jobs = forget_lost(folder, plan(folder, whole, CONFIG).jobs, done)
    assert [job.key for job in jobs] == [done.shards[1].key, done.shards[3].key]
    assert precompute("train", whole, CONFIG, folder.url) == done
    assert {shard.key: folder.read(shard.key) for shard in done.shards} == whole_bytes
