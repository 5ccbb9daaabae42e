"""Encoders behind one small interface: an image in, feature maps with known channels and strides out."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infra.errors import TesseraError


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """A plain ViT of any size, patch and depth: DINOv2's architecture as `transformers` implements it."""

    patch: int = 14
    width: int = 768
    depth: int = 12
    heads: int = 12
    layers: tuple[int, int, int, int] = (3, 6, 9, 12)
    """1-based layers whose outputs the decoder sees."""


@dataclass(frozen=True, kw_only=True)
class StemVitConfig:
    """Ours: a convolutional stem with coordinate channels, then transformer blocks at its last stride.

    For training from scratch at small sizes, where a plain ViT needs far more steps (docs/results.md, "From
    scratch"). The maps of the stem's stages are the features, finest first.
    """

    widths: tuple[int, ...] = (16, 32, 64, 128)
    """Channels at strides 1, 2, 4, ...; the last one is the transformer's width."""
    depth: int = 3
    heads: int = 4


BackboneConfig = VitConfig | StemVitConfig


class Backbone(nn.Module):
    """Normalised images (B, 3, H, W) -> one feature map per entry of `channels`, at `strides`."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]


def build_backbone(config: BackboneConfig, grid: tuple[int, int]) -> Backbone:
    """The encoder of a config for images of (height, width) `grid`. Raises TesseraError if they do not fit."""
    stride = config.patch if isinstance(config, VitConfig) else 2 ** (len(config.widths) - 1)
    if min(grid) < stride or grid[0] % stride or grid[1] % stride:
        raise TesseraError(f"backbone: the grid {grid} must be a multiple of the patch or stride {stride}")
    return Vit(config, grid) if isinstance(config, VitConfig) else StemVit(config, grid)


class Vit(Backbone):
    """Four intermediate layers of a DINOv2-shaped ViT, each (B, width, H / patch, W / patch)."""

    def __init__(self, config: VitConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        from transformers import (  # seconds to import, and only this class needs it
            Dinov2Backbone,
            Dinov2Config,
        )

        if not all(1 <= layer <= config.depth for layer in config.layers):
            raise TesseraError(f"backbone: layers {config.layers} are not in 1..{config.depth}")
        self.channels = (config.width,) * 4
        self.strides = (config.patch,) * 4
        shape = Dinov2Config(
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            patch_size=config.patch,
            image_size=max(grid),
            use_mask_token=False,  # of its pretraining; it would never get a gradient here
        )
        shape.out_features = [f"stage{layer}" for layer in config.layers]
        self.net = Dinov2Backbone(shape)

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """See Backbone."""
        return list(self.net(images_B3HW).feature_maps)


class StemVit(Backbone):
    """Stages of two convolutions each, halving the size between them, then attention over the last map."""

    coordinates_12HW: Tensor

    def __init__(self, config: StemVitConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.channels = config.widths
        self.strides = tuple(2**i for i in range(len(config.widths)))
        inputs = (
            5,
            *config.widths[:-1],
        )  # RGB, x, y: convolutions cannot tell where they are
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

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """See Backbone."""
        coordinates = self.coordinates_12HW.expand(images_B3HW.shape[0], -1, -1, -1)
        x_BCHW, features = torch.cat([images_B3HW, coordinates.to(images_B3HW.dtype)], 1), []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            features.append(x_BCHW)
        tokens_BTC = x_BCHW.flatten(2).transpose(1, 2) + self.position
        mixed_BCT = self.blocks(tokens_BTC).transpose(1, 2)
        return [*features[:-1], mixed_BCT.reshape(x_BCHW.shape)]


def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.GroupNorm(max(1, outputs // 16), outputs),
        nn.ReLU(inplace=True),
    )
