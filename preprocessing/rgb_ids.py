"""The RGB encoding of COCO's panoptic PNGs, known to this module only: id = R + 256 G + 65536 B."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infra.errors import TesseraError

MAX_ID = 256**3 - 1


def decode(rgb_HW3: NDArray[np.uint8]) -> NDArray[np.int32]:
    """uint8 RGB (H, W, 3) -> int32 ids (H, W)."""
    wide = rgb_HW3.astype(np.int32)
    return wide[..., 0] + (wide[..., 1] << 8) + (wide[..., 2] << 16)


def encode(ids_HW: NDArray[np.int32]) -> NDArray[np.uint8]:
    """int32 ids (H, W) -> uint8 RGB (H, W, 3). Raises TesseraError for ids outside 0..MAX_ID."""
    if ids_HW.size and (ids_HW.min() < 0 or ids_HW.max() > MAX_ID):
        raise TesseraError(f"panoptic ids span {ids_HW.min()}..{ids_HW.max()}; RGB holds 0..{MAX_ID}")
    return np.stack([ids_HW & 255, ids_HW >> 8 & 255, ids_HW >> 16], axis=-1).astype(np.uint8)


def read_png(data: bytes) -> NDArray[np.int32]:
    """PNG bytes -> int32 ids (H, W). Raises what Pillow raises for unreadable data; ValueError if not RGB."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode != "RGB":
            raise ValueError(f"a panoptic PNG is 8-bit RGB, this one is {image.mode}")
        return decode(np.asarray(image))


def write_png(ids_HW: NDArray[np.int32]) -> bytes:
    """int32 ids (H, W) -> PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(encode(ids_HW)).save(buffer, format="PNG")
    return buffer.getvalue()
