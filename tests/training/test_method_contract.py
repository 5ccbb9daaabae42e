"""What every method has to do, on its debug recipe."""

import io

import numpy as np
import pytest
import torch

from preprocessing.labels import Category, LabelTable
from preprocessing.panoptic_map import Segment
from tests.support.scenes import example, scene_batch
from training.batch import collate
from training.methods import METHODS
from training.recipes import RECIPES

TINY = {type(r().method): r for r in RECIPES.values() if r.__name__.startswith("debug")}
SIZE = (32, 32)


def table(things, stuff):
    kinds = [True] * things + [False] * stuff
    return LabelTable(tuple(Category(10 + 3 * i, f"c{i}", k, (i, i, i)) for i, k in enumerate(kinds)))


@pytest.fixture(params=METHODS, ids=lambda config: config.__name__)
def build(request):
    torch.manual_seed(0)
    recipe = TINY[request.param]()
    return lambda labels: recipe.build(labels)


def total(losses):
    return torch.stack(list(losses.values())).sum()


def test_every_method_has_a_debug_recipe():
    assert TINY.keys() == METHODS.keys()


def test_losses_are_finite_and_fall_on_two_images(build):
    method, batch = build(table(4, 3)), scene_batch([1, 2])
    optimizer = torch.optim.AdamW(method.parameter_groups(2e-3, 0.0))
    history = []
    for step in range(60):
        losses = method.losses(batch, step)
        assert all(value.dtype == torch.float32 and value.ndim == 0 for value in losses.values())
        assert torch.isfinite(total(losses))
        optimizer.zero_grad()
        total(losses).backward()
        optimizer.step()
        history.append(losses)
    for name in history[0] | history[1] | history[2]:
        seen = [float(losses[name].detach()) for losses in history if name in losses]
        if name in ("semantic", "instance"):
            assert np.mean(seen[-5:]) < np.mean(seen[:5]), name


@pytest.mark.parametrize(("things", "stuff"), [(1, 2), (4, 3)])
def test_segments_are_disjoint_and_the_table_says_what_the_pixels_say(build, things, stuff):
    labels = table(things, stuff)
    method = build(labels).eval()
    images = torch.randint(0, 256, (3, 3, *SIZE), dtype=torch.uint8)
    sizes = [(32, 32), (45, 80), (7, 5)]
    for panoptic, size in zip(method.segment(images, sizes), sizes, strict=True):
        assert panoptic.size == size
        areas = dict(zip(*np.unique(panoptic.ids, return_counts=True), strict=True))
        areas.pop(0, None)
        assert {s.id: s.area for s in panoptic.segments} == areas
        assert all(s.is_thing == labels.is_thing[s.category] for s in panoptic.segments)


def test_weights_survive_a_round_trip_through_a_file(build):
    labels = table(2, 1)
    method, copy = build(labels).eval(), build(labels).eval()
    buffer = io.BytesIO()
    torch.save(method.state_dict(), buffer)
    copy.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    image = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)
    with torch.inference_mode():
        for mine, theirs in zip(method.network(image), copy.network(image), strict=True):
            assert torch.equal(mine, theirs)


def square(labels_HW, label, side):
    labels_HW[:side, :side] = label
    return labels_HW


EMPTY = np.zeros(SIZE, np.uint16)
HARD = {
    "only void": (EMPTY, []),
    "only stuff": (EMPTY + 1, [Segment(0, 2, False)]),
    "only a crowd": (EMPTY + 1, [Segment(0, 0, True, True)]),
    "one pixel": (square(EMPTY + 1, 2, 1), [Segment(0, 2, False), Segment(0, 1, True)]),
    "one thing is all": (EMPTY + 1, [Segment(0, 0, True)]),
}


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("hard", HARD)
def test_losses_and_gradients_are_finite_on(build, hard, step):
    method = build(table(2, 1))
    batch = collate([example(*HARD[hard])])
    loss = total(method.losses(batch, step))
    loss.backward()
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    assert torch.isfinite(loss)
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)


def test_parameter_groups_hold_every_parameter_once(build):
    method = build(table(2, 1))
    grouped = [p for group in method.parameter_groups(1e-3, 0.1) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in method.parameters() if p.requires_grad}


def test_views_are_pictures_of_the_grid(build):
    (views,) = build(table(2, 1)).eval().views(torch.zeros(1, 3, *SIZE, dtype=torch.uint8))
    assert views
    assert all(picture.shape == (*SIZE, 3) and picture.dtype == np.uint8 for picture in views.values())
