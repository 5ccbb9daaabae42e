import hashlib
import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from infra.errors import TesseraError
from infra.store import open_store
from preprocessing.sample import from_fields, make_sample
from preprocessing.shards import Plan, ShardConfig, ShardJob, compute_shard, plan
from tests.support.coco_folder import CocoFolder

CONFIG = ShardConfig(grid=(20, 30), radius=9, samples=5)


def planned(coco: CocoFolder, config: ShardConfig = CONFIG) -> Plan:
    """On a store that holds nothing yet."""
    return plan(open_store(str(coco.root / "no store")), coco.index(), config)


def keys(coco: CocoFolder, config: ShardConfig = CONFIG) -> list[str]:
    return [job.key for job in planned(coco, config).jobs]


def job_of(coco: CocoFolder, number: int = 0) -> ShardJob:
    return planned(coco).jobs[number]


def test_every_sample_is_in_one_shard_and_in_order(coco: CocoFolder):
    jobs = planned(coco).jobs
    assert [[r.image_id for r in job.records] for job in jobs] == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12]]
    assert len(set(keys(coco))) == 3


def test_plain_tarfile_reads_a_shard(coco: CocoFolder, tmp_path: Path):
    store, job = open_store(str(tmp_path / "store")), job_of(coco)
    shard = compute_shard(store.url, job)
    data = store.read(shard.key)
    assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert shard.image_ids == (1, 2, 3, 4, 5)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    assert len(files) == 5 * 4
    for record in job.records:
        fields = {n.split(".", 1)[1]: d for n, d in files.items() if n.startswith(f"{record.image_id:012d}.")}
        sample, wanted = from_fields(fields), make_sample(record, job.labels, CONFIG.grid, CONFIG.radius)
        assert (sample.image, sample.segments) == (wanted.image, wanted.segments)
        assert np.array_equal(sample.d2, wanted.d2)


def test_plain_webdataset_reads_a_shard(coco: CocoFolder, tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    shard = compute_shard(store.url, job_of(coco))
    items = list(wds.WebDataset(store.url_for(shard.key), shardshuffle=False))
    assert [int(item["__key__"]) for item in items] == [1, 2, 3, 4, 5]
    assert [from_fields(item).image_id for item in items] == [1, 2, 3, 4, 5]


def test_a_shard_has_the_same_bytes_wherever_it_is_made(coco: CocoFolder, pristine: Path, tmp_path: Path):
    here, there = open_store(str(tmp_path / "here")), open_store(str(tmp_path / "there"))
    mine, other = job_of(coco), job_of(CocoFolder(pristine))
    assert mine.records != other.records
    assert compute_shard(here.url, mine) == compute_shard(there.url, other)
    assert here.read(mine.key) == there.read(other.key)


@pytest.mark.parametrize("change", [{"grid": (20, 31)}, {"grid": None}, {"radius": 10}])
def test_settings_of_the_targets_change_every_key(coco: CocoFolder, change: dict):
    assert not set(keys(coco)) & set(keys(coco, replace(CONFIG, **change)))


@pytest.mark.parametrize(
    ("name", "value"), [("name", "other"), ("id", 205), ("isthing", 1), ("color", [1, 2, 3])], ids=lambda v: str(v)
)
def test_the_label_table_changes_every_key(coco: CocoFolder, name: str, value):
    before = keys(coco)
    with coco.editing() as content:
        content["categories"][-1][name] = value
    assert not set(keys(coco)) & set(before)


def change_image_file(coco: CocoFolder) -> None:
    coco.image(6).write_bytes(coco.image(6).read_bytes() + b"\0")


def change_mask_file(coco: CocoFolder) -> None:
    coco.mask(6).write_bytes(coco.mask(6).read_bytes() + b"\0")


def change_category(coco: CocoFolder) -> None:
    with coco.editing() as content:
        content["annotations"][6]["segments_info"][0]["category_id"] = 200


def change_size(coco: CocoFolder) -> None:
    with coco.editing() as content:
        content["images"][6]["height"] = 47


def change_name(coco: CocoFolder) -> None:
    coco.image(6).rename(coco.images / "renamed.jpg")
    with coco.editing() as content:
        content["images"][6]["file_name"] = "renamed.jpg"


def remove_image_file(coco: CocoFolder) -> None:
    coco.image(6).unlink()


@pytest.mark.parametrize(
    "change", [change_image_file, change_mask_file, change_category, change_size, change_name, remove_image_file]
)
def test_a_changed_sample_changes_its_shards_key_alone(coco: CocoFolder, change):
    before = keys(coco)
    change(coco)
    after = keys(coco)
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True]


def test_keys_do_not_depend_on_the_folders_place_or_the_files_age(coco: CocoFolder, tmp_path: Path):
    list_a_lone_image(coco)
    before = keys(coco), planned(coco).path
    moved = CocoFolder(Path(shutil.move(coco.root, tmp_path / "elsewhere")))
    for path in moved.root.rglob("*"):
        path.touch()
    assert (keys(moved), planned(moved).path) == before


def list_a_lone_image(coco: CocoFolder) -> None:
    with coco.editing() as content:
        content["images"].append({"id": 99, "file_name": "lone.jpg", "height": 48, "width": 48})


def test_the_sets_path_changes_with_its_rejected_samples(coco: CocoFolder):
    before = planned(coco)
    list_a_lone_image(coco)
    assert keys(coco) == [job.key for job in before.jobs]
    assert planned(coco).path != before.path


@pytest.mark.parametrize("wrong", [{"radius": -1}, {"radius": 182}, {"samples": 0}, {"grid": (0, 5)}])
def test_settings_of_no_use_are_refused(wrong: dict):
    with pytest.raises(TesseraError, match="shards"):
        ShardConfig(**wrong)
