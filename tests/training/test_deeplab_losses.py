"""Losses of Panoptic-DeepLab, against loops over pixels in plain Python floats."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from preprocessing.synthetic import CATEGORIES
from tests.support.examples import STUFF, THING, batch_of, in_double, odd, of_all_kinds, scenes, whole
from training.batch import VOID, Batch, Example
from training.methods.base import Method
from training.methods.panoptic_deeplab.config import PanopticDeeplabConfig
from training.methods.panoptic_deeplab.loss import class_loss, heat_loss, losses, offset_loss
from training.methods.panoptic_deeplab.targets import Targets, targets
from training.parts.pisr import PisrConfig
from training.recipes.panoptic_deeplab import debug, debug_pisr

CONFIG = PanopticDeeplabConfig(sigma=2.0, small_area=40, hardest=0.3)
MIXED = [*scenes(3, (16, 16)), of_all_kinds((16, 16)), whole(STUFF, (16, 16)), whole(None, (16, 16))]
ODD = [(size, name) for size in ((1, 1), (1, 7), (9, 12)) for name in odd(size)]
SHARES = [1.0, 0.999, 0.5, 0.2, 0.01, 1e-9]


class Case:
    """A batch's targets and random predictions."""

    def __init__(self, *examples: Example, config: PanopticDeeplabConfig = CONFIG, double: bool = False) -> None:
        self.config = config
        self.batch = in_double(batch_of(*examples)) if double else batch_of(*examples)
        found, self.dtype = targets(self.batch, config), torch.float64 if double else torch.float32
        parts = {f.name: getattr(found, f.name) for f in fields(found)}
        self.targets = Targets(**{n: t.to(self.dtype) if t.is_floating_point() else t for n, t in parts.items()})
        images, height, width = self.targets.classes_BHW.shape
        generator = torch.Generator().manual_seed(1)
        self.logits, self.heat, self.offset = (
            torch.randn(images, count, height, width, generator=generator, dtype=self.dtype)
            for count in (len(CATEGORIES), 1, 2)
        )

    @property
    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.logits, self.heat, self.offset

    def losses(self) -> dict[str, Tensor]:
        return losses(*self.outputs, self.targets, self.config)

    def part(self, images: slice) -> "Case":
        """Some images of the batch."""
        part = object.__new__(Case)
        part.config = self.config
        part.targets = Targets(**{name: value[images] for name, value in vars(self.targets).items()})
        part.logits, part.heat, part.offset = (output[images] for output in self.outputs)
        return part


def slow_losses(case: Case) -> dict[str, float]:
    """Each image alone, pixel by pixel; then the mean of the images."""
    wanted, config = case.targets, case.config
    logits, heat, offset = (output.detach().double().numpy() for output in case.outputs)
    sums = {"semantic": 0.0, "centres": 0.0, "offsets": 0.0}
    images = len(logits)
    for b in range(images):
        hard, centres, known, ways, things = [], 0.0, 0, 0.0, 0
        for y, x in np.ndindex(logits.shape[2:]):
            category = int(wanted.classes_BHW[b, y, x])
            shifted = [math.exp(v - logits[b, :, y, x].max()) for v in logits[b, :, y, x]]
            surprise = 0.0 if category == VOID else -math.log(shifted[category] / sum(shifted))
            hard.append(float(wanted.class_weight_BHW[b, y, x]) * surprise)
            if wanted.heat_weight_BHW[b, y, x]:
                known, centres = known + 1, centres + (heat[b, 0, y, x] - float(wanted.heat_BHW[b, y, x])) ** 2
            if wanted.offset_weight_BHW[b, y, x]:
                things += 1
                ways += sum(abs(offset[b, axis, y, x] - float(wanted.offset_B2HW[b, axis, y, x])) for axis in (0, 1))
        kept = sorted(hard, reverse=True)[: max(1, int(config.hardest * len(hard)))]
        sums["semantic"] += sum(kept) / len(kept) / images
        sums["centres"] += config.centre_weight * centres / max(1, known) / images
        sums["offsets"] += config.offset_weight * ways / max(1, things) / images
    return sums


def test_the_mixed_batch_has_everything_that_losses_tell_apart():
    case = Case(*MIXED)
    assert set(case.targets.class_weight_BHW.unique().tolist()) == {0, 1, 3}
    assert case.batch.crowd_BN.any()
    assert [bool(image.any()) for image in case.targets.offset_weight_BHW] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("hardest", SHARES)
def test_losses_equal_their_slow_definitions(hardest: float):
    config = replace(CONFIG, hardest=hardest, centre_weight=7.0, offset_weight=0.3)
    for case in (Case(*MIXED, config=config), Case(*MIXED, config=config, double=True)):
        found, slow = case.losses(), slow_losses(case)
        assert found.keys() == slow.keys()
        for name, value in slow.items():
            assert float(found[name]) == pytest.approx(value, rel=1e-5), name
            assert value > 0.1, name
            assert found[name].dtype == case.dtype


@pytest.mark.parametrize(("size", "name"), ODD, ids=str)
def test_losses_of_odd_images_equal_their_slow_definitions(size: tuple[int, int], name: str):
    for hardest in SHARES:
        case = Case(odd(size)[name], config=replace(CONFIG, hardest=hardest), double=True)
        assert {n: float(v) for n, v in case.losses().items()} == pytest.approx(slow_losses(case), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("hardest", SHARES)
def test_losses_and_gradients_do_not_depend_on_how_a_batch_is_split(hardest: float):
    """Whatever its images hold: parts count as much as they have images."""
    case = Case(*MIXED, config=replace(CONFIG, hardest=hardest), double=True)
    for output in case.outputs:
        output.requires_grad_()

    def gradients(of: dict[str, Tensor], share: float) -> list[Tensor]:
        return list(torch.autograd.grad(share * sum(of.values(), torch.zeros(())), case.outputs))

    expected, expected_gradients = case.losses(), gradients(case.losses(), 1.0)
    for cuts in ((0, 1, 2, 3, 4, 5, 6), (0, 2, 6), (0, 5, 6)):
        parts = [case.part(slice(i, j)) for i, j in pairwise(cuts)]
        shares = [(j - i) / 6 for i, j in pairwise(cuts)]
        for name, value in expected.items():
            mean = sum(share * part.losses()[name].item() for share, part in zip(shares, parts, strict=True))
            assert mean == pytest.approx(value.item(), rel=1e-12), name
        found = [gradients(part.losses(), share) for share, part in zip(shares, parts, strict=True)]
        for i, gradient in enumerate(expected_gradients):
            torch.testing.assert_close(sum(each[i] for each in found), gradient, atol=1e-12, rtol=1e-12)


def fixed(weights: list[float], wanted: list[int] | None = None) -> Targets:
    """An image of one row with these weights in the semantic loss."""
    zero = torch.zeros(1, 1, len(weights))
    classes = torch.tensor([[wanted or [0] * len(weights)]])
    weight = torch.tensor([[weights]])
    return Targets(classes, weight, zero, zero, zero.expand(1, 2, -1, -1), zero)


@pytest.mark.parametrize(
    ("hardest", "expected"),
    [(0.1, 3.0), (0.2, 3.0), (0.39, 3.0), (0.4, 2.0), (0.6, 5 / 3), (0.8, 5 / 4), (0.999, 5 / 4), (1.0, 1.0)],
)
def test_the_hardest_share_of_equal_pixels_is_as_large_as_it_is_told(hardest: float, expected: float):
    """Weights tell pixels of the same logits apart; two are tied, one is void."""
    wanted = fixed([3.0, 1.0, 1.0, 0.0, 0.0], [0, 1, 0, VOID, 1])
    assert float(class_loss(torch.zeros(1, 2, 1, 5), wanted, hardest)) == pytest.approx(expected * math.log(2))


@pytest.mark.parametrize("pixels", [1, 2, 3, 4])
def test_of_fewer_pixels_than_the_share_makes_one_the_worst_counts(pixels: int):
    wanted = fixed([float(i + 1) for i in range(pixels)])
    assert float(class_loss(torch.zeros(1, 2, 1, pixels), wanted, 0.2)) == pytest.approx(pixels * math.log(2))


def test_the_hardest_pixels_are_those_of_each_image():
    """A batch's would all lie in the harder image."""
    logits = torch.zeros(2, 2, 2, 2)
    logits[0, 0] = 9
    wanted = replace(fixed([1.0]), classes_BHW=torch.tensor([[[0, 0], [0, 1]], [[0, 0], [1, 1]]]))
    wanted = replace(wanted, class_weight_BHW=torch.ones(2, 2, 2))
    assert float(class_loss(logits, wanted, 0.25)) == pytest.approx((9 + math.log(2)) / 2, abs=1e-3)


def test_only_the_hardest_pixels_have_a_gradient():
    case = Case(*MIXED[:4], config=CONFIG)
    case.logits.requires_grad_()
    case.losses()["semantic"].backward()
    assert case.logits.grad is not None
    touched_BHW = case.logits.grad.abs().sum(1) > 0
    assert touched_BHW.sum((1, 2)).tolist() == [int(0.3 * 256)] * 4


def test_pixels_without_weight_have_no_gradient():
    case = Case(*MIXED, config=replace(CONFIG, hardest=1.0))
    for output in case.outputs:
        output.requires_grad_()
    torch.stack([*case.losses().values()]).sum().backward()
    found = [output.grad.abs().sum(1) > 0 for output in case.outputs if output.grad is not None]
    kinds = ("class_weight_BHW", "heat_weight_BHW", "offset_weight_BHW")
    for touched_BHW, name in zip(found, kinds, strict=True):
        assert torch.equal(touched_BHW, getattr(case.targets, name) > 0), name
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("hardest", [1.0, 0.2])
def test_an_image_of_void_costs_nothing_and_has_finite_gradients(hardest: float):
    case = Case(whole(None, (5, 6)), config=replace(CONFIG, hardest=hardest))
    for output in case.outputs:
        output.requires_grad_()
    total = torch.stack([*case.losses().values()]).sum()
    total.backward()
    assert total.item() == 0
    assert all(output.grad is not None and not output.grad.any() for output in case.outputs)


def test_an_image_without_things_halves_the_offset_loss_of_another():
    """It counts as an image without error."""
    offset = torch.full((2, 2, 9, 12), 3.0)
    thing, sky = odd((9, 12))["only a thing"], odd((9, 12))["only stuff"]
    alone = offset_loss(offset[:1], targets(batch_of(thing), CONFIG))
    both = offset_loss(offset, targets(batch_of(thing, sky), CONFIG))
    assert float(both) == pytest.approx(float(alone) / 2)
    assert float(offset_loss(offset[:1], targets(batch_of(sky), CONFIG))) == 0


def test_offsets_cost_the_sum_of_both_axes_and_centres_the_square():
    wanted = targets(batch_of(whole(THING, (3, 4))), CONFIG)
    away = wanted.offset_B2HW + torch.tensor([3.0, -4.0]).view(1, 2, 1, 1)
    assert float(offset_loss(away, wanted)) == pytest.approx(7)
    assert float(heat_loss(wanted.heat_BHW[:, None] - 3, wanted)) == pytest.approx(9)


def test_each_weight_scales_its_own_loss():
    base = replace(CONFIG, centre_weight=1.0, offset_weight=1.0)
    before = Case(*MIXED, config=base).losses()
    for option, name in {"centre_weight": "centres", "offset_weight": "offsets"}.items():
        for factor in (0.0, 4.0):
            change: dict[str, Any] = {option: factor}
            after = Case(*MIXED, config=replace(base, **change)).losses()
            scaled = {n: float(v) * (factor if n == name else 1) for n, v in before.items()}
            assert {n: float(v) for n, v in after.items()} == pytest.approx(scaled)


@pytest.mark.parametrize("hardest", [1.0, 0.3])
def test_gradients_are_those_of_the_function(hardest: float):
    examples = [e for size in ((3, 4),) for e in odd(size).values()]
    case = Case(*examples, config=replace(CONFIG, hardest=hardest), double=True)

    def of(logits: Tensor, heat: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        return tuple(losses(logits, heat, offset, case.targets, case.config).values())

    assert torch.autograd.gradcheck(of, tuple(output.requires_grad_() for output in case.outputs))


def build(pisr: PisrConfig | None = None) -> Method:
    torch.manual_seed(0)
    method = replace(debug().method, pisr=pisr)  # type: ignore[call-arg]
    return replace(debug(), method=method).build(CATEGORIES)


def test_what_a_perfect_network_says_costs_hardly_anything():
    """Without crowds, whose peaks a network is never shown though they reach beyond them."""
    examples = [e for e in scenes(12) if not any(s.is_crowd for s in e.segments)] + [whole(None, (32, 32))]
    batch, method = batch_of(*examples), build()
    assert len(examples) > 4
    logits, heat, offset = method.ideal(batch)
    found = losses(logits, heat, offset, targets(batch, method.config), method.config)
    assert 0 < found["semantic"] < 0.002
    assert found["centres"] == found["offsets"] == 0
    worse = losses(logits, heat + 0.1, offset + 1, targets(batch, method.config), method.config)
    assert worse["centres"] > 1
    assert worse["offsets"] > 0.1


class Says(torch.nn.Module):
    """A network that says the same of every batch."""

    def __init__(self, outputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images_B3HW: Tensor, first: bool = False) -> tuple[Tensor, ...]:
        return self.outputs if first else self.outputs[:3]


def six(batch: Batch) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    counts = (len(CATEGORIES), 1, 2) * 2
    return tuple(torch.randn(len(batch.keys), c, 32, 32, generator=generator).bfloat16() for c in counts)


@pytest.mark.parametrize("intermediate", [0.0, 0.25, 2.0])
def test_the_first_predictions_of_pisr_weigh_intermediate(intermediate: float):
    method = build(PisrConfig(instances=3, channels=16, intermediate=intermediate))
    batch = batch_of(*scenes(2))
    outputs = six(batch)
    method.network = Says(outputs)
    wanted, config = targets(batch, method.config), method.config
    a, b, c, *before = (output.float() for output in outputs)
    final, first = losses(a, b, c, wanted, config), losses(before[0], before[1], before[2], wanted, config)
    expected = {n: float(v) for n, v in final.items()}
    expected |= {f"{n}_first": intermediate * float(v) for n, v in first.items()}
    found = method.losses(batch, 0)
    assert {n: float(v) for n, v in found.items()} == pytest.approx(expected)
    assert all(v.dtype == torch.float32 for v in found.values())
    assert all(float(final[n]) != float(first[n]) for n in final)


@pytest.mark.parametrize("recipe", [debug, debug_pisr], ids=lambda recipe: recipe.__name__)
def test_losses_of_the_method_are_those_of_its_networks_outputs(recipe: Callable):
    torch.manual_seed(0)
    method, batch = recipe().build(CATEGORIES).eval(), batch_of(*scenes(2))
    outputs = method.network(batch.images_B3HW, first=True)
    logits, heat, offset = outputs[:3]
    final = losses(logits, heat, offset, targets(batch, method.config), method.config)
    found = method.losses(batch, 3)
    assert len(found) == len(outputs)
    for name, value in final.items():
        torch.testing.assert_close(found[name], value)
