"""The pass before the first step: valid at the largest shape, without a trace, and telling where it does not fit."""

import itertools
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from infra.store import Store
from preprocessing.labels import LabelTable
from preprocessing.shards import ShardSet
from preprocessing.synthetic import CATEGORIES
from tests.support.every_recipe import every_recipe
from tests.support.examples import batch_of, scenes, table
from tests.training.ranks import noisy, recipe_of, train_alone, trainer_of
from training.batch import Batch
from training.dry_run import KNOBS, DoesNotFit, keeping_buffers, largest_batch, optimizer_room, telling_knobs
from training.loop import Trainer
from training.recipe import Recipe

DEBUG = every_recipe("debug")
TABLES = {"3 categories": table(2, 1), "7 categories": table(4, 3), "things alone": table(2, 0)}
Make = Callable[[], Recipe]


def largest(recipe: Recipe, labels: LabelTable, images: int = 2) -> Batch:
    return largest_batch(images, recipe.trained, labels, recipe.method.distance_radius > 0)


@pytest.mark.parametrize("labels", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("make", DEBUG)
def test_the_largest_batch_is_one_for_every_methods_losses(make: Make, labels: LabelTable):
    recipe = make()
    method, batch = recipe.build(labels).train(), largest(recipe, labels)
    for step in range(3):
        found = method(batch, step)
        assert found
        assert all(value.isfinite() and value.ndim == 0 for value in found.values())
        torch.stack(list(found.values())).sum().backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("distances", [False, True])
def test_it_is_made_as_real_batches_are(distances: bool):
    batch, real = largest_batch(3, (32, 32), CATEGORIES, distances), batch_of(*scenes(3, (32, 32)))
    for name, value in vars(real).items():
        if not isinstance(value, Tensor):
            continue
        ours = getattr(batch, name)
        if name == "d2_BH2W" and not distances:
            assert ours is None
            continue
        assert ours.dtype == value.dtype, name
        assert ours.is_contiguous(memory_format=torch.channels_last) or value.ndim != 4 or name != "images_B3HW"
        rows = name.endswith(("_BN", "_BN2"))
        assert ours.shape == (value.shape if not rows else (3, 256, *value.shape[2:])), name
    assert batch.labels_BHW.max() == 255
    assert {*batch.category_BN.unique().tolist()} == {*range(len(CATEGORIES))}
    assert torch.equal(batch.thing_BN, torch.from_numpy(CATEGORIES.is_thing)[batch.category_BN])
    assert len(batch[1:3].keys) == 2


@pytest.mark.parametrize("make", DEBUG)
def test_nothing_is_changed_but_the_memory_held(make: Make):
    """Not the weights, the norms' statistics, the moments, nor the gradients, which are none."""
    recipe = make()
    trainer = trainer_of(replace(recipe, train=replace(recipe.train, bf16=False)), CATEGORIES, 8)
    trainer.take_step(itertools.repeat(batch_of(*scenes(4, recipe.trained))))
    trainer.optimizer.zero_grad(set_to_none=True)
    before, mode = trainer.state(), trainer.method.training
    told = trainer.dry_run()
    after = trainer.state()
    assert before is not None
    assert after is not None
    height, width = recipe.trained
    assert told.startswith(f"dry run: a pass of 4 images of {height} x {width} fits, ")
    assert all(p.grad is None for p in trainer.method.parameters())
    assert trainer.method.training is mode is True
    assert before["method"].keys() == after["method"].keys()
    assert all(torch.equal(value, after["method"][name]) for name, value in before["method"].items())
    for i, row in before["optimizer"]["state"].items():
        assert all(torch.equal(value, after["optimizer"]["state"][i][name]) for name, value in row.items())
    assert before["optimizer"]["state"].keys() == after["optimizer"]["state"].keys()
    assert after["step"] == 1
    assert not trainer.rows
    assert trainer.meter.take()[0].keys()  # of the step before


def test_statistics_of_norms_are_kept():
    module = nn.BatchNorm2d(3).train()
    with keeping_buffers(module):
        module(torch.rand(2, 3, 4, 4))
        assert module.running_mean.any()
    assert not module.running_mean.any()
    assert module.num_batches_tracked == 0


@pytest.mark.parametrize("kind", [recipe_of, lambda **options: noisy(recipe_of(**options))], ids=["plain", "noisy"])
def test_a_run_is_to_the_bit_the_one_without_it(
    images_of_16: ShardSet, shard_store: Store, kind: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
):
    """Also in several passes, with an average, and where losses draw noise."""
    recipe = kind(epochs=1.5, micro_batch=2, ema=0.5, bf16=True)
    found = train_alone(recipe, images_of_16, shard_store.url)
    monkeypatch.setattr(Trainer, "dry_run", lambda self: "none")
    expected = train_alone(recipe, images_of_16, shard_store.url)
    assert len(found.rows) == 6
    assert found.losses == expected.losses
    assert [row.grad_norm for row in found.rows] == [row.grad_norm for row in expected.rows]
    assert all(torch.equal(value, expected.weights[name]) for name, value in found.weights.items())


@pytest.mark.parametrize(
    ("micro_batch", "tasks", "expected"),
    [
        (4, "joint", [(4, 0)]),
        (3, "joint", [(2, 0)] * 2),
        (1, "joint", [(1, 0)] * 2),
        (4, "alternate", [(4, 0), (4, 1), (4, 2)]),
        (2, "alternate", [(2, s) for s in (0, 0, 1, 1, 2, 2)]),
    ],
    ids=str,
)
def test_it_is_of_a_workers_largest_pass_with_gradients_beside_it_where_there_are_more(
    micro_batch: int, tasks: str, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
):
    """For each task of an alternating method; gradients of the pass before are held in the second of a step."""
    recipe = recipe_of(micro_batch=micro_batch).changed({"method.tasks": tasks})
    share = recipe.reader.plan(4, 4).share(0, 1, micro_batch)
    trainer = Trainer(recipe, recipe.build(CATEGORIES), 8, trainer_of(recipe, CATEGORIES, 8).place, share)
    passes, held = list[tuple[int, int]](), list[bool]()
    whole = Trainer._pass

    def seen(self: Trainer, module: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        passes.append((len(batch.keys), step))
        held.append(any(p.grad is not None for p in self.method.parameters()))
        return whole(self, module, batch, step)

    monkeypatch.setattr(Trainer, "_pass", seen)
    trainer.dry_run()
    assert passes == expected
    several = len(share.passes) > 1
    assert held == [several and i % 2 == 1 for i in range(len(expected))]


def test_room_is_held_for_the_moments_that_are_still_to_come(monkeypatch: pytest.MonkeyPatch):
    """A run that goes on has them already, and fits where it fitted before."""
    trainer = trainer_of(recipe_of().changed({"method.tasks": "joint"}), CATEGORIES, 8)
    trainer.method.network.semantic_head.requires_grad_(False)
    made = list[int]()
    whole = torch.empty_like

    def seen(tensor: Tensor) -> Tensor:
        made.append(tensor.numel())
        return whole(tensor)

    monkeypatch.setattr(torch, "empty_like", seen)
    with optimizer_room(trainer.optimizer):
        assert sum(made) == 2 * sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    monkeypatch.undo()
    trainer.method.network.semantic_head.requires_grad_(True)
    trainer.take_step(itertools.repeat(batch_of(*scenes(4))))
    monkeypatch.setattr(torch, "empty_like", seen)
    made.clear()
    with optimizer_room(trainer.optimizer):
        assert not made


WITHOUT_MEMORY = """
import resource
from pathlib import Path
from preprocessing.synthetic import CATEGORIES
from tests.training.ranks import recipe_of, trainer_of
recipe = recipe_of(batch=1000, micro_batch=600).changed({"shards.grid": (64, 64)})
trainer = trainer_of(recipe, CATEGORIES, 8)
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 2**21, resource.RLIM_INFINITY))  # less than the images alone take
try:
    print(trainer.dry_run())
except Exception as error:
    print(type(error).__name__, error)
    print(type(error.__cause__).__name__)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS") or sys.platform != "linux", reason="needs Linux' limits")
def test_lack_of_memory_is_told_with_what_helps():
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said, cause = done.stdout.splitlines()
    assert said.startswith("DoesNotFit a pass of 1000 images of 64 x 64 does not fit into memory: ")
    for knob in ("train.micro_batch", "shards.grid", "reader.crop.size", "workers"):
        assert knob in said
    assert "(DefaultCPUAllocator: can't allocate memory: you tried to allocate 12288000 bytes. Error code 12" in said
    assert cause == "RuntimeError"


LACKING = {
    "a GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 8 GiB. See docs\nmore"),
        r"\(CUDA out of memory\. Tried to allocate 2\.00 GiB\)$",
    ),
    "Python": (MemoryError(), r"\(MemoryError\)$"),
    "a library": (
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        r"\(cuDNN error: CUDNN_STATUS_ALLOC_FAILED\)$",
    ),
    "the driver": (RuntimeError("CUDA error: out of memory\nCompile with"), r"\(CUDA error: out of memory\)$"),
}


@pytest.mark.parametrize(("error", "told"), LACKING.values(), ids=LACKING)
def test_it_is_told_alike_wherever_memory_lacks(error: Exception, told: str):
    with pytest.raises(DoesNotFit, match=told) as caught, telling_knobs("a pass"):
        raise error
    assert str(caught.value).startswith(f"a pass does not fit into memory: {KNOBS} (")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_pass_through(error: Exception, monkeypatch: pytest.MonkeyPatch):
    trainer = trainer_of(recipe_of(), CATEGORIES, 8)

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(Trainer, "_pass", fails)
    with pytest.raises(type(error)) as caught:
        trainer.dry_run()
    assert caught.value is error
