"""What every method has to do and to bear, on each of its debug recipes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from evaluation.pq import PQStats, compare, summarise
from infra.errors import TesseraError
from preprocessing.geometry import Size
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap
from tests.support.every_recipe import every_recipe
from tests.support.examples import batch_of, odd, recast, scenes, table, truth
from training.batch import Batch, Example
from training.methods import METHODS
from training.methods.base import Method
from training.methods.panoptic_deeplab.model import PanopticDeeplab
from training.recipe import Recipe

DEBUG = every_recipe("debug")
CYCLE = range(6)
"""Steps in which every task of an alternating method has its turn."""
Build = Callable[[LabelTable], Method]

BOUNDS = {PanopticDeeplab: 97}
"""PQ that decoding keeps of ideal outputs on 32 x 32 pixels, where it is not all: things whose centroids lie in
neighbouring pixels become one."""

few, many = table(2, 1), table(4, 3)
both_tables = pytest.mark.parametrize("labels", [few, many], ids=["3 categories", "7 categories"])


@pytest.fixture(params=DEBUG)
def small(request: pytest.FixtureRequest) -> Recipe:
    return request.param()


@pytest.fixture
def build(small: Recipe) -> Build:
    def built(labels: LabelTable) -> Method:
        torch.manual_seed(0)
        return small.build(labels)

    return built


def examples_for(method: Method, count: int, crowds: bool = True) -> list[Example]:
    """Synthetic scenes on the method's grid, with its categories."""
    found = (e for e in scenes(4 * count, method.grid) if crowds or not any(s.is_crowd for s in e.segments))
    return [recast(example, method.labels) for example, _ in zip(found, range(count), strict=False)]


def batch_for(method: Method, count: int = 2) -> Batch:
    return batch_of(*examples_for(method, count))


def total(method: Method, batch: Batch, step: int) -> Tensor:
    return torch.stack(list(method.losses(batch, step).values())).sum()


def train(method: Method, batch: Batch, steps: Sequence[int]) -> None:
    optimizer = torch.optim.AdamW(method.parameter_groups(3e-3, 0.0, 1.0))
    for step in steps:
        optimizer.zero_grad()
        total(method, batch, step).backward()
        optimizer.step()


def cycle(method: Method, batch: Batch) -> dict[str, float]:
    """Every loss once."""
    with torch.no_grad():
        return {name: float(v) for step in CYCLE for name, v in method.losses(batch, step).items()}


def tensors(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def assert_table_is_true(panoptic: PanopticMap, labels: LabelTable, size: Size) -> None:
    assert panoptic.size == size
    assert sorted(s.id for s in panoptic.segments) == sorted({*np.unique(panoptic.ids).tolist()} - {0})
    for segment in panoptic.segments:
        ys, xs = np.nonzero(panoptic.ids == segment.id)
        assert segment.area == len(xs)
        assert segment.box == (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)
        assert segment.is_thing == labels.is_thing[segment.category]
        assert not segment.is_crowd
        assert segment.centroid == (pytest.approx((xs.mean(), ys.mean())) if segment.is_thing else None)


def test_every_method_has_a_debug_recipe():
    assert {type(make().method) for parameter in DEBUG for make in parameter.values} == METHODS.keys()


@both_tables
def test_losses_are_float32_scalars_and_fall_together_on_two_images(build: Build, labels: LabelTable):
    method = build(labels)
    batch = batch_for(method)
    for step in CYCLE:
        assert all(v.dtype == torch.float32 and v.ndim == 0 for v in method.losses(batch, step).values())
    before = cycle(method, batch)
    train(method, batch, range(15))
    after = cycle(method, batch)
    assert before.keys() == after.keys()
    assert np.isfinite([*before.values(), *after.values()]).all()
    assert sum(after.values()) < sum(before.values())


def test_losses_stay_in_float32_under_autocast(build: Build):
    method = build(few)
    batch = batch_for(method)
    exact = cycle(method, batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = [method.losses(batch, step) for step in CYCLE]
    assert all(v.dtype == torch.float32 for losses in rounded for v in losses.values())
    assert {n: float(v) for losses in rounded for n, v in losses.items()} == pytest.approx(exact, rel=0.05, abs=0.05)


@pytest.mark.parametrize("kind", odd((32, 32)))
def test_odd_images_give_finite_losses_and_gradients_alone_and_among_others(build: Build, kind: str):
    grid = build(few).grid
    strange = recast(odd(grid)[kind], few)
    for examples in ([strange], [strange, *examples_for(build(few), 2)]):
        method = build(few)
        for step in CYCLE:
            loss = total(method, batch_of(*examples), step)
            assert loss.isfinite()
            loss.backward()
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_every_parameter_gets_a_gradient_within_a_cycle_or_in_each_step_if_nothing_alternates(build: Build):
    """DistributedDataParallel trusts `alternates`; what never gets a gradient is dead weight."""
    method = build(few)
    batch, learned = batch_for(method), set()
    for step in CYCLE:
        method.zero_grad(set_to_none=True)
        total(method, batch, step).backward()
        reached = {name for name, p in method.named_parameters() if p.grad is not None}
        learned |= {name for name, p in method.named_parameters() if name in reached and p.grad.any()}
        assert method.alternates or reached == dict(method.named_parameters()).keys()
    assert learned == {name for name, p in method.named_parameters() if p.requires_grad}


def test_parameter_groups_hold_every_parameter_once_and_decay_matrices_only(build: Build):
    method = build(few)
    groups = method.parameter_groups(1e-3, 0.05, 0.5)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in method.parameters())
    assert {g["weight_decay"] for g in groups} == {0.0, 0.05}
    for group in groups:
        assert all((p.squeeze().ndim > 1) == bool(group["weight_decay"]) for p in group["params"])


def test_layer_decay_slows_lower_layers_of_the_backbone_and_nothing_else(build: Build):
    method = build(few)
    rates = {id(p): g["lr"] for g in method.parameter_groups(1e-3, 0.05, 0.5) for p in g["params"]}
    inside = {id(p): method.backbone.layer_of(name) for name, p in method.backbone.named_parameters()}
    assert {rate for p, rate in rates.items() if p not in inside} == {1e-3}
    by_layer = {layer: {rates[p] for p in inside if inside[p] == layer} for layer in inside.values()}
    assert all(len(found) == 1 for found in by_layer.values())
    ordered = [found.pop() for _, found in sorted(by_layer.items())]
    assert ordered == sorted(set(ordered))
    assert ordered[-1] == pytest.approx(0.5e-3)
    assert {group["lr"] for group in method.parameter_groups(1e-3, 0.05, 1.0)} == {1e-3}


@both_tables
def test_maps_have_the_wanted_sizes_and_tables_true_to_the_pixels(build: Build, labels: LabelTable):
    method = build(labels).eval()
    height, width = method.grid
    sizes = [method.grid, (2 * height, 2 * width), (height - 1, width + 1), (1, 1), (1, 50), (50, 1), (100, 17), (5, 5)]
    strange = [recast(e, labels) for e in odd(method.grid).values()]
    batch = batch_of(*examples_for(method, len(sizes) - len(strange)), *strange)
    for outputs in (method.predict(batch.images_B3HW), method.ideal(batch)):
        for panoptic, size in zip(method.decode(outputs, sizes), sizes, strict=True):
            assert_table_is_true(panoptic, labels, size)


@both_tables
def test_segment_is_the_decoded_prediction(build: Build, labels: LabelTable):
    method = build(labels).eval()
    images, sizes = batch_for(method).images_B3HW, [method.grid] * 2
    for one, other in zip(method.segment(images, sizes), method.decode(method.predict(images), sizes), strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert one.segments == other.segments


@both_tables
def test_what_a_perfect_network_says_decodes_to_the_truth(build: Build, labels: LabelTable):
    method = build(labels).eval()
    examples = examples_for(method, 12, crowds=False)
    found = method.decode(method.ideal(batch_of(*examples)), [method.grid] * len(examples))
    stats = [compare(truth(e), p, len(labels), e.key) for e, p in zip(examples, found, strict=True)]
    assert {s.is_thing for e in examples for s in e.segments} == {True, False}
    pq = summarise(sum(stats, PQStats.zero(len(labels))), labels)["pq"]["all"]
    assert pq == pytest.approx(100) or pq >= BOUNDS.get(type(method), 100)


def test_ideal_outputs_have_the_shapes_of_the_networks(build: Build):
    method = build(many).eval()
    batch = batch_for(method)
    said, wanted = tensors(method.predict(batch.images_B3HW)), tensors(method.ideal(batch))
    assert [t.shape for t in said] == [t.shape for t in wanted]


def test_an_image_is_segmented_alike_alone_and_in_a_batch(build: Build):
    method = build(many).eval()
    images = batch_for(method, 3).images_B3HW
    together = method.segment(images, [method.grid] * 3)
    for i, panoptic in enumerate(together):
        (alone,) = method.segment(images[i : i + 1], [method.grid])
        assert (alone.ids != panoptic.ids).mean() < 0.01  # sums of another order break ties


def test_no_images_give_no_maps(build: Build):
    method = build(few).eval()
    outputs = method.predict(batch_for(method).images_B3HW)
    empty = outputs[:0] if isinstance(outputs, Tensor) else tuple(t[:0] for t in outputs)
    assert method.decode(empty, []) == []


def test_views_are_pictures_of_the_grid(build: Build):
    method = build(few).eval()
    batch = batch_for(method, 3)
    for outputs in (method.predict(batch.images_B3HW), method.ideal(batch)):
        views = method.views(outputs)
        assert len(views) == 3
        assert views[0]
        assert [each.keys() for each in views] == [views[0].keys()] * 3
        for picture in (picture for each in views for picture in each.values()):
            assert picture.shape == (*method.grid, 3)
            assert picture.dtype == np.uint8
    assert any((each[title] != views[0][title]).any() for each in views for title in each)


def test_loaded_weights_segment_as_the_saved_ones(build: Build):
    trained, copy = build(many), build(many)
    batch, sizes = batch_for(trained, 3), [trained.grid] * 3
    before = tensors(trained.eval().predict(batch.images_B3HW))
    train(trained.train(), batch, CYCLE)
    copy.load_state_dict(load(save({name: value.contiguous() for name, value in trained.state_dict().items()})))
    said = tensors(trained.eval().predict(batch.images_B3HW))
    assert all(torch.equal(a, b) for a, b in zip(said, tensors(copy.eval().predict(batch.images_B3HW)), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(said, before, strict=True))
    for mine, theirs in zip(trained.decode(said, sizes), copy.segment(batch.images_B3HW, sizes), strict=True):
        assert np.array_equal(mine.ids, theirs.ids)
        assert mine.segments == theirs.segments


def refused(method: Method, batch: Batch) -> bool:
    try:
        method.segment(batch.images_B3HW, [method.grid] * len(batch.keys))
    except TesseraError:
        return True
    return False


def shows(method: Method, batch: Batch) -> bool:
    """Whether decoding refuses what the network says, or the losses show what does not come out of it."""
    if all(output.isfinite().all() for output in tensors(method.predict(batch.images_B3HW))):
        return not np.isfinite([*cycle(method, batch).values()]).all()
    return refused(method, batch)


def with_first(method: Method, parameter: torch.nn.Parameter, value: float) -> Method:
    """The method with another first number in one of its parameters."""
    with torch.no_grad():
        parameter.view(-1)[0] = value
    return method


@pytest.mark.parametrize("values", [(torch.nan,), (torch.inf, -torch.inf)], ids=["nan", "inf"])
def test_no_weight_that_is_not_finite_gives_a_map_in_silence(build: Build, values: tuple[float, ...]):
    """Whichever parameter has one; an infinity that a ReLU cuts off shows with the other sign, PISR's sigmoid bears
    both."""
    method = build(few).eval()
    batch = batch_for(method, 1)
    for name, parameter in method.named_parameters():
        before = parameter.detach().clone()
        borne = ".relations.weigh." in name and torch.nan not in values
        assert borne or any(shows(with_first(method, parameter, value), batch) for value in values), name
        with torch.no_grad():
            parameter.copy_(before)
    assert not refused(method, batch)


def test_without_published_weights_in_the_recipe_none_are_loaded(build: Build, small: Recipe):
    method = build(few)
    assert small.method.backbone.weights is None
    before = {name: value.clone() for name, value in method.state_dict().items()}
    assert method.load_pretrained() is None
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_the_network_is_deterministic_and_exports(build: Build):
    """Without control flow that depends on data: torch.export would refuse it."""
    method = build(few).eval()
    images = batch_for(method).images_B3HW
    first, second = tensors(method.predict(images)), tensors(method.predict(images))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exported = torch.export.export(method.network, (images,)).module()
    with torch.no_grad():
        for made, expected in zip(tensors(exported(images)), first, strict=True):
            torch.testing.assert_close(made, expected.clone(), atol=1e-4, rtol=1e-4)


def test_output_notes_say_in_a_line_what_each_tensor_of_the_network_is(build: Build):
    """Exported files carry them, and name their outputs so."""
    method = build(few).eval()
    notes = method.output_notes
    assert len(notes) == len(tensors(method.predict(batch_for(method).images_B3HW)))
    assert all(name.isidentifier() and note.strip() and "\n" not in note for name, note in notes.items())
