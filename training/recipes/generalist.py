"""Recipes of the generalist method. A docstring says what to expect, by which source, where, and what was measured."""

import dataclasses
import math
from collections.abc import Callable

from preprocessing.shards import ShardConfig
from training.backbones import LiteConfig, StemVitConfig, VitConfig
from training.methods.generalist.config import DecodeConfig, GeneralistConfig
from training.reader import ReaderConfig
from training.recipe import Recipe, TrainConfig, UpkeepConfig

_BASE = VitConfig(weights="hub:facebook/dinov2-base")
_LARGE = VitConfig(width=1024, depth=24, heads=16, layers=(5, 12, 18, 24), weights="hub:facebook/dinov2-large")


def _papers(name: str, backbone: VitConfig, side: int, epochs: float = 200, warmup_epochs: float = 3) -> Recipe:
    """The paper's training (G, section 4); layer decay 0.6 is that of its authors' later work.

    D is 20 px at 420 px and grows with the image (ours; G is silent).
    """
    distance = 20 * side / 420
    return Recipe(
        name=name,
        method=GeneralistConfig(backbone=backbone, eds_distance=distance),
        shards=ShardConfig(grid=(side, side), radius=math.ceil(2.5 * distance)),
        train=TrainConfig(batch=256, epochs=epochs, lr=5e-4, warmup_epochs=warmup_epochs, layer_decay=0.6),
        reader=ReaderConfig(shuffle=2048, workers=8),
        upkeep=UpkeepConfig(check_epochs=epochs / 20, check_images=500),
    )


def base_420() -> Recipe:
    """The paper's ablation model: DINOv2 ViT-B/14 at 420 x 420 on COCO train2017.

    Expected: 48.6 PQ on val2017 (paper, table 1). Hardware: the paper's 8 A100, under 2 days. Measured: never.
    """
    return _papers("generalist/base_420", _BASE, 420)


def base_420_short() -> Recipe:
    """base_420 for 12 epochs: to compare options before a long run.

    Expected: unknown, the paper has no short schedule. Hardware: 8 A100, about 3 hours (12/200 of the paper's time).
    Measured: never.
    """
    return _papers("generalist/base_420_short", _BASE, 420, epochs=12, warmup_epochs=1)


def large_420() -> Recipe:
    """DINOv2 ViT-L/14 at 420 x 420 on COCO train2017.

    Expected: 51.6 PQ on val2017 (paper). Hardware: not stated by the paper. Measured: never.
    """
    return _papers("generalist/large_420", _LARGE, 420)


def large_518() -> Recipe:
    """The paper's best: DINOv2 ViT-L/14 at 518 x 518 on COCO train2017.

    Expected: 52.5 PQ on val2017 (paper; a later version says 55.1). Hardware: the paper's 8 H100, a little over 2
    days. Measured: never.
    """
    return _papers("generalist/large_518", _LARGE, 518)


def _small_images(decode: DecodeConfig, distance: float) -> GeneralistConfig:
    """For images of a hundred pixels and short runs.

    It departs from the paper where these need it (docs/results.md, "From scratch"): a convolutional stem, relative
    head, squared distance, half period, no Dice, both tasks in every batch, D scaled to the image.
    """
    return GeneralistConfig(
        backbone=StemVitConfig(),
        decoder_widths=(128, 64, 32, 16, 16),
        frequencies=3,
        half_period=True,
        relative=True,
        squared=True,
        eds_distance=distance,
        dice=0.0,
        tasks="joint",
        decode=decode,
    )


def coco_mini() -> Recipe:
    """A small net with ImageNet weights on a hundred COCO images at 96 x 96: learns a little, in minutes.

    Expected: no source; it begins to fit the hundred images, which teach next to nothing about others. Hardware: 2 CPU
    cores, under 20 minutes. Measured: 2026-11-21, three seeds, PQ 18.4 on its train and 1.1 on its val images, 7
    minutes of one core (docs/results.md).
    """
    decode = DecodeConfig(grid=80, reach=12, min_area=5e-3, min_stuff_area=2e-2)  # by pipelines.tune on the train split
    small = _small_images(decode, distance=16.0)
    return Recipe(
        name="generalist/coco_mini",
        method=dataclasses.replace(small, backbone=LiteConfig(), decoder_widths=(160, 96, 64, 48, 32)),
        shards=ShardConfig(grid=(96, 96), radius=40, samples=20),
        train=TrainConfig(
            batch=4,
            epochs=48,
            warmup_epochs=2,
            lr=2e-3,
            layer_decay=0.9,
            weight_decay=0.02,
            betas=(0.9, 0.99),
            clip=5.0,
        ),
    )


def demo() -> Recipe:
    """Small net from scratch on the synthetic set at 64 x 64: what `make demo` runs.

    Expected: PQ 75 or more, 60 on things. Hardware: 2 CPU cores, 4 minutes when they are free. Measured: 2026-11-21,
    PQ 79.4, things 66.9, 7 minutes on cores that others used too (docs/results.md).
    """
    return Recipe(
        name="generalist/demo",
        method=_small_images(DecodeConfig(grid=32, reach=6, min_area=3e-3), distance=8.0),
        shards=ShardConfig(grid=(64, 64), radius=20, samples=150),
        train=TrainConfig(batch=8, epochs=8, warmup_epochs=0.12, lr=2e-3, betas=(0.9, 0.99), clip=5.0),
        upkeep=UpkeepConfig(check_epochs=1, check_images=40),
    )


def hard() -> Recipe:
    """The paper's absolute head from scratch on hard synthetic scenes at 64 x 64: what docs/science.md departs from.

    Ours, since nothing learns from scratch without: squared distance, no Dice, both tasks in every batch, D = 8 px.
    Expected: no source. Hardware: one CPU core, 2 minutes. Measured: docs/science.md.
    """
    return Recipe(
        name="generalist/hard",
        method=GeneralistConfig(
            backbone=StemVitConfig(),
            decoder_widths=(128, 64, 32, 16, 16),
            squared=True,
            eds_distance=8.0,
            dice=0.0,
            tasks="joint",
            decode=DecodeConfig(grid=64, reach=6, min_area=1e-3),
        ),
        shards=ShardConfig(grid=(64, 64), radius=20, samples=150),
        train=TrainConfig(batch=8, epochs=2, warmup_epochs=0.12, lr=2e-3, betas=(0.9, 0.99), clip=5.0),
    )


def debug() -> Recipe:
    """The paper's losses and head on a tiny ViT at 32 x 32 for a few steps: for tests, learns nothing.

    Expected: nothing. Hardware: one CPU core, seconds. Measured: seconds, in every test run.
    """
    return Recipe(
        name="generalist/debug",
        method=GeneralistConfig(
            backbone=VitConfig(patch=8, width=32, depth=4, heads=2, layers=(1, 2, 3, 4)),
            decoder_widths=(16, 16, 16, 16, 16),
            eds_distance=4.0,
        ),
        shards=ShardConfig(grid=(32, 32), radius=10, samples=4),
        train=TrainConfig(batch=4, epochs=6, warmup_epochs=0.1, lr=1e-3),
        upkeep=UpkeepConfig(checkpoints=3),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    r.__name__: r for r in (base_420, base_420_short, large_420, large_518, coco_mini, demo, hard, debug)
}

PUBLISHED: dict[str, float] = {"base_420": 48.6, "large_420": 51.6, "large_518": 52.5}
"""PQ on COCO val2017 that the paper states for what a recipe mirrors (G, table 1)."""
