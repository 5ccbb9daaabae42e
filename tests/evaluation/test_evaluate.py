"""Shards are scored once, add up to the same bits however they are cut, and what is missing or double is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation import oracle
from evaluation.evaluate import (
    EvalJob,
    Scores,
    ShardScore,
    draw_shard,
    evaluate_shard,
    galleries_of,
    gather,
    load_samples,
)
from evaluation.ray_evaluate import evaluate
from evaluation.summary import summary_of
from infra.errors import TesseraError
from infra.store import Store, open_store
from preprocessing.coco import read_index
from preprocessing.shards import ShardConfig, ShardSet
from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.finished_run import finished_run
from tests.support.ray_local import ray_local  # noqa: F401
from tests.support.shard_sets import make_set
from training.methods.generalist.decode import CENTROID_VIEW
from training.parts.assemble import SEMANTIC_VIEW
from training.recipes.generalist import debug
from training.run import TrainedRun, read_run

IMAGES = 17


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("evaluation") / "store"))


@pytest.fixture(scope="module")
def run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of an untrained run: its predictions are poor, and always the same."""
    return finished_run(tmp_path_factory.mktemp("run"), store.url).removeprefix(f"{store.url}/")


@pytest.fixture(scope="module")
def val_set(store: Store, tmp_path_factory: pytest.TempPathFactory):
    """Shards of a number of images -> the set."""
    config = SyntheticConfig(train=IMAGES, val=1, size=(40, 48), seed=5)
    index = read_index(write_set(tmp_path_factory.mktemp("val"), config), "train2017")
    return lambda samples: make_set(store, index, ShardConfig(radius=0, samples=samples))


def score_all(store: Store, run: str, val_set: ShardSet, name: str) -> list[ShardScore]:
    jobs = [EvalJob(debug(), store.url, run, f"evaluate/{name}", val_set.labels, shard) for shard in val_set.shards]
    return [evaluate_shard(job) for job in jobs]


def bits(scores: Scores) -> str:
    return json.dumps([scores.score.to_json(), {i: s.to_sparse_json() for i, s in scores.by_image.items()}])


def test_however_the_images_are_cut_the_sums_have_the_same_bits(store: Store, run: str, val_set):
    found = set()
    for samples in (1, 4, 17):
        shards = val_set(samples)
        scores = score_all(store, run, shards, f"cut {samples}")
        for order in (scores, scores[::-1]):
            found.add(bits(gather(order, shards)))
    assert len(found) == 1


def test_a_scored_shard_is_read_back_as_it_was(store: Store, run: str, val_set):
    shards = val_set(6)
    first = score_all(store, run, shards, "twice")
    before = {e.key: e.modified for e in store.list("evaluate/twice/")}
    again = score_all(store, run, shards, "twice")
    assert {e.key: e.modified for e in store.list("evaluate/twice/")} == before
    assert bits(gather(first, shards)) == bits(gather(again, shards))
    assert gather(first, shards).annotations == gather(again, shards).annotations


def test_every_image_is_counted_exactly_once_or_it_is_refused(store: Store, run: str, val_set):
    shards = val_set(6)
    scores = score_all(store, run, shards, "counted")
    assert gather(scores, shards).images == IMAGES
    with pytest.raises(TesseraError, match="counted 11 images of 17: 6 missing"):
        gather(scores[1:], shards)
    with pytest.raises(TesseraError, match=r"counted 23 images of 17: 0 missing .*6 more than once"):
        gather([*scores, scores[0]], shards)
    with pytest.raises(TesseraError, match="counted 17 images of 17: 6 missing"):
        gather([scores[0], scores[0], scores[2]], shards)


def test_galleries_are_of_the_worst_the_middle_and_the_best(store: Store, run: str, val_set):
    shards = val_set(6)
    scores = gather(score_all(store, run, shards, "galleries"), shards)
    pq = summary_of(scores, shards.labels)["images"]
    galleries = {kind: [pq[str(i)] for i in ids] for kind, ids in galleries_of(scores).items()}
    assert {kind: len(values) for kind, values in galleries.items()} == {"worst": 4, "median": 4, "best": 4}
    ordered = sorted(pq.values())
    assert (galleries["worst"], galleries["best"]) == (ordered[:4], ordered[: -4 - 1 : -1])
    assert max(galleries["worst"]) <= min(galleries["median"]) <= max(galleries["median"]) <= min(galleries["best"])


def test_few_images_are_all_shown(store: Store, run: str, val_set):
    shards = val_set(6)
    scores = gather(score_all(store, run, shards, "few"), shards)
    few = replace(scores, by_image={i: s for i, s in scores.by_image.items() if i < 8})
    assert [len(ids) for ids in galleries_of(few).values()] == [7]


def test_pictures_are_of_the_images_asked_for(store: Store, run: str, val_set):
    shards = val_set(6)
    job = EvalJob(debug(), store.url, run, "evaluate/drawn", shards.labels, shards.shards[1])
    drawn = draw_shard(job, frozenset({2, 8, 9}))
    assert drawn.keys() == {8, 9}
    titles = ["image", "ground truth", "predicted panoptic", SEMANTIC_VIEW, CENTROID_VIEW]
    assert all(list(panel.pictures) == titles for panel in drawn.values())
    names = {s.image_id: s.file_name for batch in load_samples(store.url, shards.shards[1]) for s in batch}
    assert {i: panel.file_name for i, panel in drawn.items()} == {8: names[8], 9: names[9]}


@pytest.mark.usefixtures("ray_local")
def test_a_task_whose_worker_dies_is_done_again_and_counted_once(store: Store, run: str, val_set, monkeypatch):
    shards, trained = val_set(5), read_run(store.url, run)
    assert isinstance(trained, TrainedRun)
    expected = bits(gather(score_all(store, run, shards, "alone"), shards))
    from evaluation import ray_evaluate

    marker = Path(store.url) / "died"

    def dies_once(job: EvalJob) -> ShardScore:
        import os

        if job.shard.image_ids[0] == 6 and not marker.exists():
            marker.touch()
            evaluate_shard(job)  # all is written, and the answer is lost
            os.kill(os.getpid(), 9)
        return evaluate_shard(job)

    kept = {}
    monkeypatch.setattr(ray_evaluate, "evaluate_shard", dies_once)
    monkeypatch.setattr(ray_evaluate, "gather", lambda *a: kept.setdefault("scores", gather(*a)))
    report = evaluate(debug(), trained, shards, store.url, gpus=False)
    assert marker.exists()
    assert bits(kept["scores"]) == expected
    assert len(report.summary["images"]) == IMAGES


def test_what_perfect_outputs_decode_to_says_what_the_options_cost(store: Store, run: str, val_set, monkeypatch):
    monkeypatch.setattr(oracle, "IMAGES", 7)
    shards = val_set(4)
    parts = list(oracle.oracle_parts(shards))
    assert [images for _, images in parts] == [4, 3]
    found = []
    for recipe in (debug(), debug().changed({"method.decode.min_stuff_area": 0.5})):
        jobs = [
            (EvalJob(recipe, store.url, run, "evaluate/x", shards.labels, shard), images) for shard, images in parts
        ]
        scores = [oracle.oracle_shard(*job) for job in jobs]
        found.append(sum(scores, oracle.OracleScore.zero(shards.labels)).summary(shards.labels))
    whole, cut = found
    assert whole["images"] == cut["images"] == 7
    assert whole["pq"]["stuff"] > 90 > cut["pq"]["stuff"]
    assert whole["pq"]["things"] == cut["pq"]["things"] > 50
