"""Options of the generalist method; every default is the paper's (G), or says whose it is."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from infra.errors import TesseraError
from training.backbones import AnyBackboneConfig, VitConfig
from training.methods.base import MethodConfig


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """From network outputs to segments. G names the grid, the NMS and the votes; their numbers are ours."""

    grid: int = 80
    """Candidate centroids per axis (G: 80 x 80)."""
    reach: float = 2.5
    """Cells: votes this near to a peak are the same instance's, unless they place themselves better alone."""
    split: float = 0.25
    """Two groups of votes stay apart when their summed squared error against their own centroids is below
    this share of that against their common one. 0: never apart within `reach`."""
    min_area: float = 2e-5
    """Share of the grid's pixels under which an instance is dropped (G is silent): 4 px at 420 x 420, which costs a
    perfect network nothing on COCO; a report says what a run's own value costs."""
    min_stuff_area: float = 0.0
    """Share of the image's pixels under which a stuff segment becomes void (Painter: 8192 px)."""

    def __post_init__(self) -> None:
        shares = 0 <= self.min_area < 1 and 0 <= self.min_stuff_area < 1
        if not (self.grid >= 1 and self.reach >= 0 and self.split >= 0 and shares):
            raise TesseraError(f"decode: grid from 1, reach and split from 0, areas in [0, 1): {self}")

    candidates: ClassVar[dict[str, tuple[float, ...]]] = {
        "min_stuff_area": (0.0, 0.002, 0.005, 0.01, 0.02),
        "min_area": (0.0, 2e-5, 1e-4, 5e-4, 2e-3, 5e-3),
        "reach": (1.5, 2.5, 4.0, 6.0, 9.0, 12.0, 16.0),
        "split": (0.0, 0.1, 0.25, 0.5),
    }
    """What evaluation.tune tries."""


@dataclass(frozen=True, kw_only=True)
class GeneralistConfig(MethodConfig):
    """One resolved set of options."""

    backbone: AnyBackboneConfig = field(default_factory=VitConfig)
    decoder_widths: tuple[int, int, int, int, int] = (256, 256, 256, 256, 256)
    """Channels before the first and after each of the four transposed convolutions. G gives only totals;
    these reach them: 91.9M (Base), 310M (Large)."""
    encoding: Literal["embedding", "direct", "classes"] = "embedding"
    """What the instance head says of the centroid (u, v): its positional embedding, 4 L channels; u, v in [0, 1] and
    1 for "is instance", 3 channels; or one of `cells` classes for each axis and one for void, 2 (cells + 1) channels
    (G compares with 80 + 80; the void class is ours)."""
    frequencies: int = 4
    """L, of the positional embedding."""
    cells: int = 80
    """Classes per axis, of the encoding by classes."""
    half_period: bool = False
    """Ours: base frequency pi/2, so that the two borders of the image have different codes."""
    relative: bool = False
    """Ours: the head predicts the code of (centroid - pixel), which a fixed linear map makes the centroid's: a rotation
    of embeddings, a shift of direct regression."""
    squared: bool = False
    """Ours: squared instead of plain Euclidean embedding distance, which leaves the all-void answer."""
    eds_distance: float = 20.0
    """D of Edge Distance Sampling in pixels of the grid (20 at 420 x 420); 0 switches EDS off."""
    eds_min: float = 0.0
    """w_min."""
    boundaries: Literal["task", "panoptic"] = "task"
    """Edges that EDS measures from: those of each task's own map (G), or all edges of the panoptic map."""
    void_kept: bool = True
    """Whether pixels without instance, stuff included, take part in the instance task's losses. Left out, the
    semantic head alone says where instances are."""
    total_variation: float = 0.1
    """Weight, both tasks."""
    dice: float = 1.0
    """Weight of the generalised Dice loss, instance task."""
    tasks: Literal["alternate", "joint"] = "alternate"
    """alternate: a batch serves one task, instance twice as likely; joint (ours): each batch serves both."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        if min(self.frequencies, self.cells, *self.decoder_widths) < 1:
            raise TesseraError("generalist: frequencies, cells and decoder_widths must be at least 1")
        if self.encoding == "classes" and self.relative:
            raise TesseraError("generalist: relative is not for classes, set it to false")
        if self.encoding != "embedding" and self.half_period:
            raise TesseraError(f"generalist: half_period is for embeddings, set it to false for {self.encoding!r}")
        if self.encoding == "classes" and self.squared:
            raise TesseraError("generalist: classes have no distance that could be squared")
        if not (0 <= self.dice < math.inf and 0 <= self.total_variation < math.inf):
            raise TesseraError(f"generalist: dice {self.dice} and total_variation {self.total_variation} are weights")
        if not (0 <= self.eds_min <= 1 and 0 <= self.eds_distance < math.inf):
            raise TesseraError(
                f"generalist: eds_min {self.eds_min} is not in [0, 1], or eds_distance {self.eds_distance} no distance"
            )

    @property
    def instance_channels(self) -> int:
        """Channels of the instance head."""
        return {"embedding": 4 * self.frequencies, "direct": 3, "classes": 2 * (self.cells + 1)}[self.encoding]

    @property
    def distance_radius(self) -> float:
        """See MethodConfig. Beyond it nothing weighs what 8 bits could show."""
        return 2.5 * self.eds_distance
