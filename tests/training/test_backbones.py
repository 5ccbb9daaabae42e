import re
from collections import OrderedDict
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from infra.errors import TesseraError
from training.backbones import AnyBackboneConfig, LiteConfig, PyramidConfig, StemVitConfig, VitConfig, build_backbone
from training.backbones.base import Backbone

GRID = (64, 96)


def small_vit(**options: Any) -> VitConfig:
    return VitConfig(**{"patch": 8, "width": 32, "depth": 4, "heads": 2, "layers": (1, 2, 3, 4), **options})


PYRAMIDS = ["resnet-50", "swin-tiny", "swin-base", "pvt-v2-b0", "pvt-v2-b2", "pvt-v2-b5"]
CONFIGS = {
    "vit": small_vit(),
    "vit of patch 16": small_vit(patch=16, depth=6, layers=(2, 3, 5, 6)),
    **{name: PyramidConfig(name=name) for name in PYRAMIDS},  # type: ignore[arg-type]
    "lite": LiteConfig(weights=None),
    "stem": StemVitConfig(),
    "short stem": StemVitConfig(widths=(8, 16), depth=1),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
KINDS = {name: config for name, config in CONFIGS.items() if name not in ("swin-base", "pvt-v2-b2", "pvt-v2-b5")}
each_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
NORMED = {"resnet": PyramidConfig(name="resnet-50", weights="somewhere"), "lite": LiteConfig(weights="somewhere")}


def without_memory(config: AnyBackboneConfig, grid: tuple[int, int] = GRID) -> Backbone:
    """But for our own, which is small: torch.device() loses torch.linspace once `transformers` loaded weights."""
    with torch.device("cpu" if isinstance(config, StemVitConfig) else "meta"):
        return build_backbone(config, grid)


def blank(backbone: Backbone, *size: int) -> torch.Tensor:
    return torch.zeros(2, 3, *size, device=backbone.mean_1311.device)


class TestFeatures:
    @every_config
    @pytest.mark.parametrize("grid", [GRID, (64, 32)], ids=str)
    def test_have_the_channels_and_strides_that_are_told(self, config: AnyBackboneConfig, grid: tuple[int, int]):
        backbone = without_memory(config, grid)
        made = backbone(blank(backbone, *grid))
        told = [(2, c, grid[0] // s, grid[1] // s) for c, s in zip(backbone.channels, backbone.strides, strict=True)]
        assert [tuple(feature.shape) for feature in made] == told

    @each_kind
    def test_of_uint8_are_those_of_float(self, config: AnyBackboneConfig):
        backbone = build_backbone(config, GRID).eval()
        images = torch.randint(0, 256, (1, 3, *GRID), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for one, other in zip(backbone(images), backbone(images.float()), strict=True):
                assert torch.equal(one, other)
                assert one.isfinite().all()

    @pytest.mark.parametrize(
        ("config", "grid", "told"),
        [
            (small_vit(patch=14), (32, 32), "multiple of the patch or stride 14"),
            (small_vit(patch=16), (8, 8), "multiple of the patch or stride 16"),
            (small_vit(patch=16), (0, 16), "multiple of the patch or stride 16"),
            (small_vit(patch=16), (-16, 16), "multiple of the patch or stride 16"),
            (PyramidConfig(), (16, 16), r"grid \(16, 16\) .* stride 32"),
            (PyramidConfig(name="swin-tiny"), (64, 60), r"grid \(64, 60\) .* stride 32"),
            (LiteConfig(), (48, 64), r"grid \(48, 64\) .* stride 32"),
            (StemVitConfig(), (64, 60), "multiple of the patch or stride 8"),
            (small_vit(layers=(1, 2, 3, 5)), (32, 32), r"\(1, 2, 3, 5\) are not in 1..4"),
            (small_vit(layers=(0, 2, 3, 4)), (32, 32), r"\(0, 2, 3, 4\) are not in 1..4"),
            (small_vit(layers=(2, 2, 3, 4)), (32, 32), r"\(2, 2, 3, 4\)"),
            (small_vit(layers=(4, 3, 2, 1)), (32, 32), r"\(4, 3, 2, 1\)"),
            (small_vit(heads=5), (32, 32), "5"),
            (StemVitConfig(heads=5), (32, 32), "5"),
        ],
    )
    def test_are_refused_for_what_does_not_fit(self, config: AnyBackboneConfig, grid: tuple[int, int], told: str):
        with pytest.raises(TesseraError, match=told):
            build_backbone(config, grid)


class TestLayers:
    @every_config
    def test_are_all_there_and_none_beyond(self, config: AnyBackboneConfig):
        backbone = without_memory(config)
        found = {backbone.layer_of(name) for name, _ in backbone.named_parameters()}
        assert found | {0} == set(range(backbone.depth + 1))

    @every_config
    def test_are_one_to_a_block_or_stage_and_0_is_what_comes_before(self, config: AnyBackboneConfig):
        backbone, blocks = without_memory(config), {}
        for name, _ in backbone.named_parameters():
            if found := re.search(r"(?:layer|layers|stages|blocks)\.\d+\.", name):
                blocks.setdefault(found[0], set()).add(backbone.layer_of(name))
        assert sorted(layer for found in blocks.values() for layer in found) == [*range(1, backbone.depth + 1)]
        assert len(blocks) == backbone.depth

    @every_config
    def test_rise_in_the_order_of_computation(self, config: AnyBackboneConfig):
        """But for norms of a stage's output, which the library applies at the end."""
        backbone, order = without_memory(config), []
        owners = {name: module for name, module in backbone.named_modules() if [*module.parameters(recurse=False)]}
        for name, module in owners.items():
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        backbone(blank(backbone, *GRID))
        used = [name for name in OrderedDict.fromkeys(order) if "hidden_states_norms" not in name]
        layers = [backbone.layer_of(f"{name}.{p}") for name in used for p, _ in owners[name].named_parameters()]
        assert layers == sorted(layers)
        assert len(used) > 4

    @each_kind
    def test_beneath_a_feature_are_no_higher_than_it(self, config: AnyBackboneConfig):
        """What the first feature depends on lies beneath what only a later one does; tokens' positions lie lowest."""
        backbone = build_backbone(config, GRID)
        features, parameters = backbone(torch.rand(1, 3, *GRID) * 255), dict(backbone.named_parameters())
        reached = []
        for feature in features:
            found = torch.autograd.grad(
                feature.square().sum(), parameters.values(), retain_graph=True, allow_unused=True
            )
            reached.append({name for name, g in zip(parameters, found, strict=True) if g is not None})
        common = set.intersection(*reached)
        for shallow, deep in pairwise(reached):
            own = [backbone.layer_of(name) for name in shallow - common]
            new = [backbone.layer_of(name) for name in deep - shallow - {"position"}]
            assert max(own, default=0) <= min(new, default=backbone.depth)
        assert set.union(*reached) == parameters.keys(), "these never learn, and DistributedDataParallel stops at them"


class TestNorms:
    @staticmethod
    def moved(config: AnyBackboneConfig) -> list[str]:
        """The running statistics that a training step changes."""
        torch.manual_seed(0)
        backbone = build_backbone(config, (64, 64))
        whole = nn.Sequential(backbone).eval().train()
        before = {name: value.clone() for name, value in backbone.named_buffers() if "running" in name}
        optimizer = torch.optim.SGD(whole.parameters(), 1e-3)
        sum(feature.square().mean() for feature in whole(torch.rand(2, 3, 64, 64) * 255)).backward()
        optimizer.step()
        assert before
        return [name for name, value in backbone.named_buffers() if name in before and not value.equal(before[name])]

    @pytest.mark.parametrize("config", NORMED.values(), ids=NORMED)
    def test_keep_published_statistics_in_training(self, config: AnyBackboneConfig):
        assert self.moved(config) == []

    @pytest.mark.parametrize("config", [PyramidConfig(), LiteConfig(weights=None)], ids=NORMED)
    def test_gather_their_own_statistics_from_scratch(self, config: AnyBackboneConfig):
        assert len(self.moved(config)) > 50

    @pytest.mark.parametrize("config", NORMED.values(), ids=NORMED)
    def test_learn_scale_and_shift_although_their_statistics_are_kept(self, config: AnyBackboneConfig):
        backbone = build_backbone(config, (64, 64)).train()
        assert all(parameter.requires_grad for parameter in backbone.parameters())
        assert backbone.training
