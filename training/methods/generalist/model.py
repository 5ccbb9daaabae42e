"""The generalist network: one encoder, one decoder, two single-convolution heads (G)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preprocessing.geometry import Frame, Size
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap
from preprocessing.pictures import Picture
from training.backbones import build_backbone
from training.backbones.base import Backbone
from training.batch import VOID, Batch
from training.methods.base import Method, Outputs
from training.methods.generalist.config import GeneralistConfig
from training.methods.generalist.decode import CENTROID_VIEW, centroid_picture, decode
from training.methods.generalist.loss import instance_losses, semantic_losses
from training.methods.generalist.targets import instance_targets, omegas, semantic_targets
from training.parts.assemble import SEMANTIC_VIEW, Assembly, certain, class_picture

_CODES = {
    "embedding": "sin w_k x, cos w_k x, sin w_k y, cos w_k y, each for k from 0 to L - 1; x and y in -1..1, L is "
    "`frequencies`, w_k is 2^k pi or with `half_period` half of it; zeros outside of things",
    "direct": "x and y in 0..1, then 1 inside of things; zeros outside",
    "classes": "logits of `cells` equal cells and one for outside of things, of x, then of y",
}
"""Codes of centroids by encoding, for whoever decodes them without us; see targets.encode."""


class Generalist(Method):
    """Class logits and codes of centroids, decoded by votes."""

    def __init__(self, config: GeneralistConfig, labels: LabelTable, frame: Frame) -> None:
        super().__init__(labels, frame)
        self.config = config
        self.alternates = config.tasks == "alternate"
        self.network = Network(config, len(labels), frame.size)

    @property
    def output_notes(self) -> dict[str, str]:
        """See Method."""
        return {
            "classes": "logits of each pixel's category, channels in the order of the labels",
            "centroids": f"code of the centroid (x, y) of each pixel's thing: {_CODES[self.config.encoding]}",
        }

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """See Method. With alternating tasks every third step is semantic, the others are instance."""
        semantic = not self.alternates or step % 3 == 2
        instance = not self.alternates or step % 3 != 2
        logits_BCHW, codes_BXHW = self.network(batch.images_B3HW, semantic, instance)
        result: dict[str, Tensor] = {}
        with torch.autocast(batch.images_B3HW.device.type, enabled=False):
            if semantic:
                result |= semantic_losses(logits_BCHW.float(), semantic_targets(batch, self.config), self.config)
            if instance:
                targets = instance_targets(batch, self.config)
                result |= instance_losses(codes_BXHW.float(), targets, batch, self.config)
        return result

    @torch.inference_mode()
    def decode(self, outputs: Outputs, sizes: Sequence[Size]) -> list[PanopticMap]:
        """See Method."""
        logits_BCHW, codes_BXHW = outputs
        assembly = Assembly(self.labels, self.frame.keep_aspect, self.config.decode.min_stuff_area)
        return decode(logits_BCHW, codes_BXHW, sizes, assembly, self.config)

    @torch.inference_mode()
    def views(self, outputs: Outputs) -> list[dict[str, Picture]]:
        """See Method: the semantic head's classes, and decoded centroids as colour (G, figures 7 and 8)."""
        logits_BCHW, codes_BXHW = outputs
        return [
            {
                SEMANTIC_VIEW: class_picture(classes_HW, self.labels),
                CENTROID_VIEW: centroid_picture(codes_XHW, self.config),
            }
            for classes_HW, codes_XHW in zip(logits_BCHW.argmax(1), codes_BXHW, strict=True)
        ]

    def ideal(self, batch: Batch) -> Outputs:
        """See Method. Void says a thing's class outside of all instances, which decodes to void."""
        thing = int(self.labels.is_thing.argmax())
        classes_BHW = batch.classes_BHW
        logits_BCHW = certain(torch.where(classes_BHW == VOID, thing, classes_BHW), len(self.labels))
        codes_BXHW = instance_targets(batch, self.config).dense_BXHW
        if self.config.encoding == "classes":
            codes_BXHW = torch.cat([certain(cells_BHW, self.config.cells + 1) for cells_BHW in codes_BXHW.unbind(1)], 1)
        return logits_BCHW, codes_BXHW


class Network(nn.Module):
    """Images (B, 3, H, W), 0-255 -> class logits (B, C, H, W) and codes of centroids (B, X, H, W)."""

    places: Tensor

    def __init__(self, config: GeneralistConfig, categories: int, grid: Size) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone, grid)
        self.decoder = Decoder(self.backbone, config.decoder_widths)
        width = config.decoder_widths[-1]
        self.semantic_head = nn.Conv2d(width, categories, 3, padding=1)
        self.instance_head = nn.Conv2d(width, config.instance_channels, 3, padding=1)
        self.relative = config.relative
        if config.relative:
            embedded = config.encoding == "embedding"
            self.absolute = rotate if embedded else shift
            places = pixel_phases(grid, omegas(config)) if embedded else pixel_shares(grid).float()
            self.register_buffer("places", places, persistent=False)

    def forward(self, images_B3HW: Tensor, semantic: bool = True, instance: bool = True) -> tuple[Tensor, Tensor]:
        """See the class. A head that is not asked for gives an empty tensor."""
        size = images_B3HW.shape[-2:]
        features_BCHW = self.decoder(self.backbone(images_B3HW))
        if features_BCHW.shape[-2:] != size:
            # the last resize is ours (G is silent): 30 tokens x 2^4 = 480 pixels, not 420
            features_BCHW = F.interpolate(features_BCHW, size, mode="bilinear", align_corners=False)
        nothing = features_BCHW.new_empty(0)
        logits_BCHW = self.semantic_head(features_BCHW) if semantic else nothing
        codes_BXHW = self.instance_head(features_BCHW) if instance else nothing
        if instance and self.relative:
            codes_BXHW = self.absolute(codes_BXHW.float(), self.places)
        return logits_BCHW, codes_BXHW


class Decoder(nn.Module):
    """Four transposed convolutions towards the input's size, shared by both tasks (G).

    Feature maps join by a 1x1 projection where their stride is reached: all four of a plain ViT at the
    start, those of a pyramid on the way up. A step doubles the size unless the finest feature's stride is
    reached already (patches under 16), where it keeps it.
    """

    def __init__(self, backbone: Backbone, widths: Sequence[int]) -> None:
        super().__init__()
        stride = max(backbone.strides)
        self.at: list[list[int]] = []
        self.laterals, self.ups = nn.ModuleList(), nn.ModuleList()
        for step, width in enumerate(widths):
            self.at.append([i for i, s in enumerate(backbone.strides) if s == stride and not self._used(i)])
            joined = sum(backbone.channels[i] for i in self.at[-1])
            self.laterals.append(nn.Conv2d(joined, width, 1) if joined else nn.Identity())
            if step == len(widths) - 1:
                break
            factor = 2 if stride > 1 else 1
            self.ups.append(_up(width, widths[step + 1], factor))
            stride = -(-stride // factor)  # rounded up: patch 14 needs four doublings

    def _used(self, feature: int) -> bool:
        return any(feature in used for used in self.at)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps of the backbone -> (B, widths[-1], H', W')."""
        x_BCHW: Tensor | None = None
        for step, (used, lateral) in enumerate(zip(self.at, self.laterals, strict=True)):
            if used:
                joined = lateral(torch.cat([features[i] for i in used], 1))
                x_BCHW = joined if x_BCHW is None else x_BCHW + joined
            if step < len(self.ups):
                x_BCHW = self.ups[step](x_BCHW)
        assert x_BCHW is not None  # the coarsest features join at step 0
        return x_BCHW


def _up(inputs: int, outputs: int, factor: int) -> nn.Sequential:
    kernel, padding = (4, 1) if factor == 2 else (3, 1)
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, outputs, kernel, factor, padding),
        nn.GroupNorm(max(1, outputs // 16), outputs),
        nn.ReLU(inplace=True),
    )


def pixel_shares(grid: Size) -> Tensor:
    """x and y of each pixel's centre as shares of the image, 0..1: float64 (2, H, W)."""
    y_HW, x_HW = torch.meshgrid(*((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in grid), indexing="ij")
    return torch.stack([x_HW, y_HW])


def pixel_phases(grid: Size, frequencies: list[float]) -> Tensor:
    """cos u, sin u, cos v and sin v of each pixel's own phases: (4, L, H, W)."""
    uv_2HW = 2 * pixel_shares(grid) - 1
    phases_2LHW = uv_2HW[:, None] * torch.tensor(frequencies).view(1, -1, 1, 1)
    return torch.stack([phases_2LHW.cos(), phases_2LHW.sin()], 1).flatten(0, 1).float()


def rotate(relative_BEHW: Tensor, phases_4LHW: Tensor) -> Tensor:
    """Embedding of (centroid - pixel) -> embedding of the centroid, pair by pair (ours).

    sin(a + b) and cos(a + b) are a rotation of (sin a, cos a) by b: linear, norm-preserving, zero stays
    zero, so targets, losses and decoding do not change.
    """
    pairs_B2SLHW = relative_BEHW.unflatten(1, (2, 2, -1))
    sine, cosine = pairs_B2SLHW[:, :, 0], pairs_B2SLHW[:, :, 1]
    cos_b, sin_b = phases_4LHW[0::2], phases_4LHW[1::2]  # (2, L, H, W): u and v
    turned = torch.stack([sine * cos_b + cosine * sin_b, cosine * cos_b - sine * sin_b], 2)
    return turned.flatten(1, 3)


def shift(relative_B3HW: Tensor, shares_2HW: Tensor) -> Tensor:
    """Centroid - pixel, and "is instance" -> centroid, both in shares of the image (ours).

    Where "is instance" is 1 the pixel's own place is added, so zero stays zero: with embeddings, `rotate` does that.
    """
    offset_B2HW, instance_B1HW = relative_B3HW[:, :2], relative_B3HW[:, 2:]
    return torch.cat([offset_B2HW + shares_2HW * instance_B1HW, instance_B1HW], 1)
