"""Options of the generalist method; every default is the paper's (G), or says whose it is."""

from dataclasses import dataclass, field
from typing import Literal

from infra.errors import TesseraError
from training.backbones import BackboneConfig, VitConfig


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
    min_area: float = 1e-4
    """Share of the grid's pixels under which an instance is dropped."""
    min_stuff_area: float = 0.0
    """Share of the image's pixels under which a stuff segment becomes void (Painter: 8192 px)."""


@dataclass(frozen=True, kw_only=True)
class GeneralistConfig:
    """One resolved set of options."""

    backbone: BackboneConfig = field(default_factory=VitConfig)
    decoder_widths: tuple[int, int, int, int, int] = (256, 256, 256, 256, 256)
    """Channels before the first and after each of the four transposed convolutions. G gives only totals;
    these reach them: 91.9M (Base), 310M (Large)."""
    frequencies: int = 4
    """L: the embedding has 4 L channels."""
    half_period: bool = False
    """Ours: base frequency pi/2, so that the two borders of the image have different codes."""
    relative: bool = False
    """Ours: the head predicts the embedding of (centroid - pixel), a fixed rotation makes it the centroid's."""
    squared: bool = False
    """Ours: squared instead of plain Euclidean embedding distance, which leaves the all-void answer."""
    eds_distance: float = 20.0
    """D of Edge Distance Sampling in pixels of the grid (20 at 420 x 420); 0 switches EDS off."""
    eds_min: float = 0.0
    """w_min."""
    total_variation: float = 0.1
    """Weight, both tasks."""
    dice: float = 1.0
    """Weight of the generalised Dice loss, instance task."""
    tasks: Literal["alternate", "joint"] = "alternate"
    """alternate: a batch serves one task, instance twice as likely; joint (ours): each batch serves both."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        if self.frequencies < 1:
            raise TesseraError(f"generalist: frequencies {self.frequencies} must be at least 1")
        if not 0 <= self.eds_min <= 1 or self.eds_distance < 0:
            raise TesseraError(f"generalist: eds_min {self.eds_min} and eds_distance {self.eds_distance}")

    @property
    def eds_radius(self) -> float:
        """Distances beyond this many pixels weigh nothing that 8 bits could show."""
        return 2.5 * self.eds_distance
