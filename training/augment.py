"""Augmentation beyond flips: a random scale and crop, with targets measured anew."""

from dataclasses import dataclass

from infra.errors import TesseraError
from preprocessing.geometry import Size


@dataclass(frozen=True, kw_only=True)
class Crop:
    """What of an image the network sees in training: scaled at random, its aspect kept, then cut out at random.

    Where the scaled image is smaller than the crop, it lies at the upper left and the rest is padding, void.
    """

    size: Size
    """Height, width of the crop."""
    short_side: tuple[int, int]
    """Least and most pixels of the scaled image's shorter side; all between are as likely."""
    long_side: int
    """Most pixels of the scaled image's longer side; it bounds the shorter one where both cannot be."""

    def __post_init__(self) -> None:
        least, most = self.short_side
        if min(self.size) < 1 or not 1 <= least <= most <= self.long_side:
            raise TesseraError(f"crop: size {self.size}, short side {least} to {most}, long side {self.long_side}")
