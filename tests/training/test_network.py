from dataclasses import replace

import pytest
import torch

from infra.errors import TesseraError
from preprocessing.shards import ShardConfig
from preprocessing.synthetic import CATEGORIES
from tests.support.examples import batch_of, scenes, table
from training.backbones import AnyBackboneConfig, LiteConfig, PyramidConfig, StemVitConfig, VitConfig, build_backbone
from training.methods.base import Method
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.model import Decoder, pixel_phases, pixel_shares, rotate, shift
from training.methods.generalist.targets import embed_xy, omegas
from training.recipe import Recipe
from training.recipes.generalist import base_420, debug, demo

COCO = table(80, 53)


def small_vit(patch: int = 8, **changes) -> VitConfig:
    return VitConfig(**{"patch": patch, "width": 32, "depth": 4, "heads": 2, "layers": (1, 2, 3, 4), **changes})


def with_backbone(backbone: AnyBackboneConfig, grid: tuple[int, int] = (32, 32), **options) -> Recipe:
    base = debug()
    return replace(
        base,
        method=replace(base.method, backbone=backbone, **options),
        shards=replace(base.shards, grid=grid),
    )


def parameters(built: Recipe) -> float:
    with torch.device("meta"):
        return sum(p.numel() for p in built.build(COCO).parameters())


@pytest.mark.parametrize("half", [False, True], ids=["full", "half"])
@pytest.mark.parametrize("frequencies", [1, 3, 4, 5])
class TestRelativeHead:
    grid = (6, 11)

    def relative(self, config: GeneralistConfig, centroids_N2: torch.Tensor) -> torch.Tensor:
        """Embeddings of centroid - pixel, (N, E, H, W), in float64 throughout."""
        height, width = self.grid
        y_HW, x_HW = torch.meshgrid(
            (2 * torch.arange(height) + 1).double() / height - 1,
            (2 * torch.arange(width) + 1).double() / width - 1,
            indexing="ij",
        )
        offsets = centroids_N2[:, None, None] - torch.stack([x_HW, y_HW], -1)
        return embed_xy(offsets, omegas(config)).permute(0, 3, 1, 2)

    def test_a_rotated_offset_is_the_centroid(self, frequencies: int, half: bool):
        config = GeneralistConfig(frequencies=frequencies, half_period=half)
        centroids_N2 = torch.rand(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        phases = pixel_phases(self.grid, omegas(config))
        turned = rotate(self.relative(config, centroids_N2).float(), phases)
        expected = embed_xy(centroids_N2, omegas(config)).float()[..., None, None].expand_as(turned)
        torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)

    def test_rotation_keeps_norms_and_zero(self, frequencies: int, half: bool):
        config = GeneralistConfig(frequencies=frequencies, half_period=half)
        phases = pixel_phases(self.grid, omegas(config))
        embedding = torch.randn(2, 4 * frequencies, *self.grid)
        torch.testing.assert_close(rotate(embedding, phases).norm(dim=1), embedding.norm(dim=1))
        assert not rotate(0 * embedding, phases).any()


def test_a_shifted_offset_is_the_centroid_and_zero_stays_zero():
    shares = pixel_shares((2, 4))
    assert shares[:, 1, 2].tolist() == [2.5 / 4, 1.5 / 2]
    code = torch.tensor([0.3, 0.9, 1.0], dtype=torch.float64).view(1, 3, 1, 1)
    relative = torch.cat([code[:, :2] - shares, torch.ones(1, 1, 2, 4)], 1)
    torch.testing.assert_close(shift(relative, shares), code.expand(1, 3, 2, 4))
    assert not shift(0 * relative, shares).any()


@pytest.mark.parametrize(
    ("backbone", "grid"),
    [
        (small_vit(4), (16, 24)),
        (small_vit(8), (32, 40)),
        (small_vit(14), (56, 56)),
        (small_vit(16), (64, 48)),
        (StemVitConfig(widths=(8, 16, 16, 32), depth=1), (32, 48)),
        (StemVitConfig(widths=(8, 16), depth=1), (10, 14)),
        (PyramidConfig(name="resnet-50"), (32, 64)),
        (PyramidConfig(name="swin-tiny"), (64, 32)),
        (PyramidConfig(name="pvt-v2-b0"), (64, 96)),
        (LiteConfig(weights=None), (64, 96)),
    ],
    ids=["patch 4", "patch 8", "patch 14", "patch 16", "stem", "short stem", "resnet", "swin", "pvt", "lite"],
)
def test_the_decoder_reaches_the_size_of_the_input(backbone: AnyBackboneConfig, grid: tuple[int, int]):
    """Its four steps multiply sizes by 16: stride 32 ends at half, patch 14 beyond the size; a resize does the rest."""
    encoder = build_backbone(backbone, grid)
    made = Decoder(encoder, (16,) * 5)(encoder(torch.zeros(1, 3, *grid))).shape[-2:]
    assert all(m == side // 2 if backbone.stride == 32 else m >= side for m, side in zip(made, grid, strict=True))
    images = torch.zeros(2, 3, *grid, dtype=torch.uint8)
    logits, embedding = with_backbone(backbone, grid).build(CATEGORIES).network(images)
    assert logits.shape == (2, len(CATEGORIES), *grid)
    assert embedding.shape == (2, 16, *grid)


@pytest.mark.parametrize(
    "backbone",
    [
        small_vit(),
        StemVitConfig(),
        PyramidConfig(name="resnet-50"),
        PyramidConfig(name="swin-tiny"),
        PyramidConfig(name="pvt-v2-b0"),
        LiteConfig(weights=None),
    ],
    ids=["vit", "stem", "resnet", "swin", "pvt", "lite"],
)
def test_a_step_of_both_tasks_reaches_every_parameter_of_every_backbone(backbone: AnyBackboneConfig):
    """Otherwise DistributedDataParallel, which trusts `alternates`, fails in its second step."""
    grid = (64, 96)
    method = with_backbone(backbone, grid, tasks="joint").build(CATEGORIES)
    sum(method.losses(batch_of(*scenes(2, grid)), 0).values()).backward()
    assert not method.alternates
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("base", [debug(), demo()], ids=lambda base: base.name)
def test_a_head_that_is_not_asked_for_is_not_computed(base: Recipe):
    method = base.build(CATEGORIES).eval()
    images = batch_of(*scenes(1, method.grid)).images_B3HW
    with torch.inference_mode():
        logits, embedding = method.network(images)
        for found, expected in (
            (method.network(images, True, False), (logits, None)),
            (method.network(images, False, True), (None, embedding)),
        ):
            for made, wanted in zip(found, expected, strict=True):
                assert made.numel() == 0 if wanted is None else torch.equal(made, wanted)


def test_the_papers_base_has_the_papers_size():
    assert parameters(base_420()) == pytest.approx(91.9e6, rel=0.015)


def test_the_papers_large_has_the_papers_size():
    large = VitConfig(width=1024, depth=24, heads=16, layers=(5, 12, 18, 24))
    assert parameters(replace(base_420(), method=GeneralistConfig(backbone=large))) == pytest.approx(310e6, rel=0.015)


def test_a_recipe_that_needs_longer_distances_than_its_shards_have_is_refused():
    assert replace(demo(), method=replace(demo().method, eds_distance=8.0)).method.distance_radius == 20
    with pytest.raises(TesseraError, match=r"distances up to 20.25 px.*exact up to 20"):
        replace(demo(), method=replace(demo().method, eds_distance=8.1))


def test_a_recipe_without_a_grid_is_refused():
    with pytest.raises(TesseraError, match="one grid"):
        replace(demo(), shards=ShardConfig(radius=20))


ABLATIONS = {
    "as it is": {},
    "direct": {"encoding": "direct"},
    "classes": {"encoding": "classes"},
    "one class": {"encoding": "classes", "cells": 1},
    "few classes": {"encoding": "classes", "cells": 10},
    **{f"{n} frequencies": {"frequencies": n} for n in (1, 2, 3, 5, 6)},
    "half period": {"half_period": True},
    "relative": {"relative": True},
    "relative, direct": {"relative": True, "encoding": "direct"},
    "relative, half period": {"relative": True, "half_period": True, "frequencies": 3},
    "squared": {"squared": True},
    "no EDS": {"eds_distance": 0.0},
    "another D": {"eds_distance": 2.0},
    "w_min": {"eds_min": 0.3},
    "all edges": {"boundaries": "panoptic"},
    "void left out": {"void_kept": False},
    "no Dice": {"dice": 0.0},
    "no variation": {"total_variation": 0.0},
    "joint tasks": {"tasks": "joint"},
    "direct, squared, void left out": {"encoding": "direct", "squared": True, "void_kept": False},
    "classes, void left out": {"encoding": "classes", "void_kept": False},
    "classes, no Dice, no variation": {"encoding": "classes", "dice": 0.0, "total_variation": 0.0},
    "all of ours": {"relative": True, "half_period": True, "squared": True, "dice": 0.0, "tasks": "joint"},
}
"""Options of the debug recipe's method."""
each_ablation = pytest.mark.parametrize("change", ABLATIONS.values(), ids=ABLATIONS)
ENCODINGS = pytest.mark.parametrize("encoding", ["embedding", "direct", "classes"])


def built(change: dict) -> Method:
    torch.manual_seed(0)
    return replace(debug(), method=replace(debug().method, **change)).build(CATEGORIES)


@each_ablation
def test_an_ablation_trains_both_tasks_and_decodes(change: dict):
    method, batch = built(change), batch_of(*scenes(2))
    optimizer = torch.optim.AdamW(method.parameter_groups(1e-3, 0.05, 0.9))
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    for step in (1, 2):  # instance, semantic
        optimizer.zero_grad()
        total = torch.stack(list(method.losses(batch, step).values())).sum()
        total.backward()
        assert total.isfinite()
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
        optimizer.step()
    assert [name for name, p in method.named_parameters() if torch.equal(p, before[name])] == []
    sizes = [(32, 32), (45, 80)]
    for outputs in (method.eval().predict(batch.images_B3HW), method.ideal(batch)):
        maps = method.decode(outputs, sizes)
        assert [panoptic.size for panoptic in maps] == sizes
        assert len(method.views(outputs)) == 2
    assert any(s.is_thing for panoptic in maps for s in panoptic.segments)


@pytest.mark.parametrize("change", [c for c in ABLATIONS.values() if c], ids=[n for n, c in ABLATIONS.items() if c])
def test_no_option_is_without_effect(change: dict):
    def losses(method: Method) -> dict[str, float]:
        with torch.no_grad():
            return {f"{n} {step}": float(v) for step in (1, 2) for n, v in method.losses(batch, step).items()}

    batch = batch_of(*scenes(2))
    for i, option in enumerate(change):  # each of them, given the others
        others = {name: value for j, (name, value) in enumerate(change.items()) if i != j}
        if "encoding" not in others and option != "encoding":
            assert losses(built(change)) != losses(built(others)), option
    assert losses(built(change)) != losses(built({}))


@ENCODINGS
def test_squared_makes_a_difference_or_is_refused(encoding: str):
    """As do the other options that are of no use to some encodings."""
    batch, said = batch_of(*scenes(2)), []
    try:
        for squared in (False, True):
            with torch.no_grad():
                losses = built({"encoding": encoding, "squared": squared}).losses(batch, 1)
            said.append({name: float(v) for name, v in losses.items()})
    except TesseraError:
        return
    assert said[0] != said[1]


@ENCODINGS
def test_the_network_exports_with_any_encoding(encoding: str):
    method = built({"encoding": encoding}).eval()
    images = batch_of(*scenes(2)).images_B3HW
    exported = torch.export.export(method.network, (images,)).module()
    with torch.no_grad():
        for made, expected in zip(exported(images), method.network(images), strict=True):
            torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


def test_the_network_of_a_convolutional_stem_and_a_relative_head_exports():
    method = demo().build(CATEGORIES).eval()
    images = batch_of(*scenes(1, method.grid)).images_B3HW
    exported = torch.export.export(method.network, (images,)).module()
    with torch.no_grad():
        for made, expected in zip(exported(images), method.network(images), strict=True):
            torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"frequencies": 0},
        {"cells": 0},
        {"eds_min": -0.1},
        {"eds_min": 1.1},
        {"eds_distance": -1.0},
        {"total_variation": -0.1},
        {"dice": -1.0},
        {"encoding": "direct", "half_period": True},
        {"encoding": "classes", "relative": True},
        {"encoding": "classes", "half_period": True},
    ],
    ids=str,
)
def test_options_out_of_range_or_against_each_other_are_refused(change: dict):
    with pytest.raises(TesseraError, match="generalist"):
        GeneralistConfig(**change)


def test_a_grid_of_another_size_than_the_networks_buffers_is_refused_or_served():
    """The relative head and the convolutional stem know their grid; a plain ViT takes any multiple of its patch."""
    images = torch.zeros(1, 3, 48, 64, dtype=torch.uint8)
    assert built({}).network(images)[0].shape == (1, len(CATEGORIES), 48, 64)
    for method in (built({"relative": True}), demo().build(CATEGORIES)):
        with pytest.raises(RuntimeError):
            method.network(images)
