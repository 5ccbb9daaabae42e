"""Any picture becomes upright RGB or a sentence."""

import io
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from evaluation.images import SUFFIXES, read_image
from infra.errors import TesseraError
from tests.support.odd_images import encoded, readable, rotated_jpeg, scene, unreadable

SCENE = np.asarray(scene())


@pytest.mark.parametrize("name", [*readable()])
def test_every_kind_is_read_as_rgb(name):
    image = read_image(readable()[name])
    assert image.rgb_HW3.dtype == np.uint8
    assert image.rgb_HW3.shape[2:] == (3,)


@pytest.mark.parametrize("name", ["plain.jpg", "palette.png", "animated.gif", "pages.tiff", "small.webp", "cmyk.jpeg"])
def test_colours_and_the_first_frame_survive(name):
    found = read_image(readable()[name]).rgb_HW3.astype(int)
    assert np.abs(found - SCENE).mean() < 12


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [*unreadable()])
def test_what_cannot_be_read_is_refused_in_one_line(name):
    data, told = unreadable()[name]
    with pytest.raises(TesseraError, match=told) as refused:
        read_image(data)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_exif_says_unless_asked_not_to(orientation):
    data = rotated_jpeg(orientation)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    image = read_image(data)
    np.testing.assert_array_equal(image.rgb_HW3, expected)
    assert bool(image.notes) == (orientation != 1)
    assert read_image(data, upright=False).rgb_HW3.shape == SCENE.shape


def test_a_turned_tiff_is_turned_once():
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(scene(), "TIFF", exif=exif)
    np.testing.assert_array_equal(read_image(data).rgb_HW3, np.rot90(SCENE, -1))


def test_damaged_exif_leaves_the_picture_readable():
    data = encoded(scene(), "JPEG", exif=b"Exif\0\0not at all what EXIF should be")
    assert read_image(data).rgb_HW3.shape == SCENE.shape


def test_16_bits_are_scaled_and_not_clipped():
    values_HW = np.array([[0, 257, 65535]], np.uint16)
    found = read_image(encoded(Image.fromarray(values_HW), "PNG"))
    assert found.rgb_HW3[0, :, 0].tolist() == [0, 1, 255]
    assert "65535 scaled" in found.notes[0]


def test_floats_and_constant_values_are_scaled_too():
    ramp_HW = np.array([[-1.0, 0.0, 1.0]], np.float32)
    assert read_image(encoded(Image.fromarray(ramp_HW), "TIFF")).rgb_HW3[0, :, 1].tolist() == [0, 128, 255]
    assert not read_image(encoded(Image.fromarray(ramp_HW * 0 + 7), "TIFF")).rgb_HW3.any()


def test_transparency_is_shown_over_white():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    found = read_image(encoded(clear, "PNG"))
    assert found.rgb_HW3.tolist() == [[[255, 255, 255], [255, 0, 0]]]
    assert found.notes == ("transparency shown over white",)


def test_frames_and_pages_are_named():
    for name in ("animated.gif", "pages.tiff"):
        assert read_image(readable()[name]).notes == ("the first of 2 frames or pages",)


def test_a_first_frame_counts_though_the_second_is_damaged():
    data = readable()["animated.gif"]
    assert read_image(data[:-40]).rgb_HW3.shape == SCENE.shape


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from([n for n in readable() if "/" not in n]), data=st.data())
def test_no_damage_gives_a_traceback(name, data):
    whole = bytearray(readable()[name])
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=5)):
        whole[place] = data.draw(st.integers(0, 255))
    with suppress(TesseraError):
        read_image(bytes(whole[: data.draw(st.integers(1, len(whole)))]))


def test_all_names_of_readable_pictures_are_known():
    names = {f".{name.rsplit('.', 1)[-1].lower()}" for name in readable()}
    assert names <= SUFFIXES
