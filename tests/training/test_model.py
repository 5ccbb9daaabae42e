"""Sizes and shapes of the generalist network."""

from dataclasses import replace

import pytest
import torch

from infra.errors import TesseraError
from preprocessing.labels import Category, LabelTable
from training.backbones import StemVitConfig, VitConfig
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.model import Network
from training.recipes import RECIPES, base_420, debug

COCO = LabelTable(tuple(Category(i, str(i), i < 80, (0, 0, 0)) for i in range(133)))
LARGE = VitConfig(width=1024, depth=24, heads=16, layers=(5, 12, 18, 24))


@pytest.mark.parametrize(("backbone", "millions"), [(VitConfig(), 91.9), (LARGE, 310.0)], ids=["Base", "Large"])
def test_parameters_are_the_papers(backbone, millions):
    recipe = replace(base_420(), method=replace(base_420().method, backbone=backbone))
    with torch.device("meta"):
        method = recipe.build(COCO)
    assert sum(p.numel() for p in method.parameters()) / 1e6 == pytest.approx(millions, rel=0.015)


@pytest.mark.parametrize("patch", [4, 8, 14, 16])
def test_outputs_have_the_images_size_for_any_patch(patch):
    backbone = VitConfig(patch=patch, width=16, depth=4, heads=2, layers=(1, 2, 3, 4))
    config = GeneralistConfig(backbone=backbone, decoder_widths=(8, 8, 8, 8, 8))
    size = (patch * 3, patch * 2)
    logits, embedding = Network(config, 5, size).eval()(torch.zeros(2, 3, *size))
    assert logits.shape == (2, 5, *size)
    assert embedding.shape == (2, 16, *size)


@pytest.mark.parametrize("name", ["demo", "debug"])
def test_networks_export_and_compute_the_same(name):
    recipe = RECIPES[name]()
    network = recipe.build(COCO).network.eval()
    images = torch.rand(1, 3, *recipe.shards.grid) * 255
    exported = torch.export.export(network, (images,)).module()
    with torch.inference_mode():
        for mine, theirs in zip(network(images), exported(images), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "told"),
    [
        (VitConfig(patch=14, width=32, depth=4, heads=2, layers=(1, 2, 3, 4)), "multiple of the patch"),
        (VitConfig(patch=8, width=32, depth=4, heads=2, layers=(1, 2, 3, 5)), "not in 1..4"),
        (StemVitConfig(widths=(16, 16, 16, 16, 16, 16, 16)), "multiple of the patch or stride 64"),
    ],
)
def test_backbones_that_do_not_fit_are_refused(backbone, told):
    with pytest.raises(TesseraError, match=told):
        replace(debug(), method=replace(debug().method, backbone=backbone)).build(COCO)
