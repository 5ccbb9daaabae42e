"""One reader of images: the same pixels and the same verdict for every format, in training and for users."""

import io
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from evaluation.coco_files import score_files
from evaluation.images import read_image as read_for_users
from infra.errors import TesseraError
from preprocessing import deep_image
from preprocessing.image_file import read_image
from preprocessing.layouts import read_index
from preprocessing.pnm import read_header
from preprocessing.sample import decode_image
from tests.support.odd_images import chunk, deep_png, encoded, png, readable, scene, tiff, unreadable

CASES = Path(__file__).resolve().parents[3] / "shared/data/cases"
SCENE = np.asarray(scene())
TWELVE = SCENE.astype(np.uint16) * 16 + 7
"""Of a camera that writes 12 bits into 16."""
SHORTS = TWELVE.shape[:2]


def jpeg2000(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values), "JPEG2000", irreversible=False)


def pnm(kind: bytes, values: np.ndarray, most: int) -> bytes:
    head = kind + b"\n# a comment\n%d %d\n%d\n" % (values.shape[1], values.shape[0], most)
    if kind in (b"P2", b"P3"):
        return head + b"\n".join(b" ".join(b"%d" % v for v in row.ravel()) for row in values)
    return head + values.astype(">u2" if most > 255 else "u1").tobytes()


def with_alpha(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, np.full((*SHORTS, 1), 65535, np.uint16)], -1)


def compressed(values: np.ndarray) -> bytes:
    """By LZW, for which Pillow asks libtiff."""
    return encoded(Image.fromarray(values), "TIFF", compression="tiff_lzw")


DEEP = {
    "RGB PNG": deep_png(TWELVE),
    "RGBA PNG": deep_png(with_alpha(TWELVE)),
    "RGB PNG with a key": deep_png(TWELVE, chunk(b"tRNS", b"\xff\xff\0\0\0\0")),
    "RGB TIFF": tiff(TWELVE, 2),
    "RGB TIFF, high byte first": tiff(TWELVE, 2, order=">"),
    "RGB PPM of 65535": pnm(b"P6", TWELVE, 65535),
    "RGB PPM of 4095": pnm(b"P6", TWELVE, 4095),
    "plain PPM": pnm(b"P3", TWELVE, 4095),
}
GRAY = TWELVE[..., 0]
DEEP_GRAY = {
    "gray PNG": deep_png(GRAY),
    "gray PNG with alpha": deep_png(with_alpha(GRAY[..., None])),
    "gray TIFF": tiff(GRAY, 1),
    "gray TIFF, white is 0": tiff(4095 - GRAY, 0),
    "compressed gray TIFF": compressed(GRAY),
    "gray PGM": pnm(b"P5", GRAY, 4095),
    "plain PGM": pnm(b"P2", GRAY, 65535),
    "gray JPEG 2000": jpeg2000(GRAY),
    "signed TIFF": tiff(GRAY, 1, (339, 2)),
}


@pytest.mark.parametrize("name", DEEP | DEEP_GRAY)
def test_12_bits_in_16_become_8_in_every_format_and_in_no_data_set(name: str):
    data = (DEEP | DEEP_GRAY)[name]
    expected = SCENE if name in DEEP else np.repeat(SCENE[..., :1], 3, axis=-1)
    found = read_image(data)
    assert np.abs(np.asarray(found.rgb).astype(int) - expected).max() <= 1
    assert [bool(note.refused) for note in found.notes] == [True]
    assert "scaled to 0..255" in found.notes[0].text
    np.testing.assert_array_equal(decode_image(data), np.asarray(found.rgb))
    np.testing.assert_array_equal(read_for_users(data).rgb_HW3, np.asarray(found.rgb))


def test_a_true_16_bits_and_a_dark_picture_keep_their_scale():
    full = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    np.testing.assert_array_equal(np.asarray(read_image(deep_png(full)).rgb)[..., 0], np.rint(full / 257))
    eight = np.arange(1200).reshape(30, 40) % 256
    np.testing.assert_array_equal(np.asarray(read_image(deep_png(eight)).rgb)[..., 0], eight)
    half = np.full((30, 40), 3000, np.uint16)
    np.testing.assert_array_equal(np.asarray(read_image(pnm(b"P5", half, 65534)).rgb)[..., 0], 12)


def test_bits_of_which_only_the_upper_ones_can_be_had_are_told_or_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deep_image, "bits", lambda image, data: 16)  # nothing here writes such files
    bright, dark = (encoded(Image.new("RGB", (9, 9), (level, 0, 0)), "JPEG2000") for level in (200, 15))
    assert [note.text for note in read_image(bright).notes] == ["16 bits a channel: the upper 8 are read"]
    with pytest.raises(ValueError, match="next to nothing"):
        read_image(dark)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (tiff(TWELVE, 2, (284, 2)), "whose channels lie apart"),
        (tiff(SCENE[..., 0], 1, (339, 2)), "signed bytes"),
    ],
)
def test_what_pillow_would_read_as_something_else_is_refused(data: bytes, told: str):
    with pytest.raises(ValueError, match=told):
        read_image(data)


def clear(image: Image.Image) -> Image.Image:
    """The upper half gone, its hidden colours those of the scene."""
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, image.width, image.height // 2))
    image = image.convert("RGBA")
    image.putalpha(alpha)
    return image


def transparent() -> dict[str, bytes]:
    """Magenta that no viewer shows above green."""
    both = Image.new("RGB", (6, 4), (250, 0, 250))
    both.paste((0, 200, 0), (0, 2, 6, 4))
    keyed = {"transparency": (250, 0, 250)}
    deep = np.asarray(both).astype(np.uint16) * 257
    alpha = np.asarray(clear(both)).astype(np.uint16) * 257
    return {
        "RGBA PNG": encoded(clear(both), "PNG"),
        "PNG with a key": encoded(both, "PNG", **keyed),
        "palette PNG": encoded(both.quantize(2), "PNG", transparency=both.quantize(2).getpixel((0, 0))),
        "GIF": encoded(both.quantize(2), "GIF", transparency=both.quantize(2).getpixel((0, 0))),
        "WebP": encoded(clear(both), "WEBP", lossless=True, exact=True),
        "TIFF": encoded(clear(both), "TIFF"),
        "AVIF": encoded(clear(both), "AVIF", quality=100, subsampling="4:4:4"),
        "JPEG 2000": encoded(clear(both), "JPEG2000"),
        "16-bit RGBA PNG": deep_png(alpha),
        "16-bit PNG with a key": deep_png(deep, chunk(b"tRNS", (deep[0, 0]).astype(">u2").tobytes())),
    }


@pytest.mark.parametrize("name", transparent())
def test_transparency_is_white_for_training_and_for_users_in_every_format(name: str):
    data = transparent()[name]
    found = np.asarray(read_image(data).rgb).astype(int)
    assert np.abs(found[:2] - 255).max() <= 4
    assert np.abs(found[2:] - (0, 200, 0)).max() <= 4
    notes = {note.text: note.refused for note in read_image(data).notes}
    assert notes["transparency shown over white"] == ""
    np.testing.assert_array_equal(decode_image(data), read_for_users(data).rgb_HW3)


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    if kind == "XMP":
        xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="%d"/></x:xmpmeta>' % orientation
        return encoded(scene(), "JPEG", quality=95, xmp=xmp)
    if kind == "late eXIf":  # behind the pixels, where PNG allows it too
        body = exif.tobytes().removeprefix(b"Exif\0\0")
        return encoded(scene(), "PNG")[:-12] + chunk(b"eXIf", body) + chunk(b"IEND", b"")
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(kind, {})
    return encoded(scene(), kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", [0, 1, 3, 5, 6, 8, 9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "late eXIf", "WEBP", "TIFF", "AVIF", "XMP"])
def test_a_data_sets_pixels_lie_as_stored_and_a_users_upright(kind: str, orientation: int):
    data = turned(kind, orientation)
    odd = 2 <= orientation <= 8
    plain, upright = read_image(data), read_image(data, upright=True)
    assert [note.text.split(" ")[0] for note in plain.notes] == ["EXIF"] * odd
    assert [note.text.split(" ")[0] for note in upright.notes] == ["turned"] * odd
    assert np.abs(np.asarray(plain.rgb).astype(int) - SCENE).mean() < 12
    holder = Image.fromarray(np.asarray(plain.rgb))
    holder.getexif()[274] = orientation if odd else 1
    np.testing.assert_array_equal(np.asarray(upright.rgb), np.asarray(ImageOps.exif_transpose(holder)))


def test_what_is_told_of_an_image_is_the_same_for_training_and_users():
    for name, data in readable().items():
        told = [note.text for note in read_image(data).notes]
        assert list(read_for_users(data, upright=False).notes) == told, name
        np.testing.assert_array_equal(decode_image(data), read_for_users(data, upright=False).rgb_HW3)


def test_odd_colours_are_those_that_they_stand_for():
    pictures = {
        "CMYK JPEG": encoded(scene().convert("CMYK"), "JPEG", quality=100),
        "CMYK TIFF": encoded(scene().convert("CMYK"), "TIFF"),
        "YCbCr TIFF": encoded(scene().convert("YCbCr"), "TIFF"),
        "PPM of 100": pnm(b"P6", np.rint(SCENE / 2.55), 100),
        "plain PPM": pnm(b"P3", SCENE, 255),
        "2-bit gray": png(1, 4, 2, 0, b"\0\x1b"),
    }
    found = {name: np.asarray(read_image(data).rgb).astype(int) for name, data in pictures.items()}
    assert found.pop("2-bit gray")[0, :, 0].tolist() == [0, 85, 170, 255]
    for name, rgb_HW3 in found.items():
        assert np.abs(rgb_HW3 - SCENE).mean() < 4, name


def test_data_after_a_jpeg_is_no_damage_and_zeros_within_are():
    data = encoded(scene(), "JPEG", quality=95)
    np.testing.assert_array_equal(decode_image(data + bytes(range(256)) * 40), decode_image(data))
    with pytest.raises(OSError, match="ends in zeros"):
        read_image(unreadable()["zeros.jpg"][0])


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = CASES / request.param / "make.py"
    if not script.exists():
        pytest.skip(f"needs {script}")
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])
    runpy.run_path(str(script))
    return tmp_path


def defects(folder: Path) -> dict[str, list[tuple[str, bool]]]:
    index = read_index(folder / "set", "train2017")
    return {r.image.name: [(d.problem, d.usable) for d in r.examine(index.labels).defects] for r in index.records}


@pytest.mark.parametrize("made", ["5-16bit-rgb-png"], indirect=True)
def test_16_bits_of_any_format_are_refused_by_validate_and_look_alike_to_users(made: Path):
    found = defects(made)
    assert found["eight.png"] == []
    assert "more than 8 bits a channel (16)" in found["twelve_rgb.png"][0][0]
    assert not found["twelve_rgb.png"][0][1]
    eight = read_for_users((made / "photos/eight.png").read_bytes()).rgb_HW3.astype(int)
    for name in ("twelve_rgb.png", "twelve_rgb.tif", "twelve_gray.png"):
        rgb_HW3 = read_for_users((made / "photos" / name).read_bytes()).rgb_HW3
        assert np.abs(rgb_HW3 - (eight[..., 1:2] if "gray" in name else eight)).max() <= 1, name


@pytest.mark.parametrize("made", ["22-truth-png-16-bit"], indirect=True)
def test_a_truth_of_16_bits_is_refused_and_not_counted_as_void(made: Path):
    with pytest.raises(TesseraError, match=r"truth/7\.png: not a readable panoptic PNG \(it is 16-bit RGB"):
        score_files(made / "truth.json", made / "predictions.json", made / "truth", made / "predictions")


@pytest.mark.parametrize("made", ["9-rgba-hidden-colours"], indirect=True)
def test_hidden_colours_are_hidden_from_training_too_and_told_of(made: Path):
    assert defects(made) == {"1.png": [("transparency shown over white", True)]}
    data = (made / "photos/cut.png").read_bytes()
    assert decode_image(data)[0, 0].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(decode_image(data), read_for_users(data).rgb_HW3)


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once():
    """Each takes as long as a whole image: 80 kB took 9 s."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (3, 4, 5)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    assert read_image(data).rgb.size == (64, 64)
    with pytest.raises(ValueError, match=r"scans, at most 200"):
        read_image(data[:-2] + data[last:-2] * 4000 + data[-2:])


def test_a_header_of_comments_is_read_in_one_pass():
    assert read_header(b"P2\n" + b"#\n# 7\r" * 100_000 + b"2 2\n 255 0 1 2 3").most == 255
    with pytest.raises(ValueError, match="largest value"):
        read_header(b"P2\n" + b"#\n" * 100_000 + b"2 2 # 255")
