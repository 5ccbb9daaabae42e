"""Overlays: void is hatched, names stand in their segments, and nothing that a category is called ends a picture."""

import base64
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from preprocessing.labels import Category, LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment
from preprocessing.pictures import LARGE, SMALL, encode, fitted, hatching, overlay_at, panoptic_overlay


def table(*names: str) -> LabelTable:
    return LabelTable(tuple(Category(i, name, True, (30, 160, 90)) for i, name in enumerate(names, start=1)))


def halves(height: int = 200, width: int = 400, category: int = 0, crowd: bool = False) -> PanopticMap:
    """Void on the left, one segment on the right."""
    ids = np.zeros((height, width), np.int32)
    ids[:, width // 2 :] = 7
    return PanopticMap(ids, (Segment(7, category, False, crowd),))


def plain(name: str = " ", **of: int | bool) -> np.ndarray:
    """The overlay of `halves` on a gray image."""
    panoptic = halves(**of)
    return panoptic_overlay(np.full((*panoptic.size, 3), 120, np.uint8), panoptic, table(name))


def written(name: str, **of: int | bool) -> np.ndarray:
    """bool (H, W): where the overlay is neither the segment's one colour, nor border, nor void, but a name."""
    picture, panoptic = plain(name, **of), halves(**of)
    inside = panoptic.ids > 0
    inside[:, : panoptic.size[1] // 2 + 2] = False
    return inside & (picture != picture[-1, -1]).any(-1)


def test_void_is_the_darkened_image_under_a_hatching():
    void = plain()[:, : halves().size[1] // 2 - 1]
    lines = hatching(halves().size)[:, : void.shape[1]]
    assert 0.1 < lines.mean() < 0.4
    assert (void[~lines] == 48).all()
    assert (void[lines] > 120).all()


def test_a_segment_has_its_name_in_it_white_on_black():
    mask = written("door;double door")
    rows, columns = np.nonzero(mask)
    assert mask.sum() > 100
    assert abs(rows.mean() - 100) < 10
    assert abs(columns.mean() - 300) < 20
    pixels = plain("door;double door")[mask]
    assert (pixels > 250).all(-1).any()
    assert (pixels < 5).all(-1).any()


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("door;double door", "door", True),
        ("bus, autobus, coach", "bus", True),
        ("screen door of a very long name", "screen door of a very long game", True),
        ("door", "wall", False),
        ("日本", "#1", True),
        ("", "#1", True),
        ("; ,", "#1", True),
    ],
)
def test_of_several_names_the_first_stands_and_the_number_for_what_cannot_be_written(one: str, other: str, alike: bool):
    assert (plain(one) == plain(other)).all() == alike


def test_a_crowd_is_told_from_one_thing():
    assert written("door", crowd=True).sum() > written("door").sum() > 0


def test_there_is_no_name_where_there_is_no_room():
    assert not written("door", height=8, width=16).any()
    assert not written("door", height=200, width=20).any()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_whatever_it_is_called_and_however_small_it_can_be_drawn(name: str, height: int, width: int, seed: int):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 4, (height, width)).astype(np.int32)
    segments = tuple(Segment(int(i), 0, bool(i % 2), bool(i == 3)) for i in np.unique(ids) if i)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    drawn = overlay_at(image, PanopticMap(ids, segments), table(name), fitted((height, width)))
    assert drawn.shape[:2] == fitted((height, width))
    assert drawn.dtype == np.uint8


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((480, 640), (480, 640)),
        ((3000, 4000), (600, LARGE)),
        ((40, 50), (320, SMALL)),
        ((1, 1), (SMALL, SMALL)),
        ((1, 9000), (1, LARGE)),
    ],
)
def test_pictures_of_pages_are_large_enough_to_see_and_not_larger(shape: tuple[int, int], size: tuple[int, int]):
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    shown = Image.open(io.BytesIO(base64.b64decode(encode(picture, shape))))
    assert (shown.height, shown.width) == fitted(shape) == size
    if max(shape) <= 50:  # enlarged pixels stay what they are
        scale = SMALL // max(shape)
        assert (np.asarray(shown)[::scale, ::scale] == picture).all()
