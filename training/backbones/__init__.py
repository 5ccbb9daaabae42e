"""The encoders by config class."""

from collections.abc import Callable
from typing import Any

from infra.errors import TesseraError
from preprocessing.geometry import Size
from training.backbones.base import Backbone
from training.backbones.pyramids import Lite, LiteConfig, Pyramid, PyramidConfig
from training.backbones.stem_vit import StemVit, StemVitConfig
from training.backbones.vit import Vit, VitConfig

AnyBackboneConfig = VitConfig | PyramidConfig | LiteConfig | StemVitConfig
BACKBONES: dict[type[AnyBackboneConfig], Callable[[Any, Size], Backbone]] = {
    VitConfig: Vit,
    PyramidConfig: Pyramid,
    LiteConfig: Lite,
    StemVitConfig: StemVit,
}


def build_backbone(config: AnyBackboneConfig, grid: Size) -> Backbone:
    """The encoder of a config for images of (height, width) `grid`, with fresh weights.

    Raises TesseraError if the grid is no multiple of the patch or stride.
    """
    stride = config.stride
    if min(grid) < stride or grid[0] % stride or grid[1] % stride:
        raise TesseraError(f"backbone: the grid {grid} must be a multiple of the patch or stride {stride}")
    return BACKBONES[type(config)](config, grid)
