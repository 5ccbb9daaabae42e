from pathlib import Path

import pytest

from infra.errors import TesseraError
from infra.store import FolderStore, open_store
from preprocessing.coco import read_index
from preprocessing.ray_precompute import precompute
from preprocessing.shards import ShardConfig, read_set
from tests.support.coco_folder import CocoFolder, cut

CONFIG = ShardConfig(grid=(20, 30), radius=9, samples=5)


def times(store: FolderStore) -> dict[str, int]:
    return {entry.key: (Path(store.url) / entry.key).stat().st_mtime_ns for entry in store.list("precompute/")}


def records(store: FolderStore) -> dict[str, int]:
    return {key: time for key, time in times(store).items() if "/shards/" in key and key.endswith(".json")}


@pytest.fixture
def folder(tmp_path: Path) -> FolderStore:
    return open_store(str(tmp_path / "store"))


@pytest.mark.usefixtures("ray_local")
def test_a_whole_set_goes_through_ray_and_a_rerun_writes_nothing(coco: CocoFolder, folder: FolderStore):
    result = precompute(coco.split, coco.index(), CONFIG, folder.url)
    assert [shard.image_ids for shard in result.shards] == [(1, 2, 3, 4, 5), (6, 7, 8, 9, 10), (11, 12)]
    assert read_set(folder, result.path) == result
    before = times(folder)
    assert len(before) == 3 + 3 + 1
    assert precompute(coco.split, coco.index(), CONFIG, folder.url) == result
    assert times(folder) == before


@pytest.mark.usefixtures("ray_local")
def test_splits_and_settings_share_a_store(coco: CocoFolder, folder: FolderStore):
    first = precompute("train", coco.index(), CONFIG, folder.url)
    others = [
        precompute("val", read_index(coco.root, "val2017"), CONFIG, folder.url),
        precompute("val as it is", coco.index(), ShardConfig(samples=5), folder.url),
    ]
    assert len({first.path, *(other.path for other in others)}) == 3
    assert read_set(folder, first.path) == first


@pytest.mark.usefixtures("ray_local")
def test_bad_samples_fail_the_driver_by_name_and_mending_them_lets_it_go_on(coco: CocoFolder, folder: FolderStore):
    sound = coco.mask(5).read_bytes()
    cut(coco.mask(5))
    with pytest.raises(TesseraError, match=f"1 of 12 samples are unusable.*{coco.mask(5).name}"):
        precompute(coco.split, coco.index(), CONFIG, folder.url)
    before = times(folder)
    coco.mask(5).write_bytes(sound)
    assert precompute(coco.split, coco.index(), CONFIG, folder.url).samples == 12
    after = times(folder)
    assert {key: after[key] for key in before} == before
    assert len(after) == len(before) + 3  # one shard, its record, the manifest
