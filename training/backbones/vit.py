"""DINOv2's plain ViT."""

import re
from dataclasses import dataclass

from torch import Tensor

from infra.errors import TesseraError
from preprocessing.geometry import Size
from training.backbones.base import Backbone, BackboneConfig
from training.backbones.library import from_meta, load_by_library, resize_positions
from training.backbones.weights import LoadReport, State


@dataclass(frozen=True, kw_only=True)
class VitConfig(BackboneConfig):
    """A plain ViT of any size, patch and depth: DINOv2's architecture as `transformers` implements it."""

    patch: int = 14
    width: int = 768
    depth: int = 12
    heads: int = 12
    layers: tuple[int, int, int, int] = (3, 6, 9, 12)
    """1-based layers whose outputs the decoder sees."""

    @property
    def stride(self) -> int:
        """See BackboneConfig."""
        return self.patch


class Vit(Backbone):
    """Four intermediate layers of a DINOv2-shaped ViT, each (B, width, H / patch, W / patch)."""

    def __init__(self, config: VitConfig, grid: Size) -> None:
        super().__init__(config)
        from transformers import Dinov2Backbone, Dinov2Config  # seconds to import, and only this class needs it

        layers = config.layers
        if not all(1 <= layer <= config.depth for layer in layers) or list(layers) != sorted(set(layers)):
            raise TesseraError(f"backbone: layers {layers} are not in 1..{config.depth}, each above the one before")
        if config.width % config.heads:
            raise TesseraError(f"backbone: a width of {config.width} does not divide among {config.heads} heads")
        self.channels = (config.width,) * 4
        self.strides = (config.patch,) * 4
        self.depth = config.depth
        self.grid = grid
        self.patch = config.patch
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

    def features(self, normal_B3HW: Tensor) -> list[Tensor]:
        """See Backbone."""
        return list(self.net(normal_B3HW).feature_maps)

    def layer_of(self, name: str) -> int:
        """See Backbone: 0 is the embedding of patches and positions."""
        block = re.search(r"encoder\.layer\.(\d+)\.", name)
        return int(block[1]) + 1 if block else 0 if "embeddings." in name else self.depth

    def load_state(self, state: State) -> LoadReport:
        """See Backbone. Names of the library's files and of Meta's; positions are resized to the grid.

        The grid has to be a square, as published positions are: the library keeps no others.
        """
        if self.grid[0] != self.grid[1]:
            raise TesseraError(f"published positions of a ViT fit square grids, not {self.grid}")
        state = from_meta(state)
        for name, value in state.items():
            if name.endswith("position_embeddings"):
                state[name] = resize_positions(value, self.grid[0] // self.patch)
        return load_by_library(self.net, state)
