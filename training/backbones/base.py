"""What a method knows of an encoder: an image in, feature maps with known channels and strides out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infra.errors import TesseraError
from training.backbones.weights import LoadReport, State, read_weights

IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""Mean and standard deviation, RGB 0-255, that most published weights were trained with."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What all encoders share."""

    weights: str | None = None
    """Where pretrained weights come from, see weights.read_weights; None: from scratch."""

    @property
    def stride(self) -> int:
        """Pixels of a grid come in multiples of it; of most pyramids 32."""
        return 32


class Backbone(nn.Module, ABC):
    """Images (B, 3, H, W), 0-255 -> one feature map per entry of `channels`, at `strides`."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    depth: int
    """Layers for layer-wise learning rates; layer 0 is what comes before the first one."""
    mean_1311: Tensor
    std_1311: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.weights = config.weights
        mean, std = self.statistics()
        self.register_buffer("mean_1311", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std_1311", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """uint8 or float images -> features."""
        return self.features((images_B3HW.to(self.mean_1311.dtype) - self.mean_1311) / self.std_1311)

    @abstractmethod
    def features(self, normal_B3HW: Tensor) -> list[Tensor]:
        """Normalised images -> one map per entry of `channels`."""

    @abstractmethod
    def layer_of(self, name: str) -> int:
        """Layer, 0..depth, of the parameter of that name."""

    def statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation of the pixels, RGB 0-255, that the weights expect."""
        return IMAGENET

    def load_state(self, state: State) -> LoadReport:
        """Take published weights over, by this backbone's own naming. TesseraError where they do not fit."""
        raise TesseraError(f"{type(self).__name__} has none to load; leave `weights` empty")

    def load_pretrained(self) -> LoadReport | None:
        """Load what the config's `weights` names; None if it names nothing.

        Raises TesseraError naming the source when it cannot be read, is no state dict, or does not fit.
        """
        if self.weights is None:
            return None
        state = read_weights(self.weights)
        try:
            return self.load_state(state)
        except TesseraError as error:
            raise TesseraError(f"weights {self.weights}: {error}") from error


class FrozenNorms(Backbone):
    """A backbone whose batch norms keep their published statistics: our batches per worker are small."""

    def train(self, mode: bool = True) -> "FrozenNorms":
        """See nn.Module; norms stay in evaluation mode where the weights are pretrained."""
        super().train(mode)
        if self.weights is not None:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self
