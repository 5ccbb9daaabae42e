"""What every method has to bear, beyond test_method_contract.py."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap
from tests.support.examples import batch_of, odd, recast, scenes, table
from training.batch import Batch
from training.methods import METHODS
from training.methods.base import Method
from training.recipes import RECIPES

SIZE = (32, 32)
CYCLE = 6
"""Steps after which every task of an alternating method has had its turn."""
Build = Callable[[LabelTable], Method]


@pytest.fixture(params=METHODS, ids=lambda config: config.__name__)
def build(request: pytest.FixtureRequest) -> Build:
    (small,) = (made for r in RECIPES.values() if type((made := r()).method) is request.param and made.name == "debug")

    def built(labels: LabelTable) -> Method:
        torch.manual_seed(0)
        return small.build(labels)

    return built


def batch_for(labels: LabelTable, count: int = 2) -> Batch:
    return batch_of(*(recast(example, labels) for example in scenes(count, SIZE)))


def cycle(method: Method, batch: Batch) -> dict[str, float]:
    """Every loss once."""
    with torch.no_grad():
        return {name: float(v) for step in range(CYCLE) for name, v in method.losses(batch, step).items()}


def stepped(method: Method, batch: Batch, step: int) -> Tensor:
    total = torch.stack(list(method.losses(batch, step).values())).sum()
    total.backward()
    return total.detach()


def consistent(panoptic: PanopticMap, labels: LabelTable, size: tuple[int, int]) -> bool:
    ids, areas = np.unique(panoptic.ids, return_counts=True)
    counted = dict(zip(ids.tolist(), areas.tolist(), strict=True))
    counted.pop(0, None)
    told = {s.id: s.area for s in panoptic.segments}
    kinds = all(labels.is_thing[s.category] == s.is_thing for s in panoptic.segments)
    return panoptic.size == size and counted == told and len(told) == len(panoptic.segments) and kinds


@pytest.mark.parametrize("labels", [table(2, 1), table(4, 3)], ids=["3 categories", "7 categories"])
def test_all_losses_together_fall_within_15_steps(build: Build, labels: LabelTable):
    method, batch = build(labels), batch_for(labels)
    optimizer = torch.optim.AdamW(method.parameter_groups(3e-3, 0.0))
    before = cycle(method, batch)
    for step in range(15):
        optimizer.zero_grad()
        assert stepped(method, batch, step).isfinite()
        optimizer.step()
    after = cycle(method, batch)
    assert before.keys() == after.keys()
    assert sum(after.values()) < sum(before.values())


@pytest.mark.parametrize("kind", odd(SIZE))
def test_odd_images_give_finite_losses_alone_and_among_others(build: Build, kind: str):
    labels = table(2, 1)
    strange, usual = recast(odd(SIZE)[kind], labels), [recast(e, labels) for e in scenes(2, SIZE)]
    for examples in ([strange], [strange, *usual]):
        method = build(labels)
        for step in range(CYCLE):
            assert stepped(method, batch_of(*examples), step).isfinite()
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_every_parameter_learns_within_a_cycle(build: Build):
    labels = table(2, 1)
    method = build(labels)
    for step in range(CYCLE):
        stepped(method, batch_for(labels), step)
    assert [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("labels", [table(2, 1), table(4, 3)], ids=["3 categories", "7 categories"])
def test_maps_have_the_wanted_sizes_and_a_table_true_to_the_pixels(build: Build, labels: LabelTable):
    images = batch_of(*scenes(4, SIZE), *odd(SIZE).values()).images_B3HW
    sizes = [(1, 1), (1, 50), (50, 1), (31, 33), (32, 32), (64, 64), (100, 17), (5, 5), (200, 300)]
    method = build(labels).eval()
    found = method.segment(images, sizes)
    assert [consistent(p, labels, size) for p, size in zip(found, sizes, strict=True)] == [True] * len(sizes)


def test_an_image_is_segmented_alike_alone_and_in_a_batch(build: Build):
    images = batch_of(*scenes(3, SIZE)).images_B3HW
    method = build(table(4, 3)).eval()
    together = method.segment(images, [SIZE] * 3)
    for i, panoptic in enumerate(together):
        (alone,) = method.segment(images[i : i + 1], [SIZE])
        assert (alone.ids != panoptic.ids).mean() < 0.01  # sums of another order break ties


def test_loaded_weights_segment_as_the_saved_ones(build: Build):
    labels, images = table(4, 3), batch_of(*scenes(3, SIZE)).images_B3HW
    trained, copy = build(labels), build(labels)
    optimizer = torch.optim.AdamW(trained.parameter_groups(3e-3, 0.0))
    for step in range(CYCLE):
        stepped(trained, batch_for(labels), step)
        optimizer.step()
    state: dict[str, Any] = {name: value.clone() for name, value in trained.state_dict().items()}
    copy.load_state_dict(state)
    for mine, theirs in zip(*(m.eval().segment(images, [SIZE] * 3) for m in (trained, copy)), strict=True):
        assert np.array_equal(mine.ids, theirs.ids)
        assert mine.segments == theirs.segments
