"""Batch: what every method's losses see."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preprocessing.panoptic_map import Segment
from preprocessing.sample import Sample

VOID = -1
"""Category of pixels that belong to no segment."""


@dataclass(frozen=True)
class Batch:
    """B samples of one grid (H, W); tables are padded to N rows, row 0 is void.

    A pixel's label indexes its sample's rows, so any per-segment value becomes a per-pixel map by one
    gather. Padding and void rows: category VOID, flags false, area 0, centroid 0.
    """

    keys: tuple[str, ...]
    """Sample keys, for messages."""
    images_B3HW: Tensor
    """uint8 RGB, in channels-last memory, as it was decoded."""
    labels_BHW: Tensor
    """uint8, or int32 where a sample has more than 255 segments; 0 = void."""
    d2_BH2W: Tensor | None
    """int16, squared pixels to the nearest boundary between categories, and to the nearest border of a thing, clipped;
    None where neither the shards nor the crops have any."""
    category_BN: Tensor
    """int64, contiguous id."""
    thing_BN: Tensor
    """bool: a thing that is no crowd, so that it has a centroid."""
    crowd_BN: Tensor
    """bool."""
    area_BN: Tensor
    """float32, pixels."""
    centroid_BN2: Tensor
    """float32, x and y in [-1, 1]: -1 and 1 are the outer edges of the image's border pixels."""

    @property
    def classes_BHW(self) -> Tensor:
        """int64 contiguous ids, VOID where there is none."""
        return self.to_pixels(self.category_BN)

    def to_pixels(self, rows_BN: Tensor) -> Tensor:
        """A value per segment -> a value per pixel, (B, H, W)."""
        return rows_BN.gather(1, self.labels_BHW.long().flatten(1)).view(self.labels_BHW.shape)

    def __getitem__(self, part: slice) -> "Batch":
        """Some of the samples, without a copy."""
        return replace(self._each(lambda tensor: tensor[part]), keys=self.keys[part])

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; the DataLoader calls it."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "keys"}
        changed: dict[str, Any] = {name: change(t) for name, t in tensors.items() if t is not None}
        return replace(self, **changed)


@dataclass(frozen=True)
class Example:
    """One decoded sample, in arrays."""

    key: str
    image_HW3: np.ndarray
    """uint8 RGB."""
    labels_HW: np.ndarray
    d2_H2W: np.ndarray | None
    """int16: squared distances of the semantic and of the instance task, where they are wanted."""
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, key: str, sample: Sample) -> "Example":
        """A sample with its image decoded. Raises what `Sample.decoded` does."""
        return cls(key, sample.decoded(), sample.labels, sample.d2, sample.segments)

    def flipped(self) -> "Example":
        """Mirrored left to right; stored targets stay exact."""
        width = self.labels_HW.shape[1]
        mirrored = tuple(_mirrored(segment, width) for segment in self.segments)
        d2_H2W = None if self.d2_H2W is None else self.d2_H2W[..., ::-1]
        image_HW3 = np.empty(self.image_HW3.shape, np.uint8)
        for channel in range(3):  # one by one: a fifth of the time of all at once
            image_HW3[..., channel] = self.image_HW3[:, ::-1, channel]
        return Example(self.key, image_HW3, self.labels_HW[:, ::-1], d2_H2W, mirrored)


def _mirrored(segment: Segment, width: int) -> Segment:
    x, y, box_width, height = segment.box
    centroid = segment.centroid and (width - 1 - segment.centroid[0], segment.centroid[1])
    return replace(segment, box=(width - x - box_width, y, box_width, height), centroid=centroid)


def collate(examples: Sequence[Example]) -> Batch:
    """Stack examples of one grid. `Segment.box` is not carried: no loss here wants it."""
    rows = 1 + max(len(e.segments) for e in examples)
    shape = (len(examples), rows)
    category, area = np.full(shape, VOID, np.int64), np.zeros(shape, np.float32)
    thing, crowd = np.zeros(shape, bool), np.zeros(shape, bool)
    centroid = np.zeros((*shape, 2), np.float32)
    for b, example in enumerate(examples):
        height, width = example.labels_HW.shape
        for s in example.segments:
            category[b, s.id], area[b, s.id], crowd[b, s.id] = s.category, s.area, s.is_crowd
            if s.centroid is not None:
                thing[b, s.id] = True
                x, y = s.centroid
                centroid[b, s.id] = (2 * x + 1) / width - 1, (2 * y + 1) / height - 1

    d2 = [e.d2_H2W for e in examples if e.d2_H2W is not None]
    return Batch(
        keys=tuple(e.key for e in examples),
        images_B3HW=_stack([e.image_HW3 for e in examples], np.uint8).permute(0, 3, 1, 2),
        labels_BHW=_stack([e.labels_HW for e in examples], np.uint8 if rows <= 256 else np.int32),
        d2_BH2W=_stack(d2, np.int16) if len(d2) == len(examples) else None,
        category_BN=torch.from_numpy(category),
        thing_BN=torch.from_numpy(thing),
        crowd_BN=torch.from_numpy(crowd),
        area_BN=torch.from_numpy(area),
        centroid_BN2=torch.from_numpy(centroid),
    )


def _stack(maps: Sequence[np.ndarray], dtype: type) -> Tensor:
    stacked = np.empty((len(maps), *maps[0].shape), dtype)
    for b, one in enumerate(maps):  # row by row: np.stack is thrice as slow on mirrored views
        stacked[b] = one
    return torch.from_numpy(stacked)
