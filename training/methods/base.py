"""What the trainer, the evaluator and the flows know of a method, and nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from preprocessing.geometry import Size
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap
from training.batch import Batch

Picture = NDArray[np.uint8]
"""RGB, (H, W, 3)."""


class Method(nn.Module, ABC):
    """A panoptic method: network, losses and decoding.

    `network` maps a uint8 or float image tensor (B, 3, H, W), 0-255, to tensors, without data-dependent
    control flow; decoding stays outside, so the network compiles and exports.
    """

    network: nn.Module
    alternates: bool = False
    """Whether a step may leave some parameters without gradient."""

    def __init__(self, labels: LabelTable, grid: Size) -> None:
        super().__init__()
        self.labels = labels
        self.grid = grid
        """Height, width of the images the network takes."""

    @abstractmethod
    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Weighted float32 scalars by name; their sum is what training minimises.

        `step` is the optimizer step, for methods whose batches alternate between tasks.
        """

    @abstractmethod
    def segment(self, images_B3HW: Tensor, sizes: Sequence[Size]) -> list[PanopticMap]:
        """uint8 images on the grid -> one panoptic map each, at the given (height, width)."""

    @abstractmethod
    def views(self, images_B3HW: Tensor) -> list[dict[str, Picture]]:
        """What the network says before decoding, as pictures by title; for reports."""

    @abstractmethod
    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups covering every trainable parameter once; each has `lr` and `weight_decay`."""

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The same as `losses`: DistributedDataParallel synchronises gradients of `forward` only."""
        return self.losses(batch, step)
