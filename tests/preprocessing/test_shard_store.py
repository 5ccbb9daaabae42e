import json

import pytest

from infra.artifacts import MANIFEST
from infra.errors import TesseraError
from infra.store import Store
from preprocessing.ray_precompute import precompute
from preprocessing.shards import Shard, ShardConfig, ShardSet, compute_shard, plan, read_set, read_shard
from tests.support.coco_folder import CocoFolder, cut
from tests.support.shard_sets import make_set

CONFIG = ShardConfig(grid=(20, 30), radius=9, samples=4)


def compute(store: Store, coco: CocoFolder) -> list[Shard]:
    return [compute_shard(store.url, job) for job in plan(store, coco.index(), CONFIG).jobs]


def finish(store: Store, coco: CocoFolder, bad_share: float = 0.0) -> ShardSet:
    return make_set(store, coco.index(), CONFIG, bad_share)


def manifests(store: Store) -> list[str]:
    return [entry.key for entry in store.list("precompute/") if entry.key.endswith(f"/{MANIFEST}")]


def mark(store: Store) -> set[str]:
    """Replace every tar; one that is made again loses its mark."""
    keys = {entry.key for entry in store.list("precompute/shards/") if entry.key.endswith(".tar")}
    for key in keys:
        store.write(key, b"untouched")
    return keys


def untouched(store: Store) -> set[str]:
    entries = store.list("precompute/shards/")
    return {e.key for e in entries if e.key.endswith(".tar") and store.read(e.key) == b"untouched"}


def test_a_shard_that_is_there_is_not_computed_again(store: Store, coco: CocoFolder):
    first = compute(store, coco)
    assert [read_shard(store, shard.key) for shard in first] == first
    marked = mark(store)
    assert compute(store, coco) == first
    assert untouched(store) == marked == {shard.key for shard in first}


def test_a_shard_without_record_is_computed_again(store: Store, coco: CocoFolder):
    first = compute(store, coco)
    marked = mark(store)
    store.delete(first[1].key.replace(".tar", ".json"))
    assert read_shard(store, first[1].key) is None
    assert compute(store, coco) == first
    assert untouched(store) == marked - {first[1].key}
    assert len(store.read(first[1].key)) == first[1].bytes


def test_a_finished_set_is_read_back_as_it_was_written(store: Store, coco: CocoFolder):
    written = finish(store, coco)
    assert written.samples == 12
    assert read_set(store, written.path) == written
    assert manifests(store) == [f"{written.path}/{MANIFEST}"]
    manifest = json.loads(store.read(f"{written.path}/{MANIFEST}"))
    assert manifest["schema"] == 2
    assert manifest["config"] == {"grid": [20, 30], "radius": 9, "samples": 4}
    assert [s["sha256"] for s in manifest["shards"]] == [s.sha256 for s in written.shards]


def test_no_set_is_no_set(store: Store):
    assert read_set(store, "precompute/0123456789abcdef") is None
    assert read_shard(store, "precompute/shards/0123.tar") is None


def test_a_rejected_sample_is_named_in_record_and_manifest(store: Store, coco: CocoFolder):
    cut(coco.image(5))
    with coco.editing() as content:
        content["images"].append({"id": 99, "file_name": "lone.jpg", "height": 48, "width": 48})
    result = finish(store, coco, bad_share=0.2)
    assert result.samples == 11
    lone, truncated = result.rejected
    assert (lone.image_id, lone.file) == (99, str(coco.images / "lone.jpg"))
    assert (truncated.image_id, truncated.file) == (6, str(coco.image(5)))
    assert coco.image(5).name in truncated.reason
    assert result.shards[1].image_ids == (5, 7, 8)
    assert json.loads(store.read(result.shards[1].key.replace(".tar", ".json")))["rejected"][0]["image_id"] == 6
    assert read_set(store, result.path) == result


def test_too_many_bad_samples_fail_by_name_and_leave_the_shards(store: Store, coco: CocoFolder):
    cut(coco.image(5))
    with pytest.raises(TesseraError, match=rf"1 of 12 .*limit of 1\.0%: image 6, .*{coco.image(5).name}"):
        finish(store, coco, bad_share=0.01)
    assert manifests(store) == []
    assert len(mark(store)) == 3


def test_the_limit_is_a_share_of_all_samples(store: Store, coco: CocoFolder):
    cut(coco.image(5))
    assert finish(store, coco, bad_share=1 / 12).samples == 11


def test_of_many_bad_samples_the_first_five_are_told(store: Store, coco: CocoFolder):
    for path in [coco.mask(position) for position in range(7)]:
        path.unlink()
    with pytest.raises(TesseraError, match=r"7 of 12 .* image 1, .* image 5, .*; \.\.\.$") as caught:
        finish(store, coco)
    assert "image 6," not in str(caught.value)


def test_a_shard_of_bad_samples_alone_has_no_tar_and_is_not_in_the_set(store: Store, coco: CocoFolder):
    for position in range(4):
        cut(coco.mask(position))
    result = finish(store, coco, bad_share=0.5)
    assert [shard.image_ids for shard in result.shards] == [(5, 6, 7, 8), (9, 10, 11, 12)]
    assert [r.image_id for r in result.rejected] == [1, 2, 3, 4]
    assert mark(store) == {shard.key for shard in result.shards}


def test_a_set_without_one_sound_sample_fails_whatever_the_limit(store: Store, coco: CocoFolder):
    for position in range(12):
        cut(coco.mask(position))
    with pytest.raises(TesseraError, match="12 of 12 samples are unusable"):
        finish(store, coco, bad_share=1.0)
    assert manifests(store) == []


def test_after_mending_only_the_mended_shard_is_computed_again(store: Store, coco: CocoFolder):
    sound = coco.image(5).read_bytes()
    cut(coco.image(5))
    with pytest.raises(TesseraError):
        finish(store, coco)
    marked = mark(store)
    coco.image(5).write_bytes(sound)
    result = finish(store, coco)
    assert (result.samples, result.rejected) == (12, ())
    assert [shard.key in untouched(store) for shard in result.shards] == [True, False, True]
    assert untouched(store) == marked  # the shard without the sample stays too, under its own key


def test_a_sample_mended_without_a_change_of_size_is_computed_again(store: Store, coco: CocoFolder):
    """A download that was cut in a preallocated file: the size is right, the end is zeros."""
    sound = coco.mask(5).read_bytes()
    coco.mask(5).write_bytes(sound[: len(sound) // 2] + bytes(len(sound) - len(sound) // 2))
    with pytest.raises(TesseraError, match=coco.mask(5).name):
        finish(store, coco)
    coco.mask(5).write_bytes(sound)
    assert finish(store, coco).samples == 12


def test_a_finished_set_with_too_many_bad_samples_fails_a_stricter_run(store: Store, coco: CocoFolder):
    cut(coco.image(5))
    finish(store, coco, bad_share=0.1)
    with pytest.raises(TesseraError, match=coco.image(5).name):
        precompute(coco.split, coco.index(), CONFIG, store.url, bad_share=0.01)
