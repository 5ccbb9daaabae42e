"""The network of Panoptic-DeepLab and PISR on it, and the dilated ResNet."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional

from infra.errors import TesseraError
from preprocessing.synthetic import CATEGORIES
from training.backbones import AnyBackboneConfig, LiteConfig, PyramidConfig, StemVitConfig, build_backbone
from training.methods.panoptic_deeplab.config import PanopticDeeplabConfig
from training.methods.panoptic_deeplab.model import Network, instance_heat
from training.parts.pisr import PisrConfig

STEM = StemVitConfig(widths=(8, 16, 16, 32), depth=1, heads=2)
DILATED = PyramidConfig(dilations=(2, 4, 8))
PISR = PisrConfig(instances=5, channels=16)
BACKBONES: dict[str, tuple[AnyBackboneConfig, tuple[int, ...]]] = {
    "stem": (STEM, (4, 2)),
    "stem, one skip": (STEM, (4,)),
    "lite": (LiteConfig(weights=None), (16, 8, 4, 2)),
    "resnet": (PyramidConfig(), (8, 4)),
    "resnet, top skip": (PyramidConfig(), (32, 16)),
    "dilated": (DILATED, (8, 4)),
    "dilated, top skip": (DILATED, (16, 8)),
}
each_backbone = pytest.mark.parametrize(("backbone", "skips"), BACKBONES.values(), ids=BACKBONES)
both = pytest.mark.parametrize("pisr", [None, PISR], ids=["alone", "pisr"])


def config_of(backbone: AnyBackboneConfig = STEM, skips: tuple[int, ...] = (4, 2), **options: Any):
    small: dict[str, Any] = {
        "context_channels": 16,
        "semantic_channels": 16,
        "instance_channels": 16,
        "context_rates": (1, 2),
    }
    return PanopticDeeplabConfig(
        backbone=backbone, skip_strides=skips, skip_channels=(16,) * len(skips), **small | options
    )


def network_of(grid: tuple[int, int] = (32, 48), device: str = "cpu", **options: Any) -> Network:
    """In evaluation, with heads that say something: they begin near 0."""
    torch.manual_seed(0)
    with torch.device(device):
        network = Network(config_of(**options), CATEGORIES, grid).eval()
    for name, parameter in network.named_parameters():
        if "heads." in name and parameter.shape[-2:] == (1, 1) and len(parameter) in (1, 2, len(CATEGORIES)):
            torch.nn.init.normal_(parameter, std=0.5)
    return network


def images_of(count: int = 2, size: tuple[int, int] = (32, 48)) -> Tensor:
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


@both
@each_backbone
def test_outputs_have_the_size_of_the_images(
    backbone: AnyBackboneConfig, skips: tuple[int, ...], pisr: PisrConfig | None
):
    """torch.device("meta") loses torch.linspace once `transformers` loaded weights: the stem is small anyway."""
    device = "cpu" if backbone is STEM else "meta"
    network = network_of((64, 96), device, backbone=backbone, skips=skips, pisr=pisr)
    images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8, device=device)
    for first in (False, True):
        outputs = network(images, first=first)
        triple = [(2, len(CATEGORIES), 64, 96), (2, 1, 64, 96), (2, 2, 64, 96)]
        assert [tuple(t.shape) for t in outputs] == triple * (2 if first and pisr else 1)
        assert {t.dtype for t in outputs} == {torch.float32}


def unit(state: dict[str, Tensor], name: str, x: Tensor, dilation: int = 1) -> Tensor:
    """Convolution, within channels where its kernel has one, group norm with groups of 16, ReLU."""
    weight = state[f"{name}.0.weight"]
    within = x.shape[1] if weight.shape[1] == 1 else 1
    y = functional.conv2d(x, weight, None, 1, dilation * (weight.shape[-1] // 2), dilation, within)
    return functional.group_norm(y, len(weight) // 16, state[f"{name}.1.weight"], state[f"{name}.1.bias"]).relu()


def test_a_decoder_is_context_at_the_top_and_then_the_skips_one_by_one():
    """DeepLab's architecture by hand, but for the backbone."""
    network, images = network_of(context_rates=(1, 3)), images_of()
    state = network.semantic.state_dict()
    with torch.no_grad():
        features = network.backbone(images)
        top, found = features[3], network.semantic(features)
        reaches = [(f"context.branches.{i}", rate) for i, rate in ((1, 1), (2, 3))]
        parts = [unit(state, f"{name}.1", unit(state, f"{name}.0", top, rate)) for name, rate in reaches]
        whole = unit(state, "context.whole", top.mean((2, 3), keepdim=True)).expand(-1, -1, *top.shape[2:])
        parts = [unit(state, "context.branches.0", top), *parts, whole]
        x = unit(state, "context.project.0", torch.cat(parts, 1))
        for i, skip in enumerate((features[2], features[1])):
            x = functional.interpolate(x, skip.shape[2:], mode="bilinear")
            x = torch.cat([unit(state, f"projections.{i}", skip), x], 1)
            x = unit(state, f"fusions.{i}.1", unit(state, f"fusions.{i}.0", x))
    assert found.shape == (2, 16, 16, 24)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


def constant(head: torch.nn.Sequential, *values: float) -> None:
    """Let a head say the same everywhere."""
    with torch.no_grad():
        head[-1].weight.zero_()  # type: ignore[operator]
        head[-1].bias.copy_(torch.tensor(values))  # type: ignore[operator]


@both
@pytest.mark.parametrize(
    ("backbone", "skips"),
    [(STEM, (4, 2)), (STEM, (4,)), (STEM, (2, 1)), (LiteConfig(weights=None), (16, 8)), (DILATED, (16, 8))],
    ids=["2", "4", "1", "8, lite", "8, dilated"],
)
def test_offsets_grow_with_the_stride_of_the_heads_and_scores_do_not(
    backbone: AnyBackboneConfig, skips: tuple[int, ...], pisr: PisrConfig | None
):
    network = network_of((32, 64), backbone=backbone, skips=skips, pisr=pisr)
    constant(network.heads.offset, 1.5, -0.25)
    constant(network.heads.heat, 0.75)
    if pisr is not None:
        constant(network.final_heads.offset, 3.0, 7.0)
        constant(network.final_heads.heat, 0.5)
    with torch.no_grad():
        outputs = network(images_of(1, (32, 64)), first=True)
    said = [(torch.tensor([1.5, -0.25]), 0.75)]
    if pisr is not None:
        said.insert(0, (torch.tensor([3.0, 7.0]), 0.5))
    for i, (offset, score) in enumerate(said):
        torch.testing.assert_close(outputs[3 * i + 2], (skips[-1] * offset).view(1, 2, 1, 1).expand(1, 2, 32, 64))
        torch.testing.assert_close(outputs[3 * i + 1], torch.full((1, 1, 32, 64), score))


def test_the_final_predictions_stand_before_the_first_ones():
    network, images = network_of(pisr=PISR), images_of()
    plain = network_of()
    kept = {n: t for n, t in network.state_dict().items() if not n.startswith(("relations.", "final_heads."))}
    plain.load_state_dict(kept)
    with torch.no_grad():
        final, six, base = network(images), network(images, first=True), plain(images, first=True)
    assert (len(final), len(six), len(base)) == (3, 6, 3)
    for i in range(3):
        assert torch.equal(final[i], six[i])
        torch.testing.assert_close(six[3 + i], base[i])
        assert (six[i] - six[3 + i]).abs().max() > 0.01


@both
def test_images_of_a_batch_do_not_see_each_other_even_in_training(pisr: PisrConfig | None):
    network, images = network_of(pisr=pisr, dropout=0.0).train(), images_of(3)
    together = network(images, first=True)
    for b in range(3):
        for alone, among in zip(network(images[b : b + 1], first=True), together, strict=True):
            torch.testing.assert_close(alone[0], among[b], atol=1e-4, rtol=1e-4)


def test_things_and_stuff_tell_pisr_which_instances_there_are():
    """Where nothing is a thing, centres and offsets have no part in the final predictions."""
    network, images = network_of(pisr=PISR), images_of()
    outputs = []
    for category in (0, len(CATEGORIES) - 1):
        constant(network.heads.classes, *(100.0 if c == category else 0.0 for c in range(len(CATEGORIES))))
        for offset in (0.0, 1.0):
            constant(network.heads.offset, offset, offset)
            with torch.no_grad():
                outputs.append(network(images)[0])
    assert not torch.allclose(outputs[0], outputs[1])
    assert torch.equal(outputs[2], outputs[3])


def slow_instance_heat(heat: np.ndarray, offset: np.ndarray, thing: np.ndarray, count: int, reach: float) -> np.ndarray:
    """Of one image, (K, H, W): centres are the best of those scores that are the highest of 3 x 3."""
    height, width = heat.shape
    peaks = [
        (-heat[y, x], y, x)
        for y, x in np.ndindex(heat.shape)
        if heat[y, x] == heat[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].max()
    ]
    result = np.zeros((count, height, width))
    for k, (_, v, u) in enumerate(sorted(peaks)[:count]):
        for y, x in np.ndindex(heat.shape):
            away = math.hypot(y + offset[0, y, x] - v, x + offset[1, y, x] - u)
            result[k, y, x] = max(0.0, 1 - away / reach) * thing[y, x]
    return result


def pisr_config(instances: int, reach: float = 3.0) -> PanopticDeeplabConfig:
    """reach: in pixels of the heads' stride, 2."""
    return config_of(pisr=PisrConfig(instances=instances, channels=16), heat_reach=2 * reach)


def scores(images: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores that all differ, offsets, probabilities of things."""
    generator = torch.Generator().manual_seed(3)
    order = [torch.randperm(size[0] * size[1], generator=generator) for _ in range(images)]
    heat = torch.stack(order).view(images, 1, *size) / (size[0] * size[1]) - 0.3
    offset = 2 * torch.randn(images, 2, *size, generator=generator)
    return heat, offset, torch.rand(images, 1, *size, generator=generator)


@pytest.mark.parametrize("size", [(12, 17), (17, 12), (12, 3)], ids=str)
@pytest.mark.parametrize("reach", [1.5, 6.0, 30.0])
def test_instance_heat_equals_its_slow_definition(size: tuple[int, int], reach: float):
    heat, offset, thing = scores(3, size)
    found = instance_heat(heat, offset, thing, pisr_config(3, reach))
    assert found.dtype == torch.float32
    for b in range(3):
        scores_HW, offset_2HW, thing_HW = (t[b].double().numpy() for t in (heat[:, 0], offset, thing[:, 0]))
        expected = slow_instance_heat(scores_HW, offset_2HW, thing_HW, 3, reach)
        np.testing.assert_allclose(found[b], expected, atol=2e-3)  # of the 1e-6 under the root
        assert (expected > 0).any((1, 2)).all()


def test_a_map_of_fewer_pixels_than_instances_has_empty_maps_at_the_end():
    heat, offset, thing = scores(2, (2, 3))
    offset.zero_()
    found = instance_heat(heat, offset, thing.fill_(1), pisr_config(9))
    assert found.shape == (2, 9, 2, 3)
    assert (found[:, 0] > 0).any()
    assert not found[:, 6:].any()
    best = found[:, 0].flatten(1).argmax(1)
    assert torch.equal(best, heat.flatten(1).argmax(1))


def test_where_there_are_fewer_peaks_than_instances_the_other_maps_are_empty():
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    heat = torch.exp(-((y - 2) ** 2 + (x - 3) ** 2) / 8)[None, None]
    found = instance_heat(heat, torch.zeros(1, 2, 6, 7), torch.ones(1, 1, 6, 7), pisr_config(4))
    assert found[0, 0].argmax() == 2 * 7 + 3
    assert not found[0, 1:].any()


def test_instance_heat_has_finite_gradients_where_a_pixel_points_at_its_centre():
    heat, offset, thing = scores(1, (4, 5))
    offset = offset.zero_().requires_grad_()
    thing.requires_grad_()
    instance_heat(heat, offset, thing, pisr_config(3)).sum().backward()
    for given in (offset, thing):
        assert given.grad is not None
        assert given.grad.isfinite().all()
        assert given.grad.any()


@pytest.mark.parametrize(
    ("backbone", "skips", "lacking"),
    [(STEM, (32, 4), 32), (STEM, (8, 3), 3), (PyramidConfig(), (8, 2), 2), (DILATED, (32, 4), 32)],
    ids=str,
)
def test_a_skip_stride_that_the_backbone_lacks_is_refused_by_name(
    backbone: AnyBackboneConfig, skips: tuple[int, ...], lacking: int
):
    with pytest.raises(TesseraError, match=rf"panoptic_deeplab: .*strides \(.*\), not at {lacking}$"):
        network_of((32, 32), "cpu" if backbone is STEM else "meta", backbone=backbone, skips=skips)


def resnets(dilations: tuple[int, ...], grid: tuple[int, int]) -> tuple[Any, Any]:
    """A plain and a dilated one of the same weights."""
    plain, dilated = (build_backbone(PyramidConfig(dilations=d), grid).eval() for d in ((), dilations))
    dilated.load_state_dict(plain.state_dict())  # refuses other names and shapes
    return plain, dilated


def test_a_dilated_resnet_says_between_what_the_plain_one_says():
    """With dilations 1, 2, 2 each block sees the pixels that it sees in the plain one, and those between as well."""
    plain, dilated = (network.double() for network in resnets((1, 2, 2), (96, 128)))
    images = images_of(1, (96, 128)).double()
    with torch.no_grad():
        coarse, fine = plain(images), dilated(images)
    assert (plain.strides, dilated.strides) == ((4, 8, 16, 32), (4, 8, 16, 16))
    for expected, found in zip(coarse[:3], fine[:3], strict=True):
        assert torch.equal(expected, found)
    assert fine[3].shape == (1, 2048, 6, 8)
    torch.testing.assert_close(fine[3][..., ::2, ::2], coarse[3], atol=1e-9, rtol=1e-9)
    assert not torch.allclose(fine[3][..., 1::2, 1::2], coarse[3], atol=1e-2)


@pytest.mark.parametrize("dilations", [(1, 1, 1), (2, 4, 8)], ids=str)
def test_each_block_of_a_dilated_stage_looks_as_far_as_it_is_told(dilations: tuple[int, ...]):
    """The stage by hand, with the plain one's weights."""
    plain, dilated = resnets(dilations, (32, 32))
    x = torch.randn(1, 1024, 10, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = dilated.net.encoder.stages[-1](x)
        for block, dilation in zip(plain.net.encoder.stages[-1].layers, dilations, strict=True):
            (narrow, n), (wide, w), (last, e) = ((b.convolution.weight, b.normalization) for b in block.layer)
            y = n(functional.conv2d(x, narrow)).relu()
            y = w(functional.conv2d(y, wide, padding=dilation, dilation=dilation)).relu()
            y, beside = e(functional.conv2d(y, last)), block.shortcut
            if not isinstance(beside, torch.nn.Identity):
                x = beside.normalization(functional.conv2d(x, beside.convolution.weight))
            x = (y + x).relu()
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


def test_a_dilated_resnet_takes_grids_of_16():
    with torch.device("meta"):
        features = build_backbone(DILATED, (48, 80))(torch.zeros(1, 3, 48, 80))
    assert [tuple(f.shape[2:]) for f in features] == [(12, 20), (6, 10), (3, 5), (3, 5)]
    with pytest.raises(TesseraError, match="16"):
        build_backbone(DILATED, (48, 72))


def test_the_top_of_a_decoder_is_the_last_feature_of_the_coarsest_stride():
    """Of a dilated ResNet two have stride 16: the skip is the first, the context the second."""
    network = network_of((32, 32), "meta", backbone=DILATED, skips=(16, 4))
    assert network.semantic.used == network.instance.used == [3, 2, 0]


@pytest.mark.parametrize("backbone", [LiteConfig(weights=None), DILATED], ids=["lite", "dilated"])
def test_a_network_made_for_crops_runs_on_whole_frames(backbone: AnyBackboneConfig):
    for_crops, for_frames = (network_of(grid, backbone=backbone, skips=(8, 4)) for grid in ((32, 32), (64, 96)))
    for_frames.load_state_dict(for_crops.state_dict())
    images = images_of(1, (64, 96))
    with torch.no_grad():
        for found, expected in zip(for_crops(images), for_frames(images), strict=True):
            assert found.shape[2:] == (64, 96)
            assert torch.equal(found, expected)


def compiled(network: Network, first: bool) -> Callable[[Tensor], tuple[Tensor, ...]]:
    made = torch.compile(network, backend="aot_eager", fullgraph=True)
    return lambda images: made(images, first=first)


def exported(network: Network, first: bool) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """With any number of images."""
    with torch.no_grad():
        shapes = ({0: Dim("batch", min=1)}, None)
        made = torch.export.export(network, (images_of(2), first), dynamic_shapes=shapes).module()
    return lambda images: made(images, first)


@pytest.mark.parametrize(
    ("way", "pisr", "first"),
    [
        pytest.param(compiled, None, False, marks=pytest.mark.slow),
        (compiled, PISR, True),
        pytest.param(exported, None, False, marks=pytest.mark.slow),
        (exported, PISR, True),
    ],
    ids=["compiled, alone", "compiled, pisr", "exported, alone", "exported, pisr"],
)
def test_a_graph_of_the_network_computes_the_same(way: Callable, pisr: PisrConfig | None, first: bool):
    network = network_of(pisr=pisr)
    graph = way(network, first)
    with torch.no_grad():
        for count in (2, 1, 3) if way is exported else (2,):  # torch.compile begins anew with another count
            expected = network(images_of(count), first=first)
            assert len(expected) == (6 if first else 3)
            for made, wanted in zip(graph(images_of(count)), expected, strict=True):
                torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)
