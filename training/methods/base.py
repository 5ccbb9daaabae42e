"""What the trainer, the evaluator and the flows know of a method, and nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from preprocessing.geometry import Frame, Size
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap
from preprocessing.pictures import Picture
from preprocessing.sample import framed_image
from training.backbones.base import Backbone
from training.backbones.weights import LoadReport
from training.batch import Batch

Outputs = Any
"""What a method's network returns: a tensor or a tuple of tensors; only its own decoding looks inside."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What a recipe knows of a method's options."""

    version: ClassVar[int] = 1
    """Part of every run's path: raise it when the same options would train differently."""
    backbone: Any
    """A config of training.backbones."""
    decode: Any
    """Options of decoding, a frozen dataclass; no part of training."""

    @property
    def distance_radius(self) -> float:
        """Pixels up to which the method reads a shard's boundary distances; 0: it does not."""
        return 0.0


class Method(nn.Module, ABC):
    """A panoptic method: network, losses and decoding.

    `network` maps a uint8 or float image tensor (B, 3, H, W), 0-255, to tensors, without data-dependent
    control flow; decoding stays outside, so the network compiles and exports.
    """

    network: Any
    """A module with a `backbone`."""
    config: Any
    """The method's own MethodConfig; `config.decode` can be exchanged after training."""
    alternates: bool = False
    """Whether a step may leave some parameters without gradient."""

    def __init__(self, labels: LabelTable, frame: Frame) -> None:
        super().__init__()
        self.labels = labels
        self.frame = frame

    @property
    def grid(self) -> Size:
        """Height, width of the images that the network takes in evaluation."""
        return self.frame.size

    @property
    def images_at_once(self) -> int:
        """Images of a batch in evaluation: 16 of up to 512 x 512 pixels, fewer of larger ones."""
        return max(1, min(16, 2**22 // (self.grid[0] * self.grid[1])))

    @property
    def backbone(self) -> Backbone:
        """The network's encoder."""
        return self.network.backbone

    @property
    @abstractmethod
    def output_notes(self) -> dict[str, str]:
        """The tensors of the network's outputs in their order: a name, and what it is, in one line; for exports."""

    @abstractmethod
    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Weighted float32 scalars by name; their sum is what training minimises.

        `step` is the optimizer step, for methods whose batches alternate between tasks.
        """

    @abstractmethod
    def decode(self, outputs: Outputs, sizes: Sequence[Size]) -> list[PanopticMap]:
        """What the network said of a batch -> one panoptic map an image, at the given (height, width)."""

    @abstractmethod
    def views(self, outputs: Outputs) -> list[dict[str, Picture]]:
        """What the network said before decoding, as pictures of the grid by title, a dict an image; for reports."""

    @abstractmethod
    def ideal(self, batch: Batch) -> Outputs:
        """What a perfect network would say of a batch; decoding it bounds what the method can reach."""

    def inputs(self, pictures: Sequence[Picture]) -> Tensor:
        """Decoded images of any size -> uint8 (B, 3, H, W) on the grid and on the method's device."""
        framed = [framed_image(Image.fromarray(picture), self.frame) for picture in pictures]
        images_BHW3 = torch.from_numpy(np.stack(framed))
        return images_BHW3.to(next(self.parameters()).device).permute(0, 3, 1, 2).contiguous()

    @torch.inference_mode()
    def predict(self, images_B3HW: Tensor) -> Outputs:
        """uint8 images on the grid -> the network's outputs."""
        return self.network(images_B3HW)

    def segment(self, images_B3HW: Tensor, sizes: Sequence[Size]) -> list[PanopticMap]:
        """uint8 images on the grid -> one panoptic map each, at the given (height, width)."""
        return self.decode(self.predict(images_B3HW), sizes)

    def load_pretrained(self) -> LoadReport | None:
        """Published weights into the backbone, where the config names some; see Backbone.load_pretrained."""
        return self.backbone.load_pretrained()

    def parameter_groups(self, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups covering every trainable parameter once; each has `lr` and `weight_decay`.

        Layer l of a backbone of depth n learns at lr x layer_decay^(n + 1 - l), everything else at lr.
        Vectors (biases, norms, tokens) are not decayed.
        """
        layers = {id(p): self.backbone.layer_of(name) for name, p in self.backbone.named_parameters()}
        top = self.backbone.depth + 1
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for parameter in self.parameters():
            if parameter.requires_grad:
                matrix = sum(side > 1 for side in parameter.shape) > 1
                key = (layers.get(id(parameter), top), matrix)
                groups.setdefault(key, []).append(parameter)
        return [
            {"params": found, "lr": lr * layer_decay ** (top - layer), "weight_decay": weight_decay * matrix}
            for (layer, matrix), found in sorted(groups.items())
        ]

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The same as `losses`: DistributedDataParallel synchronises gradients of `forward` only."""
        return self.losses(batch, step)
