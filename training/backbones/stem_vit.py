"""Ours: a small encoder that learns from scratch."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infra.errors import TesseraError
from preprocessing.geometry import Size
from training.backbones.base import Backbone, BackboneConfig


@dataclass(frozen=True, kw_only=True)
class StemVitConfig(BackboneConfig):
    """A convolutional stem with coordinate channels, then transformer blocks at its last stride.

    For training from scratch at small sizes, where a plain ViT needs far more steps (docs/results.md, "From
    scratch"). The maps of the stem's stages are the features, finest first.
    """

    widths: tuple[int, ...] = (16, 32, 64, 128)
    """Channels at strides 1, 2, 4, ...; the last one is the transformer's width."""
    depth: int = 3
    heads: int = 4

    @property
    def stride(self) -> int:
        """See BackboneConfig."""
        return 2 ** (len(self.widths) - 1)


class StemVit(Backbone):
    """Stages of two convolutions each, halving the size between them, then attention over the last map."""

    coordinates_12HW: Tensor

    def __init__(self, config: StemVitConfig, grid: Size) -> None:
        super().__init__(config)
        if config.widths[-1] % config.heads:
            raise TesseraError(f"backbone: a width of {config.widths[-1]} does not divide among {config.heads} heads")
        self.channels = config.widths
        self.strides = tuple(2**i for i in range(len(config.widths)))
        self.depth = len(config.widths) + config.depth
        inputs = (5, *config.widths[:-1])  # RGB, x, y: convolutions cannot tell where they are
        self.stages = nn.ModuleList(
            nn.Sequential(_conv(i, o, stride), _conv(o, o, 1))
            for i, o, stride in zip(inputs, config.widths, (1, *[2] * (len(inputs) - 1)), strict=True)
        )
        width, last = config.widths[-1], self.strides[-1]
        self.position = nn.Parameter(torch.randn(1, grid[0] // last * (grid[1] // last), width) * 0.02)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, config.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(config.depth)
            )
        )
        ys, xs = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in grid), indexing="ij")
        self.register_buffer("coordinates_12HW", torch.stack([xs, ys])[None], persistent=False)

    def features(self, normal_B3HW: Tensor) -> list[Tensor]:
        """See Backbone."""
        coordinates = self.coordinates_12HW.expand(normal_B3HW.shape[0], -1, -1, -1)
        x_BCHW, features = torch.cat([normal_B3HW, coordinates.to(normal_B3HW.dtype)], 1), []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            features.append(x_BCHW)
        tokens_BTC = x_BCHW.flatten(2).transpose(1, 2) + self.position
        mixed_BCT = self.blocks(tokens_BTC).transpose(1, 2)
        return [*features[:-1], mixed_BCT.reshape(x_BCHW.shape)]

    def layer_of(self, name: str) -> int:
        """See Backbone: the stages, then the blocks; 0 holds the positions alone."""
        part, _, rest = name.partition(".")
        before = {"stages": 1, "blocks": 1 + len(self.stages)}
        return before[part] + int(rest.split(".")[0]) if part in before else 0


def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.GroupNorm(max(1, outputs // 16), outputs),
        nn.ReLU(inplace=True),
    )
