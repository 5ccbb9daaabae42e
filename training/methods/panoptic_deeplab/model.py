"""Panoptic-DeepLab: one encoder, a decoder and heads for each task (D); with PISR, heads once more on its features."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.errors import TesseraError
from preprocessing.geometry import Frame, Size
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap
from preprocessing.pictures import Picture
from training.backbones import build_backbone
from training.backbones.base import Backbone
from training.batch import VOID, Batch
from training.methods.base import Method, Outputs
from training.methods.panoptic_deeplab.config import PanopticDeeplabConfig
from training.methods.panoptic_deeplab.decode import HEAT_VIEW, OFFSET_VIEW, decode, heat_picture, offset_picture
from training.methods.panoptic_deeplab.loss import losses
from training.methods.panoptic_deeplab.targets import targets, with_crowds
from training.parts.assemble import SEMANTIC_VIEW, Assembly, certain, class_picture
from training.parts.pisr import Relations

Dense = tuple[Tensor, Tensor, Tensor]
"""Class logits (B, C, H, W), heat of centres (B, 1, H, W), offsets (B, 2, H, W), y then x."""
_NO_PEAK = -1e4
"""Under any score."""


class PanopticDeeplab(Method):
    """Classes, centres and the way to them, decoded by the nearest centre."""

    def __init__(self, config: PanopticDeeplabConfig, labels: LabelTable, frame: Frame) -> None:
        super().__init__(labels, frame)
        self.config = config
        self.network = Network(config, labels, frame.size)

    @property
    def output_notes(self) -> dict[str, str]:
        """See Method."""
        return {
            "classes": "logits of each pixel's category, channels in the order of the labels",
            "centres": "score of each pixel being the centroid of a thing, 1 at best",
            "offsets": "from each pixel of a thing to its centroid, y then x, in pixels of the grid",
        }

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """See Method. What PISR gets to see is trained too, with its config's `intermediate` weight."""
        outputs = self.network(batch.images_B3HW, first=True)
        with torch.autocast(batch.images_B3HW.device.type, enabled=False):
            logits, heat, offset, *first = (output.float() for output in outputs)
            wanted = targets(batch, self.config)
            result = losses(logits, heat, offset, wanted, self.config)
            if self.config.pisr is not None:
                before = losses(first[0], first[1], first[2], wanted, self.config)
                result |= {f"{name}_first": self.config.pisr.intermediate * loss for name, loss in before.items()}
        return result

    @torch.inference_mode()
    def decode(self, outputs: Outputs, sizes: Sequence[Size]) -> list[PanopticMap]:
        """See Method."""
        assembly = Assembly(self.labels, self.frame.keep_aspect, self.config.decode.min_stuff_area)
        logits_BCHW, heat_B1HW, offset_B2HW = outputs
        return decode(logits_BCHW, heat_B1HW, offset_B2HW, sizes, assembly, self.config.decode)

    @torch.inference_mode()
    def views(self, outputs: Outputs) -> list[dict[str, Picture]]:
        """See Method."""
        logits_BCHW, heat_B1HW, offset_B2HW = outputs
        return [
            {
                SEMANTIC_VIEW: class_picture(classes_HW, self.labels),
                HEAT_VIEW: heat_picture(heat_HW),
                OFFSET_VIEW: offset_picture(offset_2HW),
            }
            for classes_HW, heat_HW, offset_2HW in zip(logits_BCHW.argmax(1), heat_B1HW[:, 0], offset_B2HW, strict=True)
        ]

    def ideal(self, batch: Batch) -> Outputs:
        """See Method. Void says stuff where there is any, so that it has no part in the majority of an instance."""
        wanted = targets(with_crowds(batch), self.config)
        stuff = int(self.labels.is_thing.argmin())
        classes_BHW = torch.where(wanted.classes_BHW == VOID, stuff, wanted.classes_BHW)
        return certain(classes_BHW, len(self.labels)), wanted.heat_BHW[:, None], wanted.offset_B2HW


class Network(nn.Module):
    """Images (B, 3, H, W), 0-255 -> Dense, in the images' size."""

    thing_C: Tensor

    def __init__(self, config: PanopticDeeplabConfig, labels: LabelTable, grid: Size) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone, grid)
        self.semantic = Decoder(self.backbone, config, config.semantic_channels)
        self.instance = Decoder(self.backbone, config, config.instance_channels)
        self.heads = Heads(config.semantic_channels, config.instance_channels, len(labels), config)
        self.register_buffer("thing_C", torch.tensor(labels.is_thing, dtype=torch.float32), persistent=False)
        if config.pisr is not None:
            width = config.pisr.channels
            self.relations = Relations(config.pisr, config.semantic_channels + config.instance_channels, len(labels))
            self.final_heads = Heads(width, width, len(labels), config)

    def forward(self, images_B3HW: Tensor, first: bool = False) -> tuple[Tensor, ...]:
        """See the class. first: with PISR, what was predicted before it as well, another Dense behind the final one."""
        size = images_B3HW.shape[-2:]
        features = self.backbone(images_B3HW)
        semantic_BSHW, instance_BIHW = self.semantic(features), self.instance(features)
        dense = self.heads(semantic_BSHW, instance_BIHW)
        if self.config.pisr is None:
            return _enlarged(dense, size)
        probability_BCHW = dense[0].float().softmax(1)
        thing_B1HW = (probability_BCHW * self.thing_C.view(1, -1, 1, 1)).sum(1, keepdim=True)
        heat_BKHW = instance_heat(dense[1], dense[2], thing_B1HW, self.config)
        related_BCHW = self.relations(torch.cat([semantic_BSHW, instance_BIHW], 1), probability_BCHW, heat_BKHW)
        final = _enlarged(self.final_heads(related_BCHW, related_BCHW), size)
        return final + _enlarged(dense, size) if first else final


def _enlarged(dense: Dense, size: Sequence[int]) -> Dense:
    """Bilinear, to (height, width) `size`; offsets are lengths and grow too (D), in float32: bf16 has steps of 2 px."""
    stride_2 = [side / small for side, small in zip(size, dense[0].shape[-2:], strict=True)]
    given = (dense[0], dense[1].float(), dense[2].float())
    logits, heat, offset = (F.interpolate(x, list(size), mode="bilinear", align_corners=False) for x in given)
    return logits, heat, offset * offset.new_tensor(stride_2).view(1, 2, 1, 1)


def instance_heat(heat_B1HW: Tensor, offset_B2HW: Tensor, thing_B1HW: Tensor, config: PanopticDeeplabConfig) -> Tensor:
    """Heat maps of the K best centres, best first, float32 (B, K, H, W), for PISR.

    1 - C |pixel + offset - centre|, not under 0, times the probability of things (PISR, section on encodings). Where
    there are fewer peaks than K, the last maps are empty. A plateau is one peak (ours; find_centres knows any shape).
    """
    assert config.pisr is not None
    height, width = heat_B1HW.shape[2:]
    score_BHW, offset_B2HW = heat_B1HW[:, 0].float(), offset_B2HW.float()
    around_BHW = F.pad(score_BHW, (1, 1, 1, 1), value=_NO_PEAK)
    peak_BHW = score_BHW
    for y, x in itertools.product(range(3), range(3)):  # higher than those before it, not lower than those after
        near_BHW = around_BHW[:, y : y + height, x : x + width]
        higher_BHW = score_BHW > near_BHW if (y, x) < (1, 1) else score_BHW >= near_BHW
        peak_BHW = peak_BHW.where(higher_BHW, _NO_PEAK)
    score_BK, best_BK = peak_BHW.flatten(1).topk(min(config.pisr.instances, height * width))
    y_H, x_W = (torch.arange(side, device=score_BHW.device) for side in (height, width))
    y_BHW, x_BHW = offset_B2HW[:, 0] + y_H[:, None], offset_B2HW[:, 1] + x_W
    dy_BKHW = y_BHW[:, None] - (best_BK // width)[..., None, None]
    dx_BKHW = x_BHW[:, None] - (best_BK % width)[..., None, None]
    distance_BKHW = (dy_BKHW.square() + dx_BKHW.square() + 1e-6).sqrt()  # its gradient at 0 is infinite without
    heat_BKHW = (1 - distance_BKHW * config.skip_strides[-1] / config.heat_reach).clamp(min=0) * thing_B1HW
    heat_BKHW = heat_BKHW * (score_BK > _NO_PEAK)[..., None, None]
    missing = config.pisr.instances - best_BK.shape[1]
    return F.pad(heat_BKHW, (0, 0, 0, 0, 0, missing)) if missing else heat_BKHW


class Decoder(nn.Module):
    """Context by atrous spatial pyramid pooling, then finer features one after the other (D)."""

    def __init__(self, backbone: Backbone, config: PanopticDeeplabConfig, width: int) -> None:
        super().__init__()
        top = max(range(len(backbone.strides)), key=lambda i: (backbone.strides[i], i))
        self.used = [top, *(_feature_at(backbone, stride) for stride in config.skip_strides)]
        self.context = Context(backbone.channels[top], config)
        self.projections, self.fusions = nn.ModuleList(), nn.ModuleList()
        below = config.context_channels
        for feature, channels in zip(self.used[1:], config.skip_channels, strict=True):
            self.projections.append(_convolution(backbone.channels[feature], channels, 1))
            self.fusions.append(_separable(below + channels, width, 5))
            below = width

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps of the backbone -> (B, width, H', W') at the last skip's stride."""
        x_BCHW = self.context(features[self.used[0]])
        for feature, project, fuse in zip(self.used[1:], self.projections, self.fusions, strict=True):
            finer_BCHW = project(features[feature])
            x_BCHW = F.interpolate(x_BCHW, finer_BCHW.shape[-2:], mode="bilinear", align_corners=False)
            x_BCHW = fuse(torch.cat([finer_BCHW, x_BCHW], 1))
        return x_BCHW


def _feature_at(backbone: Backbone, stride: int) -> int:
    if stride not in backbone.strides:
        raise TesseraError(
            f"panoptic_deeplab: the backbone has features at strides {backbone.strides}, not at {stride}"
        )
    return backbone.strides.index(stride)


class Context(nn.Module):
    """Atrous spatial pyramid pooling: one pixel, three reaches and the whole map at once (D)."""

    def __init__(self, inputs: int, config: PanopticDeeplabConfig) -> None:
        super().__init__()
        width = config.context_channels
        reaches = [_separable(inputs, width, 3, rate) for rate in config.context_rates]
        self.branches = nn.ModuleList([_convolution(inputs, width, 1), *reaches])
        self.whole = _convolution(inputs, width, 1)
        self.project = nn.Sequential(_convolution((2 + len(reaches)) * width, width, 1), nn.Dropout(config.dropout))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, context_channels, H, W)."""
        whole_BC11 = self.whole(x_BCHW.mean((2, 3), keepdim=True))
        parts = [branch(x_BCHW) for branch in self.branches]
        return self.project(torch.cat([*parts, whole_BC11.expand_as(parts[0])], 1))


class Heads(nn.Module):
    """Features of the two decoders -> Dense at their stride, offsets in pixels of that stride."""

    def __init__(self, semantic: int, instance: int, categories: int, config: PanopticDeeplabConfig) -> None:
        super().__init__()
        self.classes = _head(semantic, config.semantic_channels, categories)
        self.heat = _head(instance, config.head_channels, 1)
        self.offset = _head(instance, config.head_channels, 2)

    def forward(self, semantic_BSHW: Tensor, instance_BIHW: Tensor) -> Dense:
        """See the class."""
        return self.classes(semantic_BSHW), self.heat(instance_BIHW), self.offset(instance_BIHW)


def _head(inputs: int, width: int, outputs: int) -> nn.Sequential:
    predictor = nn.Conv2d(width, outputs, 1)
    nn.init.normal_(predictor.weight, std=1e-3)  # D: begin undecided
    nn.init.zeros_(predictor.bias)  # type: ignore[arg-type]
    return nn.Sequential(_separable(inputs, width, 5), predictor)


def _separable(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """A convolution within channels, then one between them."""
    return nn.Sequential(
        _convolution(inputs, inputs, kernel, dilation, groups=inputs), _convolution(inputs, outputs, 1)
    )


def _convolution(inputs: int, outputs: int, kernel: int, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    """Group norms where D has batch norms over all workers: images do not depend on each other (ours)."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, 1, dilation * (kernel // 2), dilation, groups, bias=False),
        nn.GroupNorm(_groups(outputs), outputs),
        nn.ReLU(inplace=True),
    )


def _groups(channels: int) -> int:
    """Groups of about 16 channels."""
    return next(n for n in range(max(1, channels // 16), 0, -1) if channels % n == 0)
