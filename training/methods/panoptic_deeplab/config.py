"""Options of Panoptic-DeepLab; every default is that of its public code on Cityscapes (D), or says whose it is."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from infra.errors import TesseraError
from training.backbones import AnyBackboneConfig, PyramidConfig
from training.methods.base import MethodConfig
from training.parts.pisr import PisrConfig


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """From network outputs to segments."""

    threshold: float = 0.1
    """Least score of a centre."""
    window: int = 7
    """A centre is the highest score of this many pixels of the grid, squared; odd (D: 7, on COCO 41)."""
    most: int = 200
    """Centres of an image, the best ones."""
    min_stuff_area: float = 1 / 1024
    """Share of the image's pixels under which a stuff segment becomes void (D: 2048 of 1024 x 2048 pixels). It bounds
    what the best network can reach; a report says by how much."""

    def __post_init__(self) -> None:
        if not (self.window >= 3 and self.window % 2 and self.most >= 1 and 0 <= self.min_stuff_area < 1):
            raise TesseraError(f"decode: window odd and from 3, most from 1, min_stuff_area in [0, 1): {self}")
        if not 0 <= self.threshold < math.inf:
            raise TesseraError(f"decode: threshold {self.threshold} is no score")

    candidates: ClassVar[dict[str, tuple[float, ...]]] = {
        "min_stuff_area": (0.0, 1 / 1024, 0.005, 0.01, 0.02),
        "threshold": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5),
        "window": (3, 5, 7, 13, 21, 41),
    }
    """What evaluation.tune tries."""


@dataclass(frozen=True, kw_only=True)
class PanopticDeeplabConfig(MethodConfig):
    """One resolved set of options."""

    backbone: AnyBackboneConfig = field(default_factory=lambda: PyramidConfig(dilations=(2, 4, 8)))
    skip_strides: tuple[int, ...] = (8, 4)
    """Strides of the features that join each decoder on its way up; the heads work at the last one."""
    skip_channels: tuple[int, ...] = (64, 32)
    """What they are projected to."""
    context_channels: int = 256
    """Of the atrous spatial pyramid pooling at the top of each decoder."""
    context_rates: tuple[int, ...] = (6, 12, 18)
    """Dilations of its convolutions."""
    dropout: float = 0.1
    """Behind it."""
    semantic_channels: int = 256
    """Of the semantic decoder and head."""
    instance_channels: int = 128
    """Of the instance decoder."""
    head_channels: int = 32
    """Of the heads of centres and offsets."""
    sigma: float = 8.0
    """Of the Gaussian around a centre, pixels of the grid."""
    small_area: int = 4096
    """Things under this many pixels of the grid ..."""
    small_weight: float = 3.0
    """... weigh this much in the semantic loss."""
    hardest: float = 0.2
    """Share of an image's pixels, those with the largest loss, that the semantic loss counts (D: 1 on COCO)."""
    centre_weight: float = 200.0
    offset_weight: float = 0.01
    """Offsets are in pixels of the grid."""
    pisr: PisrConfig | None = None
    """Predict a second time from what relations between classes, instances and pixels add."""
    heat_reach: float = 64.0
    """PISR: an instance's heat is 1 where a pixel points at its centre and falls linearly to 0 this many pixels of the
    grid away from it (the paper's constant C is the inverse; its value is not known to us)."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        channels = (self.context_channels, self.semantic_channels, self.instance_channels, self.head_channels)
        if min(*channels, *self.skip_channels, *self.skip_strides, *self.context_rates) < 1:
            raise TesseraError("panoptic_deeplab: channels, strides and rates must be at least 1")
        if len(self.skip_strides) != len(self.skip_channels) or not self.skip_strides:
            raise TesseraError(f"panoptic_deeplab: skips {self.skip_strides} with channels {self.skip_channels}")
        if list(self.skip_strides) != sorted(set(self.skip_strides), reverse=True):
            raise TesseraError(f"panoptic_deeplab: skip_strides {self.skip_strides} must fall")
        weights = (self.small_weight, self.centre_weight, self.offset_weight)
        if not all(0 <= weight < math.inf for weight in weights):
            raise TesseraError(f"panoptic_deeplab: weights must be finite and not negative: {weights}")
        lengths = 0 < self.sigma < math.inf and 0 < self.heat_reach < math.inf and self.small_area >= 0
        if not (0 < self.hardest <= 1 and 0 <= self.dropout < 1 and lengths):
            raise TesseraError(
                f"panoptic_deeplab: hardest {self.hardest} in (0, 1], dropout {self.dropout} in [0, 1), sigma "
                f"{self.sigma} and heat_reach {self.heat_reach} over 0, small_area {self.small_area} from 0"
            )
