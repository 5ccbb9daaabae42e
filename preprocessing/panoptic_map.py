"""PanopticMap: the one currency between sources, methods and the evaluator."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from infra.errors import TesseraError
from preprocessing.kernels import measure


@dataclass(frozen=True)
class Segment:
    """One row of a panoptic map's table."""

    id: int
    """The value of its pixels in `PanopticMap.ids`, where 0 is void; 0 in rows that `measured` has yet to number."""
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


def measured(labels_HW: NDArray[np.uint16], segments: Sequence[Segment]) -> list[Segment]:
    """The segments with area, box and centroid as their pixels have them.

    labels_HW: uint16 (H, W), 0 = void; segments[i] has the label i + 1, which becomes its id. Segments
    without pixels get area 0.
    """
    return tabulate(segments, *measure(labels_HW, len(segments)))


def visible(
    labels_HW: NDArray[np.uint16], segments: Sequence[Segment]
) -> tuple[NDArray[np.uint16], tuple[Segment, ...]]:
    """`measured`, without the segments that have no pixel: labels and ids are 1..N again."""
    found = measured(labels_HW, segments)
    kept = [s for s in found if s.area > 0]
    if len(kept) == len(found):
        return labels_HW, tuple(found)
    renumber_N = np.zeros(len(found) + 1, np.uint16)
    renumber_N[[s.id for s in kept]] = np.arange(1, len(kept) + 1)
    return renumber_N[labels_HW], tuple(replace(s, id=i) for i, s in enumerate(kept, start=1))


def tabulate(
    segments: Sequence[Segment],
    area_N: NDArray[np.int64],
    box_N4: NDArray[np.int64],
    centroid_N2: NDArray[np.float64],
) -> list[Segment]:
    """The segments with what `kernels.measure` found: row i + 1 is segments[i]'s, and its id."""
    result = []
    for label, segment in enumerate(segments, start=1):
        x, y, width, height = (int(value) for value in box_N4[label])
        has_centroid = segment.is_thing and not segment.is_crowd and area_N[label] > 0
        centroid = (float(centroid_N2[label, 0]), float(centroid_N2[label, 1])) if has_centroid else None
        area = int(area_N[label])
        result.append(replace(segment, id=label, area=area, box=(x, y, width, height), centroid=centroid))
    return result
