"""Recipes of Panoptic-DeepLab, alone and with PISR."""

import dataclasses
from collections.abc import Callable

from preprocessing.geometry import Frame, Size
from preprocessing.shards import ShardConfig
from training.augment import Crop
from training.backbones import LiteConfig, PyramidConfig, StemVitConfig
from training.methods.panoptic_deeplab.config import DecodeConfig, PanopticDeeplabConfig
from training.parts.pisr import PisrConfig
from training.reader import ReaderConfig
from training.recipe import Recipe, TrainConfig, UpkeepConfig
from training.recipes import generalist

_RESNET = PyramidConfig(dilations=(2, 4, 8), weights="hub:microsoft/resnet-50")


def _papers(name: str, method: PanopticDeeplabConfig, frame: Size, crop: Crop, train: TrainConfig) -> Recipe:
    """The public code's training: Adam without decay or clipping, random scales and crops of images of any size.

    Shards are small, so that Cityscapes' 2975 images make one for every stream of every reader process.
    """
    return Recipe(
        name=f"panoptic_deeplab/{name}",
        method=method,
        shards=ShardConfig(grid=None, radius=0, samples=32),
        train=dataclasses.replace(train, weight_decay=0.0, clip=None, decay="poly"),
        reader=ReaderConfig(shuffle=2048, workers=8, crop=crop),
        upkeep=UpkeepConfig(check_epochs=train.epochs / 20, check_images=500),
        frame=Frame(size=frame, keep_aspect=True),
    )


def _with_pisr(base: Recipe, pisr: PisrConfig) -> Recipe:
    method = dataclasses.replace(base.method, pisr=pisr)  # type: ignore[call-arg]
    return dataclasses.replace(base, name=f"{base.name}_pisr", method=method)


def coco() -> Recipe:
    """Panoptic-DeepLab with ResNet-50 on COCO train2017, crops of 640 x 640.

    Departs from the public code: group norms in the decoders and the published statistics in the backbone where that
    has batch norms over all workers, ResNet-50 where it has a deeper stem, one frame of 640 x 640 in evaluation. The
    code's least stuff area, 4096 px, bounds a perfect network at PQ 93.7, stuff 86.4, on 50 val images (99.8 at 0.001,
    100 without): another `method.decode.min_stuff_area` evaluates anew and trains nothing.

    Expected: 35.5 PQ on val2017 (its authors' code, and the base in PISR's table). Hardware: not stated; 200,000 steps
    of 64 images. Measured: never.
    """
    return _papers(
        "coco",
        PanopticDeeplabConfig(
            backbone=_RESNET, hardest=1.0, decode=DecodeConfig(window=41, min_stuff_area=4096 / (640 * 480))
        ),
        (640, 640),
        Crop(size=(640, 640), short_side=(320, 960), long_side=960),
        TrainConfig(batch=64, epochs=200_000 * 64 / 118_287, warmup_epochs=1000 * 64 / 118_287, lr=5e-4),
    )


def coco_pisr() -> Recipe:
    """`coco` with PISR.

    Expected: 38.8 PQ on val2017 (PISR). Hardware: not stated. Measured: never.
    """
    return _with_pisr(coco(), PisrConfig())


def cityscapes() -> Recipe:
    """Panoptic-DeepLab with ResNet-50 on Cityscapes (`layout`: cityscapes), crops of 512 x 1024.

    Expected: 59.9 PQ on val (PISR's base; its authors' code reaches 58.6 with this stem, 60.3 with a deeper one).
    Hardware: 8 GPUs of 10 GB in the public code. Measured: never.
    """
    return _papers(
        "cityscapes",
        PanopticDeeplabConfig(backbone=_RESNET),
        (1024, 2048),
        Crop(size=(512, 1024), short_side=(512, 2048), long_side=4096),
        TrainConfig(batch=32, epochs=90_000 * 32 / 2975, warmup_epochs=1000 * 32 / 2975, lr=1e-3, micro_batch=4),
    )


def cityscapes_pisr() -> Recipe:
    """`cityscapes` with PISR.

    Expected: 62.2 PQ on val (PISR). Hardware: not stated. Measured: never.
    """
    return _with_pisr(cityscapes(), PisrConfig())


def coco_mini() -> Recipe:
    """A small net with ImageNet weights on a hundred COCO images at 96 x 96, from the generalist's shards.

    Expected: no source. Hardware: one CPU core, 7 minutes. Measured: 2026-11-21, one seed, PQ 14.4 on its train and
    1.3 on its val images (docs/results.md).
    """
    return dataclasses.replace(
        generalist.coco_mini(),
        name="panoptic_deeplab/coco_mini",
        method=PanopticDeeplabConfig(
            backbone=LiteConfig(),
            skip_strides=(16, 8, 4),
            skip_channels=(64, 48, 32),
            context_channels=96,
            context_rates=(1, 2, 3),
            semantic_channels=96,
            instance_channels=64,
            sigma=3.0,
            heat_reach=9.6,
            small_area=92,
            hardest=1.0,
            offset_weight=0.1,
            decode=DecodeConfig(threshold=0.02, window=21, min_stuff_area=2e-2),  # by pipelines.tune, on train2017
        ),
    )


def coco_mini_pisr() -> Recipe:
    """`coco_mini` with PISR.

    Expected: no source. Hardware: one CPU core, 11 minutes. Measured: 2026-11-21, three seeds after 24 of the 48
    passes, PQ 0.5 on its val images (docs/results.md).
    """
    return _with_pisr(coco_mini(), PisrConfig(instances=20, channels=96))


def demo() -> Recipe:
    """Small net from scratch on the synthetic set at 64 x 64, from the generalist's shards.

    Expected: no source. Hardware: one CPU core, 12 minutes. Measured: 2026-11-21, one seed, PQ 77.5, things 64.1;
    three seeds after 4 of the 8 passes, PQ 65.6 (docs/results.md).
    """
    return dataclasses.replace(
        generalist.demo(),
        name="panoptic_deeplab/demo",
        method=PanopticDeeplabConfig(
            backbone=StemVitConfig(),
            skip_strides=(4, 2),
            skip_channels=(32, 16),
            context_channels=64,
            context_rates=(1, 2, 3),
            semantic_channels=64,
            instance_channels=64,
            dropout=0.0,
            sigma=2.5,
            heat_reach=6.4,
            small_area=41,
            hardest=1.0,
            offset_weight=0.1,
            decode=DecodeConfig(window=7),
        ),
    )


def demo_pisr() -> Recipe:
    """`demo` with PISR.

    Expected: no source. Hardware: one CPU core, 20 minutes. Measured: 2026-11-21, three seeds after 4 of the 8 passes,
    PQ 65.2, things 44.2 (docs/results.md).
    """
    return _with_pisr(demo(), PisrConfig(instances=20, channels=64))


def debug() -> Recipe:
    """The paper's losses on a tiny net at 32 x 32 for a few steps: for tests, learns nothing.

    Expected: nothing. Hardware: one CPU core, seconds. Measured: seconds, in every test run.
    """
    return dataclasses.replace(
        generalist.debug(),
        name="panoptic_deeplab/debug",
        method=PanopticDeeplabConfig(
            backbone=StemVitConfig(widths=(8, 16, 16, 32), depth=1, heads=2),
            skip_strides=(4, 2),
            skip_channels=(16, 16),
            context_channels=16,
            context_rates=(1, 2, 3),
            semantic_channels=16,
            instance_channels=16,
            sigma=2.0,
            heat_reach=3.2,
            small_area=30,
            offset_weight=0.1,
            decode=DecodeConfig(window=3),
        ),
    )


def debug_pisr() -> Recipe:
    """`debug` with PISR.

    Expected: nothing. Hardware: one CPU core, seconds. Measured: seconds, in every test run.
    """
    return _with_pisr(debug(), PisrConfig(instances=5, channels=16))


def debug_crop() -> Recipe:
    """`debug` on random crops of images of any size, with their aspect kept in evaluation.

    Expected: nothing. Hardware: one CPU core, seconds. Measured: seconds, in every test run.
    """
    return dataclasses.replace(
        debug(),
        name="panoptic_deeplab/debug_crop",
        shards=ShardConfig(grid=None, radius=0, samples=4),
        reader=ReaderConfig(crop=Crop(size=(32, 40), short_side=(24, 48), long_side=80)),
        frame=Frame(size=(32, 40), keep_aspect=True),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    r.__name__: r
    for r in (
        coco,
        coco_pisr,
        cityscapes,
        cityscapes_pisr,
        coco_mini,
        coco_mini_pisr,
        demo,
        demo_pisr,
        debug,
        debug_pisr,
        debug_crop,
    )
}

PUBLISHED: dict[str, float] = {"coco": 35.5, "coco_pisr": 38.8, "cityscapes": 59.9, "cityscapes_pisr": 62.2}
"""PQ on the val split that the PISR paper states for base and module with ResNet-50."""
