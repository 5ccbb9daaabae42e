"""Pictures of panoptic maps."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocessing.geometry import Size
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap

Picture = NDArray[np.uint8]
"""RGB, (H, W, 3)."""


def panoptic_overlay(image_HW3: Picture, panoptic: PanopticMap, labels: LabelTable) -> Picture:
    """Segments in their category's colour over the image, each thing in a shade of its own, void black.

    Borders between segments are white, so that neighbours of one category can be told apart.
    """
    ids_HW, rows = np.unique(panoptic.ids, return_inverse=True)
    color_by_id = {s.id: _shade(labels.colors[s.category], s.id if s.is_thing else 0) for s in panoptic.segments}
    palette = np.array([color_by_id.get(int(i), np.zeros(3)) for i in ids_HW])
    painted_HW3 = palette[rows.reshape(panoptic.ids.shape)]
    mixed = np.where((panoptic.ids > 0)[..., None], 0.35 * image_HW3 + 0.65 * painted_HW3, 0)
    mixed[_borders(panoptic.ids)] = 255
    return mixed.astype(np.uint8)


def _shade(color: NDArray[np.uint8], instance: int) -> NDArray[np.float64]:
    """The colour itself for 0, then a repeatable change of each channel by up to 45."""
    change = np.random.default_rng(instance).uniform(-45, 45, 3) if instance else np.zeros(3)
    return np.clip(color + change, 0, 255)


def _borders(ids_HW: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Pixels whose right or lower neighbour is of another segment."""
    borders = np.zeros(ids_HW.shape, bool)
    borders[:, :-1] |= ids_HW[:, :-1] != ids_HW[:, 1:]
    borders[:-1] |= ids_HW[:-1] != ids_HW[1:]
    return borders


def encode_png(picture: Picture, shape: Size) -> bytes:
    """PNG bytes for a report, in the proportions of an image of (height, width) `shape`.

    Images under 128 px are enlarged by a whole factor, those over 400 px shrunk to it.
    """
    longest = max(shape)
    scale = max(1, 128 // longest) if longest <= 400 else 400 / longest
    size = round(scale * shape[1]), round(scale * shape[0])
    shrinks = size[0] < picture.shape[1]
    buffer = io.BytesIO()
    resampling = Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST
    Image.fromarray(picture).resize(size, resampling).save(buffer, "PNG")
    return buffer.getvalue()
