"""What data sets without an annotation JSON share: files paired by name, PNGs whose pixels say what they are."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from preprocessing.files import File
from preprocessing.kernels import relabel
from preprocessing.labels import LabelTable
from preprocessing.opening import BROKEN
from preprocessing.panoptic_map import PanopticMap, Segment, measured
from preprocessing.png import read_gray, read_rgb, read_rgba
from preprocessing.source import Defect, Index, Record, Rejected, TooManyBad, read_file, without_repeats
from preprocessing.tree import Folder, Tree, nfc

T = TypeVar("T", bound=np.generic)
Reading = Callable[[bytes], NDArray[Any]]
"""A PNG's bytes -> its pixels; raises what is in BROKEN."""
GRAY8: Reading = read_gray
GRAY: Reading = partial(read_gray, most=16)
RGB: Reading = read_rgb
RGBA: Reading = read_rgba
_NAMED = 5
"""Of many wrong values in one image, so many are named one by one."""
_BLOCK = 1 << 20
"""Pixels that are looked up at once: NumPy makes 8 bytes of each index."""


def find_folder(tree: Tree, names: Iterable[str], layout: str) -> Folder:
    """The first of these folders that is there. TesseraError if none is."""
    tried = list(names)
    found = tree.folder(*tried)
    if found is None:
        raise tree.missing(*tried, expected=layout)
    return found


def pair(
    parts: Sequence[tuple[Folder, str]], image_id: Callable[[str], int]
) -> tuple[dict[str, tuple[File, ...]], list[Rejected]]:
    """The files of one stem, a folder's name and what follows it in each folder, by stem in ascending order.

    Rejected are files without all of their mates, with what is there instead, and what cannot be listed: it may hold
    many.
    """
    named = [{nfc(n).removesuffix(end): f for n, f in folder.files.items() if n.endswith(end)} for folder, end in parts]
    pairs: dict[str, tuple[File, ...]] = {}
    rejected = [Rejected(None, folder.path, fault) for folder, _ in parts for fault in folder.faults]
    for stem in sorted(set().union(*named)):
        found = [files.get(stem) for files in named]
        there = tuple(file for file in found if file)
        if len(there) == len(parts):
            pairs[stem] = there
            continue
        lacks = [(folder, f"{stem}{end}") for (folder, end), file in zip(parts, found, strict=True) if file is None]
        told = [f"no {name} in {folder.path}{_instead(folder.file(name))}" for folder, name in lacks]
        rejected.append(Rejected(image_id(stem), str(there[0]), "; ".join(told)))
    return pairs, rejected


def _instead(file: File) -> str:
    return f" ({file.fault})" if file.fault else ""


def make_index(labels: LabelTable, found: Iterable[Record], rejected: Iterable[Rejected], where: str) -> Index:
    """The index of the records whose id occurs once. TesseraError naming `where` if there is none."""
    records, repeated = without_repeats(found)
    all_rejected = (*rejected, *repeated)
    if not records:
        why = "; ".join(map(str, all_rejected[:5])) or "the data set is empty"
        raise TooManyBad(f"{where}: no usable sample ({why})", all_rejected)
    return Index(labels, tuple(records), all_rejected)


def read_png(record: Record, file: File, read: Reading, defects: list[Defect]) -> NDArray[Any] | None:
    """The pixels, uint8 or uint16 (H, W), or (H, W, 3 or 4) of colours, of a PNG; otherwise None and a defect."""
    data = read_file(record, file, defects)
    if data is None:
        return None
    try:
        return read(data)
    except BROKEN as error:
        defects.append(record.defect(f"not a readable PNG ({error})", file))
        return None


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a map, some at a time."""
    step = max(1, _BLOCK // max(1, shape[1]))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def look_up(table_N: NDArray[T], keys_HW: NDArray[Any]) -> NDArray[T]:
    """table_N[keys_HW], for which NumPy alone takes 8 bytes a pixel more."""
    found_HW = np.empty(keys_HW.shape, table_N.dtype)
    for rows in blocks(keys_HW.shape):
        found_HW[rows] = table_N[keys_HW[rows]]
    return found_HW


def occurring(keys_HW: NDArray[Any]) -> NDArray[np.int64]:
    """The values from 0 to some million that a map holds, ascending."""
    counts_N = np.zeros(int(keys_HW.max()) + 1, np.int64)
    for rows in blocks(keys_HW.shape):
        counts_N += np.bincount(keys_HW[rows].ravel(), minlength=len(counts_N))
    return np.flatnonzero(counts_N)


class Found(NamedTuple):
    """A value of some pixels: how many there are, and where the first one is."""

    value: int
    pixels: int
    x: int
    y: int


def most_frequent(values_HW: NDArray[Any], wanted_HW: NDArray[np.bool_]) -> tuple[list[Found], int]:
    """The most frequent values of the wanted pixels, of equally frequent ones the smaller first; how many others.

    Memory: 5 bytes a wanted pixel, and 12 for each value.
    """
    values_N = values_HW[wanted_HW]
    values_N.sort()
    is_new_N = np.ones(values_N.size, np.bool_)
    np.not_equal(values_N[1:], values_N[:-1], out=is_new_N[1:])
    starts = np.flatnonzero(is_new_N).astype(np.int32)
    counts = np.diff(starts, append=np.int32(values_N.size))
    found = []
    for _ in range(min(_NAMED, len(counts))):
        at = np.argmax(counts)
        value, pixels = values_N[starts[at]], int(counts[at])
        counts[at] = 0
        for rows in blocks(values_HW.shape):
            places = np.flatnonzero((values_HW[rows] == value) & wanted_HW[rows])
            if places.size:
                y, x = divmod(int(places[0]), values_HW.shape[1])
                found.append(Found(int(value), pixels, x, rows.start + y))
                break
    return found, len(starts) - len(found)


def wrong_values(
    record: Record,
    values_HW: NDArray[Any],
    wrong_HW: NDArray[np.bool_],
    problem: Callable[[int], str],
    file: File,
    usable: bool = False,
) -> Iterator[Defect]:
    """A defect for each value, as `problem` words it, that pixels marked in wrong_HW (H, W) have; largest first."""
    if not wrong_HW.any():
        return
    found, others = most_frequent(values_HW, wrong_HW)
    for value, pixels, x, y in found:
        text = f"{problem(value)} ({pixels} px, the first at x={x}, y={y})"
        yield record.defect(text, file, segment=value, usable=usable)
    if others:
        yield record.defect(f"{others} more values of this kind", file, usable=usable)


def to_map(
    record: Record, keys_HW: NDArray[np.int32], segment: Callable[[int], Segment], defects: list[Defect]
) -> PanopticMap:
    """The map whose segments are the keys that occur, in ascending order; `segment` makes the row of a key.

    keys_HW: int32 (H, W), 0 = void, otherwise positive and below some million. At most 65534 keys may occur.
    """
    keys_N = occurring(keys_HW)
    keys_N = keys_N[keys_N > 0]
    labels_HW = relabel(
        np.ascontiguousarray(keys_HW, np.int32), keys_N.astype(np.int32), np.arange(1, len(keys_N) + 1, dtype=np.uint16)
    )
    segments = measured(labels_HW, [segment(int(key)) for key in keys_N])
    if not segments:
        defects.append(record.defect("every pixel is void", usable=True))
    return PanopticMap(labels_HW.astype(np.int32), tuple(segments))
