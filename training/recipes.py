"""The recipes by name. A docstring says what the run should reach, by which source, where, and what was measured."""

from collections.abc import Callable

from infra.errors import TesseraError
from preprocessing.shards import ShardConfig
from training.backbones import StemVitConfig, VitConfig
from training.methods.generalist.config import DecodeConfig, GeneralistConfig
from training.reader import ReaderConfig
from training.recipe import Recipe, TrainConfig


def base_420() -> Recipe:
    """The paper's ablation model: ViT-B/14 at 420 x 420 on COCO train2017.

    Expected: 48.6 PQ on val2017 (paper, table 1), with DINOv2 weights, which this recipe cannot load yet.
    Hardware: the paper's 8 A100, under 2 days. Measured: never.
    """
    return Recipe(
        name="base_420",
        method=GeneralistConfig(),
        shards=ShardConfig(grid=(420, 420), radius=50),
        train=TrainConfig(batch=256, epochs=200, lr=5e-4, warmup=3 / 200),
        reader=ReaderConfig(shuffle=2048, workers=8),
    )


def _from_scratch(decode: DecodeConfig) -> GeneralistConfig:
    """A small net that learns without pretrained weights.

    It departs from the paper where training from scratch needs it (docs/results.md): a convolutional stem, relative
    head, squared distance, half period, no Dice, both tasks in every batch, D scaled to the image.
    """
    return GeneralistConfig(
        backbone=StemVitConfig(),
        decoder_widths=(128, 64, 32, 16, 16),
        frequencies=3,
        half_period=True,
        relative=True,
        squared=True,
        eds_distance=8.0,
        dice=0.0,
        tasks="joint",
        decode=decode,
    )


def coco_mini() -> Recipe:
    """A small net from scratch on a hundred COCO images at 128 x 128: shows the way through, not quality.

    Expected: a few points of PQ on its val images. Hardware: 2 CPU cores, some minutes.
    Measured: see docs/results.md.
    """
    return Recipe(
        name="coco_mini",
        method=_from_scratch(DecodeConfig(grid=80, reach=12, min_area=2e-3, min_stuff_area=5e-3)),
        shards=ShardConfig(grid=(128, 128), radius=50, samples=20),
        train=TrainConfig(batch=8, epochs=30, lr=2e-3, betas=(0.9, 0.99), clip=5.0),
    )


def demo() -> Recipe:
    """Small net from scratch on the synthetic set at 64 x 64: what `make demo` runs.

    Expected: PQ 75 or more, 60 on things. Hardware: 2 CPU cores, under 5 minutes.
    Measured: see docs/results.md.
    """
    return Recipe(
        name="demo",
        method=_from_scratch(DecodeConfig(grid=32, reach=6, min_area=3e-3)),
        shards=ShardConfig(grid=(64, 64), radius=20, samples=150),
        train=TrainConfig(batch=8, epochs=8, lr=2e-3, betas=(0.9, 0.99), clip=5.0),
    )


def debug() -> Recipe:
    """The paper's losses and head on a tiny ViT at 32 x 32 for a few steps: for tests, learns nothing.

    Expected: nothing. Hardware: one CPU core, seconds. Measured: seconds, in every test run.
    """
    return Recipe(
        name="debug",
        method=GeneralistConfig(
            backbone=VitConfig(patch=8, width=32, depth=4, heads=2, layers=(1, 2, 3, 4)),
            decoder_widths=(16, 16, 16, 16, 16),
            eds_distance=4.0,
        ),
        shards=ShardConfig(grid=(32, 32), radius=10, samples=4),
        train=TrainConfig(batch=4, epochs=6, lr=1e-3, checkpoints=3),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {r.__name__: r for r in (base_420, coco_mini, demo, debug)}


def recipe(name: str) -> Recipe:
    """The recipe of that name; TesseraError listing all names if there is none."""
    if name not in RECIPES:
        raise TesseraError(f"unknown recipe {name!r}; there are {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()
