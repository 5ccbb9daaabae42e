"""What data sets without an annotation JSON share: files paired by name, PNGs whose pixels say what they are."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from preprocessing.files import File, Folder, Tree
from preprocessing.kernels import relabel
from preprocessing.labels import LabelTable
from preprocessing.opening import BROKEN, open_image
from preprocessing.panoptic_map import PanopticMap, Segment, measured
from preprocessing.source import Defect, Index, Record, Rejected, TooManyBad, read_file, without_repeats

GRAY8 = frozenset({"L"})
GRAY = frozenset({"L", "I", "I;16"})
"""Pillow's modes of 8-bit and 16-bit gray."""
RGB = frozenset({"RGB"})
_MEANING = {GRAY8: "8-bit gray", GRAY: "8-bit or 16-bit gray", RGB: "8-bit RGB"}
_NAMED = 5
"""Of many wrong values in one image, so many are named one by one."""


def find_folder(tree: Tree, names: Iterable[str], layout: str) -> Folder:
    """The first of these folders that is there. TesseraError if none is."""
    tried = list(names)
    for name in tried:
        found = tree.folder(name)
        if found is not None:
            return found
    raise tree.missing(*tried, expected=layout)


def make_index(labels: LabelTable, found: Iterable[Record], rejected: Iterable[Rejected], where: str) -> Index:
    """The index of the records whose id occurs once. TesseraError naming `where` if there is none."""
    records, repeated = without_repeats(found)
    all_rejected = (*rejected, *repeated)
    if not records:
        why = "; ".join(map(str, all_rejected[:5])) or "the data set is empty"
        raise TooManyBad(f"{where}: no usable sample ({why})", all_rejected)
    return Index(labels, tuple(records), all_rejected)


def read_png(record: Record, file: File, modes: frozenset[str], defects: list[Defect]) -> NDArray[np.int32] | None:
    """The pixels, int32 (H, W) or (H, W, 3), of a PNG in one of Pillow's `modes`; otherwise None and a defect."""
    data = read_file(record, file, defects)
    if data is None:
        return None
    try:
        with open_image(data, ("PNG",)) as image:
            if image.mode in modes:
                return np.asarray(image).astype(np.int32)
            problem = f"the PNG has the mode {image.mode}, expected {_MEANING[modes]}"
    except BROKEN as error:
        problem = f"not a readable PNG ({error})"
    defects.append(record.defect(problem, file))
    return None


def wrong_values(
    record: Record,
    values_HW: NDArray[np.int32],
    wrong_HW: NDArray[np.bool_],
    problem: Callable[[int], str],
    file: File,
    usable: bool = False,
) -> Iterator[Defect]:
    """A defect for each value, as `problem` words it, that pixels marked in wrong_HW (H, W) have; largest first."""
    ys, xs = np.nonzero(wrong_HW)
    values, first, counts = np.unique(values_HW[ys, xs], return_index=True, return_counts=True)
    for at in np.argsort(-counts, kind="stable")[:_NAMED]:
        value, where = int(values[at]), f"x={xs[first[at]]}, y={ys[first[at]]}"
        text = f"{problem(value)} ({counts[at]} px, the first at {where})"
        yield record.defect(text, file, segment=value, usable=usable)
    if len(values) > _NAMED:
        yield record.defect(f"{len(values) - _NAMED} more values of this kind", file, usable=usable)


def to_map(
    record: Record, keys_HW: NDArray[np.int32], segment: Callable[[int], Segment], defects: list[Defect]
) -> PanopticMap:
    """The map whose segments are the keys that occur, in ascending order; `segment` makes the row of a key.

    keys_HW: int32 (H, W), 0 = void, otherwise positive and below some million. At most 65534 keys may occur.
    """
    keys_N = np.flatnonzero(np.bincount(keys_HW.ravel()))
    keys_N = keys_N[keys_N > 0]
    labels_HW = relabel(
        np.ascontiguousarray(keys_HW, np.int32), keys_N.astype(np.int32), np.arange(1, len(keys_N) + 1, dtype=np.uint16)
    )
    segments = measured(labels_HW, [segment(int(key)) for key in keys_N])
    if not segments:
        defects.append(record.defect("every pixel is void", usable=True))
    return PanopticMap(labels_HW.astype(np.int32), tuple(segments))
