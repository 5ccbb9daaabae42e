"""What only a GPU can show: `python -m pytest -m gpu`."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from evaluation.pq import PQStats, compare, summarise
from preprocessing.synthetic import CATEGORIES
from tests.support.examples import batch_of, scenes, table, truth
from training.batch import Batch
from training.loop import Place, _Guard, _Meter, _Run, _step
from training.recipe import Recipe
from training.recipes.generalist import base_420, debug, demo

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = Place(device=torch.device("cuda"))
COCO = table(80, 53)


@pytest.fixture
def strict() -> Iterator[None]:
    """Every wait of the host for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def steps(recipe: Recipe, batch: Batch, count: int) -> _Run:
    method = recipe.build(COCO).to("cuda").to(memory_format=torch.channels_last)
    run, meter, guard = _Run(method, recipe.train, 100), _Meter(), _Guard(GPU.device)
    for _ in range(count):
        _step(run, method, itertools.repeat(batch), 1, GPU, meter, guard)
    return run


def test_the_host_does_not_wait_within_a_step(strict):
    small = debug()
    batch = batch_of(*scenes(2, (32, 32))).pin_memory()
    assert steps(small, batch, 7).step == 7


def test_the_papers_model_takes_finite_steps():
    recipe = base_420().changed({"method.backbone.weights": None})
    run = steps(recipe, batch_of(*scenes(2, (420, 420))), 3)
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
