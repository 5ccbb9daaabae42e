"""A user's options of a recipe: what they change, and what is refused before any work."""

from collections.abc import Callable

import pytest

from infra.errors import TesseraError
from preprocessing.shards import ShardConfig
from tests.support.every_recipe import every_recipe
from training.backbones import LiteConfig, PyramidConfig, VitConfig
from training.methods.generalist.config import DecodeConfig
from training.recipe import Recipe
from training.recipes.generalist import coco_mini, debug

TINY = VitConfig(patch=8, width=32, depth=4, heads=2, layers=(1, 2, 3, 4))


def test_options_change_what_they_name_and_nothing_else():
    changed = debug().changed({"train.seed": 3, "method.frequencies": 2, "shards.grid": [64, 64]})
    assert (changed.train.seed, changed.method.frequencies, changed.shards.grid) == (3, 2, (64, 64))
    back = {"train.seed": 0, "method.frequencies": 4, "shards.grid": [32, 32]}
    assert changed.changed(back) == debug()


def test_options_that_are_only_allowed_together_are_taken_together():
    off = {f"method.{name}": False for name in ("relative", "half_period", "squared")}
    assert coco_mini().changed(off | {"method.encoding": "classes"}).method.instance_channels == 162
    for missing in off:
        with pytest.raises(TesseraError, match=r"classes"):
            coco_mini().changed({"method.encoding": "classes"} | {k: v for k, v in off.items() if k != missing})


def test_a_group_of_options_keeps_the_others_of_its_group():
    assert debug().changed({"method.decode": {"grid": 10}}).method.decode == DecodeConfig(grid=10)
    assert debug().changed({"shards": {"grid": [64, 64]}}).shards == ShardConfig(grid=(64, 64), radius=10, samples=4)
    assert debug().changed({"method.backbone": {"depth": 6}}).method.backbone == VitConfig(**{**vars(TINY), "depth": 6})


def test_a_backbone_of_another_kind_takes_the_place_of_the_recipes():
    swin = coco_mini().changed({"method.backbone": {"name": "swin-tiny"}})
    assert swin.method.backbone == PyramidConfig(name="swin-tiny")
    assert coco_mini().changed({"method.backbone": {"weights": None}}).method.backbone == LiteConfig(weights=None)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"methd.x": 1}, r"option 'methd': there is none; there are frame, method, name"),
        ({"method.backbone": {"widht": 3}}, r"option 'method.backbone.widht': there is none; there are depth"),
        ({"method.backbone": {"name": "pvt-v2-b1"}}, r"'method.backbone.name': 'pvt-v2-b1': .*'pvt-v2-b0'"),
        ({"method.decode": {"gird": 10}}, r"option 'method.decode.gird': there is none; there are grid"),
        ({"method.encoding": "foo"}, r"option 'method.encoding': 'foo': .*'direct'"),
        ({"method.frequencies": "x"}, r"option 'method.frequencies': 'x': .*integer"),
        ({"train": 1}, r"option 'train': 1"),
        ({"train.seed.foo": 1}, r"option 'train.seed.foo': there is none"),
        ({"method.decode.grid": 0}, "grid from 1"),
        ({"method.decode.min_area": float("nan")}, "areas in"),
        ({"method.eds_distance": float("nan")}, "eds_distance nan"),
        ({"method.dice": float("inf")}, "dice inf"),
        ({"method.decoder_widths": [16, 16, 16, 16, 0]}, "decoder_widths must be at least 1"),
        ({"reader.workers": -1}, "-1 processes"),
        ({"train.betas": [2, 3]}, r"betas=\(2.0, 3.0\)"),
        ({"method.eds_distance": 200}, "distances up to 500 px, they are exact up to 10"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_by_name(options: dict, told: str):
    with pytest.raises(TesseraError, match=told):
        debug().changed(options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method.backbone.heads": 3}, "does not divide among 3 heads"),
        ({"method.backbone.patch": 7}, "multiple of the patch or stride 7"),
        ({"method.backbone.patch": 0}, "recipe generalist/debug: its network cannot be built"),
        ({"method.backbone.depth": 0}, r"not in 1..0"),
        ({"shards.grid": [33, 33]}, r"grid \(33, 33\)"),
        ({"method.backbone.width": -32}, "recipe generalist/debug: its network cannot be built"),
        ({"method.backbone.weights": "https://host/x.pth"}, "a source is hub:"),
        ({"method.backbone.weights": "/nowhere/x.pth"}, "/nowhere/x.pth"),
    ],
    ids=str,
)
def test_a_network_that_cannot_be_is_refused_by_the_rehearsal(options: dict, told: str):
    with pytest.raises(TesseraError, match=told):
        debug().changed(options).rehearse()


@pytest.mark.parametrize("make", every_recipe())
def test_every_recipe_passes_its_rehearsal(make: Callable[[], Recipe]):
    recipe = make()
    weights = recipe.method.backbone.weights
    if weights and weights.startswith("hub:"):
        recipe = recipe.changed({"method.backbone.weights": None})
    report = recipe.rehearse()
    assert (report is None) == (recipe.method.backbone.weights is None)
