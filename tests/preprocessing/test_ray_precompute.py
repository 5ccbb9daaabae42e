import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra.errors import TesseraError
from infra.store import FolderStore, open_store
from preprocessing.coco import read_index
from preprocessing.ray_precompute import precompute
from preprocessing.shards import ShardConfig, read_set
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.coco_folder import CocoFolder, cut

CONFIG = ShardConfig(grid=(20, 30), radius=9, samples=5)
SLOW = "ShardConfig(grid=(1000, 1000), radius=100, samples=1)"  # a tenth of a second a shard: time to be killed
DRIVER = f"""
import sys
from infra.ray_cluster import session
from preprocessing.coco import read_index
from preprocessing.ray_precompute import precompute
from preprocessing.shards import ShardConfig
with session("local"):
    precompute("train", read_index(sys.argv[1], "train2017"), {SLOW}, sys.argv[2])
"""


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


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_killed_driver_leaves_work_that_a_rerun_takes_up(tmp_path: Path, folder: FolderStore):
    coco = write_set(tmp_path, SyntheticConfig(train=24, val=1, size=(48, 48)))
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(coco), folder.url])
    end = time.monotonic() + 60
    while len(records(folder)) < 4:
        assert driver.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    # Ray's two agents go last, after a minute; they compute nothing
    children = [p for p in psutil.Process(driver.pid).children(recursive=True) if "Agent" not in p.name()]
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, [process.cmdline() for process in alive]

    before = records(folder)
    assert 4 <= len(before) < 24
    result = precompute("train", read_index(coco, "train2017"), eval(SLOW), folder.url)
    assert [i for shard in result.shards for i in shard.image_ids] == list(range(1, 25))
    after = records(folder)
    assert len(after) == 24
    assert {key: after[key] for key in before} == before
