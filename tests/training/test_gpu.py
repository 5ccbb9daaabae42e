"""What only a GPU can show: `python -m pytest -m gpu`."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from evaluation.pq import PQStats, compare, summarise
from preprocessing.synthetic import CATEGORIES
from tests.support.examples import batch_of, scenes, table, truth
from training.batch import Batch
from training.dry_run import DoesNotFit
from training.loop import Trainer
from training.parallel import Place
from training.recipe import Recipe
from training.recipes.generalist import base_420, debug, demo
from training.shares import Plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = Place(device=torch.device("cuda"))
COCO = table(80, 53)


@pytest.fixture
def strict() -> Iterator[None]:
    """Every wait of the host for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def steps(recipe: Recipe, batch: Batch, count: int) -> Trainer:
    images = len(batch.keys)
    recipe = replace(recipe, train=replace(recipe.train, batch=images))
    trainer = Trainer(recipe, recipe.build(COCO), 100, GPU, Plan(images, 1, 1).share(0, 1, images))
    for _ in range(count):
        trainer.take_step(itertools.repeat(batch))
    return trainer


def test_the_host_does_not_wait_within_a_step(strict):
    small = debug()
    batch = batch_of(*scenes(2, (32, 32))).pin_memory()
    assert steps(small, batch, 7).step == 7


def test_the_papers_model_takes_finite_steps():
    recipe = base_420().changed({"method.backbone.weights": None})
    run = steps(recipe, batch_of(*scenes(2, (420, 420))), 3)
    row, _ = run.row(100, False)
    assert row.step == 3
    assert 0 < row.memory_gib < 80
    assert all(p.isfinite().all() for p in run.method.parameters())


@pytest.mark.parametrize("make", [debug, demo], ids=lambda make: make.__name__)
def test_ideal_outputs_decode_alike_on_both_devices_and_keep_pq_99(make: Callable[[], Recipe]):
    method, examples = make().build(CATEGORIES), scenes(16, make().shards.grid)
    batch, sizes = batch_of(*examples), [example.labels_HW.shape for example in examples]
    here = method.decode(method.ideal(batch), sizes)
    there = method.decode(method.ideal(batch.to(GPU.device)), sizes)
    assert all((a.ids == b.ids).all() and a.segments == b.segments for a, b in zip(here, there, strict=True))
    stats = PQStats.zero(len(CATEGORIES))
    for example, found in zip(examples, there, strict=True):
        stats += compare(truth(example), found, len(CATEGORIES))
    assert summarise(stats, CATEGORIES)["pq"]["all"] >= 99


def test_a_pass_that_does_not_fit_is_told_with_what_helps():
    recipe = base_420().changed({"method.backbone.weights": None})
    torch.cuda.set_per_process_memory_fraction(0.05)
    try:
        trainer = Trainer(recipe, recipe.build(COCO), 100, GPU, Plan(256, 1, 1).share(0, 1, 256))
        with pytest.raises(DoesNotFit, match=r"256 images of 420 x 420 .* train\.micro_batch"):
            trainer.dry_run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
