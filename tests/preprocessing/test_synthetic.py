import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from panopticapi.evaluation import pq_compute_single_core

from infra.errors import TesseraError
from infra.seaweed import S3Server
from infra.store import Store, open_store
from preprocessing.coco import read_index
from preprocessing.rgb_ids import read_png
from preprocessing.source import read_sample
from preprocessing.synthetic import CATEGORIES, SyntheticConfig, stored_set, write_set
from tests.support.coco_folder import CocoFolder

SMALL = {"val": 2, "size": (32, 40)}


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("many"), SyntheticConfig(train=200, val=20, size=(48, 48)))


@pytest.fixture(scope="module")
def truths(many: Path) -> list:
    index = read_index(many, "train2017")
    return [read_sample(record, index.labels)[1] for record in index.records]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path):
    first, second = (contents(write_set(tmp_path / name, SyntheticConfig(train=5, **SMALL))) for name in "ab")
    assert first == second
    assert len(first) == 2 * (5 + 2) + 2


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"train": 1_000_001}, "at most 1000000 train images"),  # the next ones would be the val split's scenes
        ({"seed": -1}, "seed -1, expected one from 0 to"),
        ({"seed": 2**63}, "expected one from 0 to"),
        ({"val": 0}, "at least 1 image a split"),
        ({"size": (15, 64)}, "16x16 pixels"),
    ],
)
def test_a_set_that_cannot_be_is_refused(config: dict, told: str):
    with pytest.raises(TesseraError, match=told):
        SyntheticConfig(**config)


def test_another_seed_gives_other_scenes(tmp_path: Path):
    first, second = (contents(write_set(tmp_path, SyntheticConfig(train=5, seed=seed, **SMALL))) for seed in (0, 1))
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)


def test_no_two_scenes_are_alike(many: Path):
    for split in ("train2017", "val2017"):
        assert len({p.read_bytes() for p in (many / split).iterdir()}) == len(list((many / split).iterdir()))
    assert not {p.name for p in (many / "train2017").iterdir()} & {p.name for p in (many / "val2017").iterdir()}


def test_an_image_is_the_same_whatever_the_sets_size(tmp_path: Path):
    few, more = (write_set(tmp_path, SyntheticConfig(train=train, **SMALL)) for train in (3, 6))
    small, large = contents(few), contents(more)
    files = {name for name in small if not name.endswith(".json")}
    assert {name: small[name] for name in files} == {name: large[name] for name in files}
    entries = [json.loads(CocoFolder(root).json.read_text())["annotations"][:3] for root in (few, more)]
    assert entries[0] == entries[1]


def test_a_finished_set_is_left_as_it_is(tmp_path: Path):
    config = SyntheticConfig(train=2, **SMALL)
    root = write_set(tmp_path, config)
    (root / "mark").touch()
    assert write_set(tmp_path, config) == root
    assert (root / "mark").exists()
    assert [p.name for p in tmp_path.iterdir()] == [root.name]


def test_what_a_killed_write_left_does_no_harm(tmp_path: Path):
    config = SyntheticConfig(train=3, **SMALL)
    whole = write_set(tmp_path / "whole", config)
    half = tmp_path / "half" / f"{whole.name}.part" / "train2017"
    half.mkdir(parents=True)
    (half / "000000000001.jpg").write_bytes(b"\xff\xd8")
    assert contents(write_set(tmp_path / "half", config)) == contents(whole)


def test_racing_writers_of_one_set_all_get_it(tmp_path: Path):
    config = SyntheticConfig(train=20, **SMALL)
    with ThreadPoolExecutor(4) as pool:
        roots = set(pool.map(lambda _: write_set(tmp_path, config), range(4)))
    assert list(tmp_path.iterdir()) == list(roots)
    assert len(contents(*roots)) == 2 * (20 + 2) + 2


@pytest.mark.parametrize("wrong", [{"train": 0}, {"val": 0}, {"size": (15, 64)}])
def test_a_set_of_no_use_is_refused(wrong: dict):
    with pytest.raises(TesseraError, match="synthetic"):
        SyntheticConfig(**wrong)


@pytest.mark.parametrize(("split", "count"), [("train2017", 200), ("val2017", 20)])
def test_every_sample_is_sound_and_its_rows_are_true(many: Path, split: str, count: int):
    index = read_index(many, split)
    assert (len(index.records), index.rejected, index.labels) == (count, (), CATEGORIES)
    for record in index.records:
        _, truth = read_sample(record, index.labels)
        assert [s.area for s in truth.segments] == [row["area"] for row in record.segments_info]
        assert [list(s.box) for s in truth.segments] == [row["bbox"] for row in record.segments_info]


def test_the_scenes_hold_what_makes_annotations_hard(many: Path, truths: list):
    segments = [s for truth in truths for s in truth.segments]
    assert {s.category for s in segments} == set(range(len(CATEGORIES)))
    assert sum(s.is_crowd for s in segments) >= 10
    assert all(s.is_thing for s in segments if s.is_crowd)
    assert sum((truth.ids == 0).any() for truth in truths) >= 50
    assert sum(touching_things(truth) for truth in truths) >= 20  # one occludes the other
    assert max(row["id"] for r in read_index(many, "train2017").records for row in r.segments_info) > 2**23


def touching_things(truth) -> bool:
    thing = np.array([0] + [s.id * (s.is_thing and not s.is_crowd) for s in truth.segments])[truth.ids]
    return any(
        ((a != b) & (a > 0) & (b > 0)).any() for a, b in ((thing[1:], thing[:-1]), (thing[:, 1:], thing[:, :-1]))
    )


def test_the_panoptic_api_gives_the_truth_full_marks(many: Path):
    coco = CocoFolder(many, "val2017")
    content = json.loads(coco.json.read_text())
    pairs = [(entry, json.loads(json.dumps(entry))) for entry in content["annotations"]]
    categories = {c["id"]: c for c in content["categories"]}
    stat = pq_compute_single_core(0, pairs, str(coco.masks), str(coco.masks), categories)
    result, _ = stat.pq_average(categories, isthing=None)
    crowds = sum(row["iscrowd"] for entry, _ in pairs for row in entry["segments_info"])
    assert (result["pq"], result["n"]) == (1.0, 7)
    assert sum(c.tp for c in stat.pq_per_cat.values()) == sum(len(e["segments_info"]) for e, _ in pairs) - crowds


def test_png_ids_are_those_of_the_json(many: Path):
    coco = CocoFolder(many, "val2017")
    for position, entry in enumerate(json.loads(coco.json.read_text())["annotations"]):
        ids = set(np.unique(read_png(coco.mask(position).read_bytes()))) - {0}
        assert ids == {row["id"] for row in entry["segments_info"]}


def test_hard_scenes_have_sizes_over_two_decades_void_borders_and_close_neighbours_of_one_category(tmp_path: Path):
    root = write_set(tmp_path, SyntheticConfig(train=200, val=1, scenes="hard"))
    index = read_index(root, "train2017")
    truths = [read_sample(record, index.labels)[1] for record in index.records]
    areas = [s.area for truth in truths for s in truth.segments if s.is_thing and not s.is_crowd]
    assert np.percentile(areas, 99.5) / np.percentile(areas, 0.5) >= 100
    assert np.mean([bordered(truth) for truth in truths]) > 0.5
    assert sum(neighbours(truth) for truth in truths) >= 200


def bordered(truth) -> float:
    """Of the pixels beside things, in what is no thing, the share that is void."""
    thing = np.isin(truth.ids, [s.id for s in truth.segments if s.is_thing])
    around = np.zeros_like(thing)
    around[1:] |= thing[:-1]
    around[:-1] |= thing[1:]
    around &= ~thing
    return (truth.ids == 0)[around].mean() if around.any() else 0.0


def neighbours(truth) -> int:
    """Pairs of things of one category, each under 2 % of the image, whose centroids are less than 8 pixels apart."""
    small = [s for s in truth.segments if s.is_thing and not s.is_crowd and s.area < 0.02 * truth.ids.size]
    pairs = [(a, b) for i, a in enumerate(small) for b in small[:i] if a.category == b.category]
    return sum(np.hypot(*np.subtract(a.centroid, b.centroid)) < 8 for a, b in pairs)


def test_the_stored_set_is_the_same_on_either_kind_of_store_and_is_written_once(store: Store, tmp_path: Path):
    config = SyntheticConfig(train=3, val=2, size=(24, 32), seed=4)
    url, here = stored_set(store, config), write_set(tmp_path / "here", config)
    for split in ("train2017", "val2017"):
        stored, local = read_index(url, split), read_index(here, split)
        assert [r.fingerprint() for r in stored.records] == [r.fingerprint() for r in local.records]
    before = [*store.list()]
    assert stored_set(store, config) == url
    assert [*store.list()] == before


def test_a_set_of_which_half_is_stored_is_completed(s3_env: S3Server):
    store, config = (
        open_store(f"s3://{s3_env.bucket}/{uuid.uuid4().hex}"),
        SyntheticConfig(train=2, val=1, size=(16, 16)),
    )
    stored_set(store, config)
    keys = [entry.key for entry in store.list()]
    for key in (keys[1], next(key for key in keys if key.endswith("_SUCCESS"))):
        store.delete(key)
    stored_set(store, config)
    assert [entry.key for entry in store.list()] == keys
