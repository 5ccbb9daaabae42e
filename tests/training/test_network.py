from dataclasses import replace

import pytest
import torch

from infra.errors import TesseraError
from preprocessing.shards import ShardConfig
from preprocessing.synthetic import CATEGORIES
from tests.support.examples import batch_of, scenes, table
from training.backbones import BackboneConfig, StemVitConfig, VitConfig, build_backbone
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.model import Decoder, pixel_phases, rotate
from training.methods.generalist.targets import embed_xy, omegas
from training.recipe import Recipe
from training.recipes import RECIPES, base_420, debug, demo, recipe

COCO = table(80, 53)


def small_vit(patch: int = 8, **changes) -> VitConfig:
    return VitConfig(**{"patch": patch, "width": 32, "depth": 4, "heads": 2, "layers": (1, 2, 3, 4), **changes})


def with_backbone(backbone: BackboneConfig, grid: tuple[int, int] = (32, 32), **options) -> Recipe:
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


@pytest.mark.parametrize(
    ("backbone", "grid"),
    [
        (small_vit(4), (16, 24)),
        (small_vit(8), (32, 40)),
        (small_vit(14), (56, 56)),
        (small_vit(16), (64, 48)),
        (StemVitConfig(widths=(8, 16, 16, 32), depth=1), (32, 48)),
        (StemVitConfig(widths=(8, 16), depth=1), (10, 14)),
    ],
    ids=["patch 4", "patch 8", "patch 14", "patch 16", "stem", "short stem"],
)
def test_the_decoder_reaches_the_size_of_the_input(backbone: BackboneConfig, grid: tuple[int, int]):
    """At the latest in its fourth step; for patch 14 that is 16 / 14 of the size, resized at the end."""
    encoder = build_backbone(backbone, grid)
    made = Decoder(encoder, (16,) * 5)(encoder(torch.zeros(1, 3, *grid))).shape[-2:]
    assert made[0] >= grid[0]
    assert made[1] >= grid[1]
    images = torch.zeros(2, 3, *grid, dtype=torch.uint8)
    logits, embedding = with_backbone(backbone, grid).build(CATEGORIES).network(images)
    assert logits.shape == (2, len(CATEGORIES), *grid)
    assert embedding.shape == (2, 16, *grid)


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_is_in_one_group(name: str):
    with torch.device("meta"):
        method = recipe(name).build(COCO)
    groups = method.parameter_groups(1e-3, 0.05)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters())
    assert all(group["lr"] > 0 and group["weight_decay"] >= 0 for group in groups)
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    assert all(p.squeeze().ndim > 1 for p in decayed)


@pytest.mark.parametrize(
    "built",
    [*(recipe(name) for name in ("debug", "demo")), with_backbone(small_vit(), tasks="joint")],
    ids=["debug", "demo", "a plain ViT, both tasks"],
)
def test_every_step_reaches_every_parameter_unless_the_method_alternates(built: Recipe):
    """Otherwise DistributedDataParallel, which trusts `alternates`, fails in its second step."""
    method = built.build(CATEGORIES)
    sum(method.losses(batch_of(*scenes(2, built.shards.grid)), 0).values()).backward()
    left_out = [name for name, p in method.named_parameters() if p.grad is None]
    assert method.alternates or not left_out, left_out


@pytest.mark.parametrize("name", ["debug", "demo"])
def test_the_network_is_deterministic_and_exports(name: str):
    torch.manual_seed(0)
    method = recipe(name).build(CATEGORIES).eval()
    images = batch_of(*scenes(2, method.grid)).images_B3HW
    with torch.inference_mode():
        first, second = method.network(images), method.network(images)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exported = torch.export.export(method.network, (images,)).module()
    with torch.no_grad():
        for made, expected in zip(exported(images), first, strict=True):
            torch.testing.assert_close(made, expected.clone(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["debug", "demo"])
def test_a_head_that_is_not_asked_for_is_not_computed(name: str):
    method = recipe(name).build(CATEGORIES).eval()
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


@pytest.mark.parametrize(
    ("backbone", "grid", "told"),
    [
        (small_vit(14), (32, 32), "multiple of the patch or stride 14"),
        (small_vit(16), (8, 8), "multiple of the patch or stride 16"),
        (StemVitConfig(), (64, 60), "multiple of the patch or stride 8"),
        (small_vit(layers=(1, 2, 3, 5)), (32, 32), r"\(1, 2, 3, 5\) are not in 1..4"),
        (small_vit(layers=(0, 2, 3, 4)), (32, 32), r"\(0, 2, 3, 4\) are not in 1..4"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused(backbone: BackboneConfig, grid: tuple[int, int], told: str):
    with pytest.raises(TesseraError, match=told):
        build_backbone(backbone, grid)


def test_a_recipe_that_needs_longer_distances_than_its_shards_have_is_refused():
    assert replace(demo(), method=replace(demo().method, eds_distance=8.0)).method.eds_radius == 20
    with pytest.raises(TesseraError, match=r"distances up to 20.25 px.*exact up to 20"):
        replace(demo(), method=replace(demo().method, eds_distance=8.1))


def test_a_recipe_without_a_grid_is_refused():
    with pytest.raises(TesseraError, match="one grid"):
        replace(demo(), shards=ShardConfig(radius=20))


@pytest.mark.parametrize("change", [{"frequencies": 0}, {"eds_min": -0.1}, {"eds_min": 1.1}, {"eds_distance": -1.0}])
def test_options_out_of_range_are_refused(change: dict):
    with pytest.raises(TesseraError, match="generalist"):
        GeneralistConfig(**change)
