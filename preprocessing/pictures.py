"""Pictures of panoptic maps, and how pages hold them."""

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from infra.text import shown
from preprocessing.geometry import Size, resize_labels
from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment

Picture = NDArray[np.uint8]
"""RGB, (H, W, 3)."""

LARGE, SMALL = 800, 400
"""Longest side of pictures in pages, pixels: of images and their segments; of what a network says on its grid."""
_NAME = 20
"""Characters of a category's name in a picture."""
_INSIDE = 0.6
"""Share of a name's rectangle that must lie in its segment."""


@dataclass(frozen=True)
class Panel:
    """Pictures of one image."""

    file_name: str
    pictures: Mapping[str, str]
    """By title, base64 of WebP. What follows ": " in a title explains it."""


def panoptic_overlay(image_HW3: Picture, panoptic: PanopticMap, labels: LabelTable) -> Picture:
    """Segments in their category's colour over the image, each thing in a shade of its own, with their names.

    Borders between segments are white, so that neighbours of one category can be told apart. Void is the image,
    darkened and hatched, so that one sees what is left out. Names stand where there is room for them.
    """
    ids_HW, rows = np.unique(panoptic.ids, return_inverse=True)
    color_by_id = {s.id: _shade(labels.colors[s.category], s.id if s.is_thing else 0) for s in panoptic.segments}
    palette = np.array([color_by_id.get(int(i), np.zeros(3)) for i in ids_HW], np.float32)
    painted_HW3 = palette[rows.reshape(panoptic.ids.shape)]
    hatched_HW3 = 0.4 * image_HW3 + 100 * hatching(panoptic.size)[..., None]
    mixed = np.where((panoptic.ids > 0)[..., None], 0.35 * image_HW3 + 0.65 * painted_HW3, hatched_HW3)
    mixed[_borders(panoptic.ids)] = 255
    return _named(mixed.astype(np.uint8), panoptic, labels)


def hatching(size: Size) -> NDArray[np.bool_]:
    """Diagonal lines, (H, W), as wide as the picture asks for."""
    period = max(6, max(size) // 60)
    rows, columns = np.ogrid[: size[0], : size[1]]
    lines: NDArray[np.bool_] = (rows + columns) % period < max(1, period // 5)
    return lines


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


def _named(picture: Picture, panoptic: PanopticMap, labels: LabelTable) -> Picture:
    """Names of the categories in their segments, white with a black rim, the largest segments first.

    Places are sought on every few pixels, so that they cost the same for pictures of any size.
    """
    size = max(11, max(panoptic.size) // 36)
    font, step, rim = _font(size), max(2, size // 4), max(1, size // 9)
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    cells_HW = panoptic.ids[step // 2 :: step, step // 2 :: step].copy()
    areas = dict(zip(*(found.tolist() for found in np.unique(cells_HW, return_counts=True)), strict=True))
    for segment in sorted(panoptic.segments, key=lambda s: (-areas.get(s.id, 0), s.id)):
        text = _short(segment, labels)
        left, top, right, bottom = draw.textbbox((0, 0), text, font, stroke_width=rim)
        room = -int(top - bottom) // step + 1, -int(left - right) // step + 1
        place = _place(cells_HW, segment.id, room) if areas.get(segment.id, 0) >= _INSIDE * room[0] * room[1] else None
        if place is not None:
            row, column = place
            cells_HW[row : row + room[0], column : column + room[1]] = _TAKEN
            corner = column * step - left, row * step - top
            draw.text(corner, text, "white", font, stroke_width=rim, stroke_fill="black")
    return np.asarray(canvas)


_TAKEN = -1
"""Cells with a name in them; no id is negative."""


def _place(cells_HW: NDArray[np.int32], segment: int, room: Size) -> tuple[int, int] | None:
    """Row and column of the corner of `room` cells, most of them in the segment, none taken; near its centroid."""
    if room[0] > cells_HW.shape[0] or room[1] > cells_HW.shape[1]:
        return None
    worth_HW = (cells_HW == segment) - (cells_HW == _TAKEN) * cells_HW.size
    sums = np.pad(worth_HW.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    height, width = room
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    if inside.max() < _INSIDE * height * width:
        return None
    centre = [np.mean(axis) - (side - 1) / 2 for axis, side in zip(np.nonzero(cells_HW == segment), room, strict=True)]
    rows, columns = np.nonzero(inside == inside.max())
    nearest = np.argmin((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2)
    return int(rows[nearest]), int(columns[nearest])


def _short(segment: Segment, labels: LabelTable) -> str:
    """The first of several names, as "door;double door" in ADE20K, cut; its number if the font cannot write it."""
    category = labels.categories[segment.category]
    name = re.split(r"[;,]", shown(category.name))[0].strip()
    if len(name) > _NAME:
        name = f"{name[: _NAME - 1].rstrip()}…"
    if not name or not all(_writable(character) for character in name):
        name = f"#{category.dataset_id}"
    return f"{name} (crowd)" if segment.is_crowd else name


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which Matplotlib brings along: Pillow's own has no accents."""
    import matplotlib as mpl  # takes longer to import than all of this file needs

    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts/ttf/DejaVuSans-Bold.ttf"), size)


@cache
def _writable(character: str) -> bool:
    """Whether the font has more for it than the box that stands for what it lacks."""
    font = _font(20)
    return character == " " or bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def overlay_panel(image_HW3: Picture, maps: Mapping[str, PanopticMap], labels: LabelTable) -> dict[str, str]:
    """The image and, by title, its maps over it as pages hold them; all of the image's size."""
    shape = image_HW3.shape[0], image_HW3.shape[1]
    found = {"image": encode(image_HW3, shape)}
    for title, panoptic in maps.items():
        found[title] = encode(overlay_at(image_HW3, panoptic, labels, fitted(shape)), shape)
    return found


def overlay_at(image_HW3: Picture, panoptic: PanopticMap, labels: LabelTable, size: Size) -> Picture:
    """`panoptic_overlay` in another size, in which its names and lines are as large as in any."""
    scaled = PanopticMap(resize_labels(panoptic.ids, size), panoptic.segments)
    return panoptic_overlay(_resized(image_HW3, size), scaled, labels)


def fitted(shape: Size, longest: int = LARGE) -> Size:
    """The size at which pages show an image of (height, width) `shape`: shrunk to at most `longest`, small ones
    enlarged by a whole factor."""
    scale = longest / max(shape) if max(shape) > longest else max(1, SMALL // max(shape))
    return max(1, round(scale * shape[0])), max(1, round(scale * shape[1]))


def encode(picture: Picture, shape: Size, longest: int = LARGE) -> str:
    """Base64 of WebP, in the proportions of an image of (height, width) `shape`; pixels that were enlarged stay
    squares."""
    buffer = io.BytesIO()
    image = Image.fromarray(_resized(picture, fitted(shape, longest)))
    enlarged = max(shape) <= SMALL // 2
    # of what is lossless, `quality` is the effort: the least takes a hundredth of the time for an eighth more bytes
    image.save(buffer, "WebP", lossless=enlarged, quality=0 if enlarged else 80, method=0 if enlarged else 2)
    return base64.b64encode(buffer.getvalue()).decode()


def _resized(picture: Picture, size: Size) -> Picture:
    if picture.shape[:2] == size:
        return picture
    resampling = Image.Resampling.BOX if size[1] < picture.shape[1] else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize(size[::-1], resampling))
