"""PanopticMap: the one currency between sources, methods and the evaluator."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infra.errors import TesseraError


@dataclass(frozen=True)
class Segment:
    """One row of a panoptic map's table."""

    id: int
    """The value of its pixels in `PanopticMap.ids`; never 0."""
    category: int
    """Contiguous id of the LabelTable."""
    is_thing: bool
    is_crowd: bool = False
    area: int = 0
    """Pixels, counted (never taken from a file)."""
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    """x, y, width, height in pixels."""
    centroid: tuple[float, float] | None = None
    """x, y in pixels, pixel centres at integers; None for stuff and crowds, which have no single one."""


@dataclass(frozen=True)
class PanopticMap:
    """Every pixel belongs to exactly one segment, or to none (void).

    ids: int32, (H, W); 0 is void. segments: one row per id that occurs in `ids`.
    """

    ids: NDArray[np.int32]
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.dtype != np.int32:
            raise TesseraError(f"panoptic map: expected int32 (H, W), got {self.ids.dtype} {self.ids.shape}")

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""
        return self.ids.shape[0], self.ids.shape[1]
