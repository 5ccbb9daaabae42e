"""The RGB encoding of COCO's panoptic PNGs, known to this module only: id = R + 256 G + 65536 B."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infra.errors import TesseraError
from preprocessing.kernels import UNKNOWN, Measures, measure, read_scanlines, relabel
from preprocessing.png import is_gray, read_rgb, rgb_scanlines

MAX_ID = 256**3 - 1


def decode(rgb_HW3: NDArray[np.uint8]) -> NDArray[np.int32]:
    """uint8 RGB (H, W, 3) -> int32 ids (H, W)."""
    ids_HW = rgb_HW3[..., 2].astype(np.int32)
    for channel in (1, 0):  # in place: nothing larger than the result is ever held
        ids_HW <<= 8
        ids_HW |= rgb_HW3[..., channel]
    return ids_HW


def encode(ids_HW: NDArray[np.int32]) -> NDArray[np.uint8]:
    """int32 ids (H, W) -> uint8 RGB (H, W, 3). Raises TesseraError for ids outside 0..MAX_ID."""
    if ids_HW.size and (ids_HW.min() < 0 or ids_HW.max() > MAX_ID):
        raise TesseraError(f"panoptic ids span {ids_HW.min()}..{ids_HW.max()}; RGB holds 0..{MAX_ID}")
    rgb_HW3 = np.empty((*ids_HW.shape, 3), np.uint8)
    for channel in range(3):
        rgb_HW3[..., channel] = ids_HW >> 8 * channel & 255
    return rgb_HW3


def read_png(data: bytes) -> NDArray[np.int32]:
    """PNG bytes -> int32 ids (H, W). Raises what `png.read_rgb` does."""
    return decode(read_rgb(data))


def read_labels(data: bytes, ids_N: NDArray[np.int32]) -> tuple[NDArray[np.uint16], Measures]:
    """PNG bytes and the ids of its segments -> labels and their areas, boxes and centroids, in one pass.

    ids_N: int32, distinct, 1..MAX_ID, fewer than UNKNOWN. Returns the labels, uint16 (H, W): i + 1 for ids_N[i],
    0 = void for id 0, UNKNOWN for ids that are not listed; and what `kernels.measure` returns, where UNKNOWN is
    left out: there is some if the areas do not add up to H W. Raises ValueError for damaged data, and what
    `png.read_rgb` does.
    """
    if ids_N.size >= UNKNOWN:
        raise TesseraError(f"{ids_N.size} segments in one image; at most {UNKNOWN - 1} fit")
    order_N = np.argsort(ids_N)
    sorted_ids_N, labels_N = ids_N[order_N], (order_N + 1).astype(np.uint16)
    lines_HB = rgb_scanlines(data)
    if lines_HB is not None:
        return read_scanlines(lines_HB, sorted_ids_N, labels_N)
    labels_HW = relabel(read_png(data), sorted_ids_N, labels_N)
    if is_gray(data) and UNKNOWN in labels_HW:  # by an optimiser's leave a gray v is the id v + 256 v + 65536 v
        raise ValueError("it is gray, and its grays are no ids of the JSON; expected 8-bit RGB")
    return labels_HW, _measured_known(labels_HW, ids_N.size)


def _measured_known(labels_HW: NDArray[np.uint16], segments: int) -> Measures:
    """`measure` without UNKNOWN, which is counted as one more segment and cut off."""
    area_N, box_N4, centroid_N2 = measure(np.minimum(labels_HW, np.uint16(segments + 1)), segments + 1)
    return area_N[:-1], box_N4[:-1], centroid_N2[:-1]


def write_png(ids_HW: NDArray[np.int32]) -> bytes:
    """int32 ids (H, W) -> PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(encode(ids_HW)).save(buffer, format="PNG")
    return buffer.getvalue()
