"""One training sample: what it holds, how it is computed, how it lies in a WebDataset tar."""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infra import opening, records
from infra.errors import TesseraError
from infra.records import Count
from preprocessing.geometry import PADDING, Frame, Size, resize_labels
from preprocessing.image_file import read_image
from preprocessing.kernels import squared_distance
from preprocessing.labels import LabelTable
from preprocessing.opening import BROKEN, within_memory
from preprocessing.panoptic_map import PanopticMap, Segment, visible
from preprocessing.source import Record, usable

SCHEMA_VERSION = 2
"""Part of every shard's key: raise it when the meaning or layout of a sample changes."""

if TYPE_CHECKING:
    import pyarrow

ARRAYS = ("labels", "d2")
FIELDS = frozenset({"jpg", "json", "labels.lz4"})
"""The files that every sample has in a tar; train shards have `d2.lz4` too."""


@dataclass(frozen=True)
class Sample:
    """An image and its targets on one pixel grid (H, W)."""

    image_id: int
    file_name: str
    image: bytes
    """JPEG (or the source's own bytes where the grid is the image's own)."""
    labels: NDArray[Any]
    """uint8 (H, W), 0 = void, i = segments[i - 1]; uint16 above 255 segments."""
    segments: tuple[Segment, ...]
    d2: NDArray[np.int16] | None = None
    """(H, 2, W): squared pixels to the nearest boundary between categories, and to the nearest one between thing
    instances and all else, clipped at radius^2; None for radius 0. Rows of the two maps take turns because they are
    much alike: so they compress a quarter better than one after the other, and are read faster."""

    @property
    def panoptic(self) -> PanopticMap:
        """The ground truth of this grid."""
        return PanopticMap(self.labels.astype(np.int32), self.segments)

    def decoded(self) -> NDArray[np.uint8]:
        """Its image, uint8 RGB (H, W, 3). TesseraError, naming it, as `decode_image`."""
        try:
            return decode_image(self.image)
        except TesseraError as error:
            raise TesseraError(f"image {self.image_id}, {self.file_name}: {error}") from error


def make_sample(record: Record, labels: LabelTable, grid: Size | None, radius: int) -> Sample:
    """Read one source sample and compute its targets on `grid` (None: the image's own size).

    Image and map are squashed to the grid, as the paper does. radius: of the distances, pixels; 0 leaves them out.
    Raises source.BadSample.
    """
    found = usable(record.examine(labels))
    assert found.truth is not None
    assert found.picture is not None
    image = found.data
    if grid is not None and found.truth.size != grid:
        image = _to_jpeg(to_rgb(found.picture, grid))
    labels_HW = resize_labels(found.truth.ids.astype(np.uint16), grid or found.truth.size)
    labels_HW, segments = visible(labels_HW, found.truth.segments)
    return Sample(
        record.image_id,
        record.image.name,
        image,
        labels_HW.astype(np.uint8 if len(segments) <= 255 else np.uint16),
        segments,
        distances(labels_HW, segments, radius) if radius else None,
    )


def distances(labels_HW: NDArray[np.uint16], segments: tuple[Segment, ...], radius: int) -> NDArray[np.int16]:
    """`Sample.d2` of a label map, uint16 (H, W). radius^2 fits int16, which torch has, up to kernels.MAX_RADIUS."""
    groups = semantic_groups(segments), instance_groups(segments)
    return np.stack([squared_distance(labels_HW, group_N, radius) for group_N in groups], axis=1).view(np.int16)


def semantic_groups(segments: tuple[Segment, ...]) -> NDArray[np.uint16]:
    """Group of each label, (segments + 1,), whose borders are the semantic task's: category + 1, void 0."""
    return np.array([0] + [s.category + 1 for s in segments], np.uint16)


def instance_groups(segments: tuple[Segment, ...]) -> NDArray[np.uint16]:
    """Group of each label, (segments + 1,), for the instance task: one per thing, 0 for stuff and void."""
    return np.array([0] + [s.id if s.is_thing else 0 for s in segments], np.uint16)


def _to_jpeg(rgb_HW3: NDArray[np.uint8]) -> bytes:
    """Quality 95 without chroma subsampling keeps edges where the labels have them."""
    buffer = io.BytesIO()
    Image.fromarray(rgb_HW3).save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def decode_image(data: bytes, grid: Size | None = None) -> NDArray[np.uint8]:
    """Image bytes -> uint8 RGB (H, W, 3), squashed to `grid` if given.

    As `read_image` reads it, EXIF rotation ignored. TesseraError for what is no image, or too large.
    """
    try:
        with within_memory("the image"):
            return to_rgb(read_image(data).rgb, grid)
    except BROKEN as error:
        raise TesseraError(f"not a readable image ({error}); run precompute again if it is in a shard") from error


def to_rgb(image: Image.Image, grid: Size | None) -> NDArray[np.uint8]:
    """An RGB image -> uint8 RGB (H, W, 3), squashed to `grid` if given."""
    if grid is not None and (image.height, image.width) != grid:
        image = image.resize((grid[1], grid[0]), Image.Resampling.BICUBIC)
    return np.asarray(image)


def framed_image(image: Image.Image, frame: Frame) -> NDArray[np.uint8]:
    """A decoded image -> uint8 RGB on the frame's grid."""
    inner_HW3 = to_rgb(image, frame.inner((image.height, image.width)))
    if inner_HW3.shape[:2] == frame.size:
        return inner_HW3
    framed_HW3 = np.full((*frame.size, 3), PADDING, np.uint8)
    framed_HW3[: inner_HW3.shape[0], : inner_HW3.shape[1]] = inner_HW3
    return framed_HW3


def to_fields(sample: Sample) -> dict[str, bytes]:
    """The sample as the files of a WebDataset tar: `jpg`, `json` and one LZ4 file for each array that it has.

    `json` declares dtype and shape of each array, so nothing is ever unpickled.
    """
    arrays = {name: array for name in ARRAYS if (array := getattr(sample, name)) is not None}
    facts = {
        "image_id": sample.image_id,
        "file_name": sample.file_name,
        "arrays": {name: {"dtype": a.dtype.str, "shape": a.shape} for name, a in arrays.items()},
        "segments": [asdict(s) for s in sample.segments],
    }
    fields = {f"{name}.lz4": _lz4().compress(array.tobytes(), asbytes=True) for name, array in arrays.items()}
    return {"jpg": sample.image, "json": json.dumps(facts, separators=(",", ":")).encode(), **fields}


def from_fields(fields: Mapping[str, bytes]) -> Sample:
    """Inverse of `to_fields`. TesseraError for fields that it cannot have made."""
    try:
        with within_memory("a sample"):
            return _from_facts(records.parse(_Facts, fields["json"], "its json"), fields)
    except (*BROKEN, TesseraError) as error:
        told = f"{type(error).__name__}: {error}"
        raise TesseraError(
            f"a sample is not what precompute writes ({told}): {fields.get('json', b'')[:80]!r}"
        ) from error


@dataclass(frozen=True)
class _Array:
    dtype: str
    shape: tuple[Count, ...]


@dataclass(frozen=True)
class _Facts:
    """The `json` of a sample."""

    image_id: Count
    file_name: str
    arrays: dict[str, _Array]
    segments: tuple[Segment, ...]


def _from_facts(facts: _Facts, fields: Mapping[str, bytes]) -> Sample:
    for place, s in enumerate(facts.segments, 1):
        if s.id != place or not all(0 <= v < 1 << 31 for v in (s.category, s.area, *s.box, *(s.centroid or ()))):
            raise ValueError(f"segment {place} has another number, or a place or size that none has")
    arrays = {}
    for name, declared in facts.arrays.items():
        dtype, shape = np.dtype(declared.dtype), declared.shape
        size = dtype.itemsize * math.prod(shape)
        if name not in ARRAYS or dtype.kind not in "iu" or size > opening.MOST:
            raise ValueError(f"an array {name} of {dtype}, {size} bytes")
        raw = _lz4().decompress(fields[f"{name}.lz4"], size)
        arrays[name] = np.frombuffer(raw, dtype).reshape(shape)
    return Sample(facts.image_id, facts.file_name, fields["jpg"], segments=facts.segments, **arrays)


@cache
def _lz4() -> "pyarrow.Codec":
    """LZ4 frames, which decompress twice as fast as zstd, by a level that compresses nearly as well."""
    import pyarrow  # a training step on tensors needs none

    return pyarrow.Codec("lz4", compression_level=3)
