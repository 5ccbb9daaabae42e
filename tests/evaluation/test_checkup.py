"""PQ on fixed val images while a method is trained: the figures of evaluation, at any number of workers."""

import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import spawn

from evaluation import checkup
from evaluation.checkup import PANELS, ValCheck
from evaluation.pq import PQStats, compare, summarise
from infra.errors import TesseraError
from infra.store import Store, open_store
from preprocessing.coco import read_index
from preprocessing.pictures import Picture
from preprocessing.sample import Sample, decode_image, from_fields
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import ShardConfig, ShardSet
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.examples import table
from tests.support.shard_sets import make_set
from tests.training.ranks import Recorder, recipe_of
from training.loop import train
from training.methods.base import Method
from training.parallel import Place
from training.recipe import Recipe

IMAGES = 11
Found = tuple[dict[str, float], dict[str, Picture]]


@dataclass(frozen=True)
class Scenes:
    """Val images of several sizes in shards of four, and train images in shards of two, on one store."""

    store: Store
    val: ShardSet
    train: ShardSet

    @property
    def samples(self) -> dict[int, Sample]:
        """By image id, in the order of the set."""
        fields = (fields for shard in self.val.shards for fields in read_shard_samples(self.store.url, shard))
        return {sample.image_id: sample for sample in map(from_fields, fields)}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    folder = tmp_path_factory.mktemp("checkup")
    store = open_store(str(folder / "store"))
    records = []
    for i, size in enumerate([(24, 56), (32, 32), (40, 48)]):
        root = write_set(folder / f"{i}", SyntheticConfig(train=4, val=4, size=size, seed=5 + i))
        index = read_index(root, "val2017")
        records += [replace(r, image_id=100 * (i + 1) + r.image_id) for r in index.records]
    index = replace(index, records=tuple(records[:IMAGES]))
    val = make_set(store, index, ShardConfig(radius=0, samples=4))
    assert val.samples == IMAGES
    return Scenes(store, val, make_set(store, read_index(root, "train2017"), replace(recipe().shards, samples=2)))


def recipe(**changes: Any) -> Recipe:
    return recipe_of(**changes).changed({"method.tasks": "joint", "method.decode.min_area": 0.001})


@pytest.fixture(scope="module")
def weights(scenes: Scenes) -> dict[str, Tensor]:
    """Of a network that has learnt a little."""
    run = recipe(batch=4, epochs=80, lr=3e-3)
    return train(run, scenes.train, scenes.store.url, Place(), None, Recorder())[0]


@pytest.fixture
def method(scenes: Scenes, weights: dict[str, Tensor]) -> Method:
    method = recipe().build(scenes.val.labels).eval()
    method.load_state_dict(weights)
    return method


def check(scenes: Scenes, images: int) -> ValCheck:
    return ValCheck(scenes.store.url, scenes.val.path, images)


def by_hand(scenes: Scenes, method: Method, ids: list[int]) -> dict[str, float | None]:
    """Images one after the other through the network, added up."""
    total = PQStats.zero(len(method.labels))
    for image_id in ids:
        sample = scenes.samples[image_id]
        inputs = method.inputs([decode_image(sample.image)])
        (prediction,) = method.segment(inputs, [sample.panoptic.size])
        total += compare(sample.panoptic, prediction, len(method.labels))
    summary = summarise(total, method.labels)
    groups = {f"pq_{group}": summary["pq"][group] for group in ("things", "stuff")}
    return {name: summary[name]["all"] for name in ("pq", "sq", "rq")} | groups


def places(world: int) -> list[Place]:
    return [Place(rank, world) for rank in range(world)]


def together(
    checks: list[ValCheck], method: Method, world: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Found], list[PQStats]]:
    """(what each of `world` workers finds, what each gave to the others), one after another in this process."""
    given = list[PQStats]()
    monkeypatch.setattr(checkup, "gathered", lambda value, place: given.append(value) or [value])
    for own, place in zip(checks, places(world), strict=True):
        own(method, place)
    monkeypatch.setattr(checkup, "gathered", lambda value, place: list(given))
    return [own(method, place) for own, place in zip(checks, places(world), strict=True)], given


@pytest.mark.parametrize("images", [IMAGES, 5])
def test_alone_it_measures_what_evaluation_does(scenes: Scenes, method: Method, images: int):
    found = check(scenes, images)
    ids = [int(title.split()[1]) for title in found(method, Place())[1]]
    chosen = found._chosen
    assert ids == chosen[:PANELS]
    expected = by_hand(scenes, method, chosen)
    assert None not in expected.values()
    assert 1 < expected["pq"] < 100
    assert found(method, Place())[0] == expected


def test_images_are_spread_evenly_and_the_same_at_every_call(scenes: Scenes):
    every = [*scenes.samples]
    assert len(every) == IMAGES
    for images in range(1, IMAGES + 4):
        chosen = check(scenes, images)._chosen
        places = [every.index(image_id) for image_id in chosen]
        count = min(images, IMAGES)
        assert len({*places}) == len(places) == count
        assert places == sorted(places)
        assert places[0] == 0
        assert count == 1 or places[-1] == IMAGES - 1
        steps = np.diff(places)
        assert count == 1 or steps.max() - steps.min() <= 1
        again = check(scenes, images)
        assert again._chosen == chosen == again._chosen


@pytest.mark.parametrize("world", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("images", [1, 2, 7, 500])
def test_any_number_of_workers_finds_the_same(
    scenes: Scenes, method: Method, images: int, world: int, monkeypatch: pytest.MonkeyPatch
):
    """Each image counts once, also where there are more workers than images; all have equally many to predict."""
    expected, panels = check(scenes, images)(method, Place())
    calls = list[int]()
    whole = method.predict
    monkeypatch.setattr(method, "predict", lambda images_B3HW: calls.append(len(images_B3HW)) or whole(images_B3HW))
    checks = [check(scenes, images) for _ in range(world)]
    found, given = together(checks, method, world, monkeypatch)
    assert [figures for figures, _ in found] == [expected] * world
    assert calls == calls[: len(calls) // (2 * world)] * (2 * world)
    assert sum(calls) == 2 * world * -(-min(images, IMAGES) // world)
    segments = sum(stats.tp.sum() + stats.fn.sum() for stats in given)
    kept = [scenes.samples[i].panoptic.segments for i in check(scenes, images)._chosen]
    assert segments == sum(not segment.is_crowd for rows in kept for segment in rows)
    assert not any(drawn for _, drawn in found[1:])
    assert {*found[0][1]} <= {*panels}
    assert all((panels[title] == panel).all() for title, panel in found[0][1].items())


def test_a_worker_that_gets_another_part_reads_it(scenes: Scenes, method: Method, monkeypatch: pytest.MonkeyPatch):
    """As many workers as there are may change between two checks."""
    own = check(scenes, 7)
    monkeypatch.setattr(checkup, "gathered", lambda value, place: [value])
    told = [own(method, place)[0] for place in (Place(1, 2), Place(0, 3), Place(), Place(1, 2))]
    chosen = own._chosen
    assert told[0] == told[3]
    parts = [chosen[4:], chosen[:3], chosen]
    for figures, ids in zip(told, parts, strict=False):
        assert figures == {name: value for name, value in by_hand(scenes, method, ids).items() if value is not None}


def test_samples_are_read_once(scenes: Scenes, method: Method, monkeypatch: pytest.MonkeyPatch):
    own, read = check(scenes, 2), list[str]()
    whole = checkup.read_shard_samples
    monkeypatch.setattr(checkup, "read_shard_samples", lambda url, shard: read.append(shard.key) or whole(url, shard))
    first = own(method, Place())
    assert read == [scenes.val.shards[0].key, scenes.val.shards[-1].key]
    own(method, Place())
    assert len(read) == 2
    again = pickle.loads(pickle.dumps(check(scenes, 2)))
    assert again(method, Place())[0] == first[0]


def test_panels_are_image_truth_and_prediction_side_by_side(scenes: Scenes, method: Method):
    panels = check(scenes, 7)(method, Place())[1]
    assert len(panels) == PANELS
    for title, panel in panels.items():
        sample = scenes.samples[int(title.split()[1])]
        height, width = sample.panoptic.size
        assert panel.shape == (height, 3 * width, 3)
        assert panel.dtype == np.uint8
        assert (panel[:, :width] == decode_image(sample.image)).all()
        assert (panel[:, width : 2 * width] != panel[:, :width]).any()
        assert (panel[:, width : 2 * width] != panel[:, 2 * width :]).any()
    assert len({panel.shape for panel in panels.values()}) > 1
    assert len(check(scenes, 1)(method, Place())[1]) == 1


def test_a_group_that_does_not_occur_has_no_figure(scenes: Scenes, method: Method, monkeypatch: pytest.MonkeyPatch):
    own = check(scenes, 3)
    monkeypatch.setattr(checkup, "compare", lambda *_: PQStats.zero(len(method.labels)))
    assert own(method, Place())[0] == {}
    stuff = int(method.labels.is_thing.argmin())

    def one_of_stuff(*_: object) -> PQStats:
        stats = PQStats.zero(len(method.labels))
        stats.fn[stuff] = 1
        return stats

    monkeypatch.setattr(checkup, "compare", one_of_stuff)
    assert own(method, Place())[0] == {"pq": 0, "sq": 0, "rq": 0, "pq_stuff": 0}


def test_a_missing_or_empty_val_set_is_refused_by_name(scenes: Scenes, method: Method, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(TesseraError, match=f"{scenes.store.url}/precompute/none: expected a val set with images"):
        ValCheck(scenes.store.url, "precompute/none", 5)(method, Place())
    empty = replace(scenes.val, shards=())
    monkeypatch.setattr(checkup, "read_set", lambda store, path: empty)
    with pytest.raises(TesseraError, match=f"{scenes.val.path}: expected a val set with images"):
        check(scenes, 5)(method, Place())


def test_the_tables_categories_are_the_methods(scenes: Scenes):
    """One of another number of categories cannot be compared."""
    with pytest.raises(TesseraError, match=r"has category \d of 2"):
        check(scenes, 5)(recipe().build(table(1, 1)).eval(), Place())


@dataclass
class Checking(Recorder):
    """Measures with a ValCheck."""

    measure: ValCheck | None = None
    place: Place = field(default_factory=Place)
    found: list[Found] = field(default_factory=list)

    def check(self, method: Method, step: int) -> dict[str, float]:
        super().check(method, step)
        assert self.measure is not None
        self.found.append(self.measure(method, self.place))
        return self.found[-1][0]


def trained(
    scenes: Scenes, weights: dict[str, Tensor], place: Place, every: float | None, ema: float = 0.5
) -> tuple[list[Any], list[Found]]:
    """(losses, what the checks found) of a run whose weights stay where they are."""
    run = recipe(upkeep={"check_epochs": every}, batch=4, epochs=2, lr=1e-12, weight_decay=0.0, ema=ema)
    watcher = Checking(measure=check(scenes, 7), place=place)
    _, rows = train(run, scenes.train, scenes.store.url, place, None, watcher, weights)
    return [row.losses for row in rows], watcher.found


KINDS = {"whole": (False, 0.5), "sharded": (True, 0.5), "sharded without average": (True, 0.0)}


def rank_of_two(rank: int, scenes: Scenes, weights: dict[str, Tensor], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, (sharded, ema) in KINDS.items():
        place = Place(rank, 2, sharded=sharded)
        found = [trained(scenes, weights, place, every, ema) for every in (1.0, None)]
        (folder / f"{name} {rank}").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def test_two_processes_measure_what_one_does_and_train_on_undisturbed(
    scenes: Scenes, weights: dict[str, Tensor], tmp_path: Path
):
    """Whether each holds all of the weights or a part of them."""
    losses, expected = trained(scenes, weights, Place(), 1.0)
    assert len(expected) == 2
    assert 1 < expected[0][0]["pq"] < 100
    spawn(rank_of_two, (scenes, weights, tmp_path), nprocs=2)
    for name in KINDS:
        ranks = [pickle.loads((tmp_path / f"{name} {rank}").read_bytes()) for rank in range(2)]
        for (theirs, found), (without, none) in ranks:
            assert [figures for figures, _ in found] == [figures for figures, _ in expected]
            assert theirs == without
            assert not none
            assert theirs[0] == pytest.approx(losses[0], abs=1e-5)
        (_, first), (_, second) = ranks[0][0], ranks[1][0]
        assert all(panels.keys() == {*list(expected[0][1])[:PANELS]} for _, panels in first)
        assert not any(panels for _, panels in second)
