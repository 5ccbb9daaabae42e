"""Numba kernels over label maps: one thread each, the GIL released, compiled code cached.

Label maps are dense: 0 is void, segment i of the table (1-based) has label i. Parallelism is Ray's, so no
kernel is parallel itself. All kernels are in this file because Numba's cache only notices changes of the
file that a kernel is in, not of those it calls.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

Measures = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]

MAX_RADIUS = 181
"""Largest clipping radius: radius^2 + (radius - 1)^2 must fit uint16."""

UNKNOWN = 0xFFFF
"""Label of pixels whose id is not in the table."""

BLOCK = 32
"""Pixels that are compared at once where long runs are expected."""

TILE_ROWS, TILE_COLUMNS = 16, 128
"""What `squared_distance` finishes at once: with the rows above and below within reach it fits the L1 cache."""


@njit(cache=True, nogil=True)
def relabel(
    raw_HW: NDArray[np.int32], sorted_ids_N: NDArray[np.int32], labels_N: NDArray[np.uint16]
) -> NDArray[np.uint16]:
    """Map raw ids to dense labels in one pass.

    raw_HW: int32 ids, 0 = void. sorted_ids_N: int32, ascending, without 0. labels_N: uint16, the label of
    each sorted id. Returns uint16 (H, W): 0 for void, UNKNOWN where the id is not listed.
    """
    height, width = raw_HW.shape
    dense_HW = np.empty((height, width), np.uint16)
    for y in range(height):
        start = 0
        while start < width:
            end = _run_end(raw_HW[y], start)
            dense_HW[y, start:end] = _label_of(raw_HW[y, start], sorted_ids_N, labels_N)
            start = end
    return dense_HW


@njit(cache=True, nogil=True)
def paint_runs(labels_HW: NDArray[np.uint16], runs_N: NDArray[np.int64], label: int) -> None:
    """Give a mask's pixels a label, in place. runs_N: lengths down the columns, outside and inside by turns."""
    height = labels_HW.shape[0]
    start = 0
    for i in range(runs_N.size):
        x, y = start // height, start % height
        start += runs_N[i]
        if i % 2 == 0:
            continue
        for _ in range(runs_N[i]):
            labels_HW[y, x] = label
            y += 1
            if y == height:
                x, y = x + 1, 0


@njit(cache=True, nogil=True)
def measure(labels_HW: NDArray[np.uint16], segments: int) -> Measures:
    """Areas, boxes and centroids of all segments in one pass.

    labels_HW: uint16 labels 0..segments. Returns area int64 (segments + 1,) with void first; box int64
    (segments + 1, 4) as x, y, width, height; centroid float64 (segments + 1, 2) as x, y in pixels with
    pixel centres at integers. Box and centroid of a segment without pixels are 0 and NaN.
    """
    height, width = labels_HW.shape
    tally_N7 = _new_tally(segments, height, width)
    for y in range(height):
        start = 0
        while start < width:
            end = _run_end(labels_HW[y], start)
            _count_run(tally_N7[labels_HW[y, start]], y, start, end)
            start = end
    return _measures(tally_N7)


@njit(cache=True, nogil=True)
def read_scanlines(
    lines_HB: NDArray[np.uint8], sorted_ids_N: NDArray[np.int32], labels_N: NDArray[np.uint16]
) -> tuple[NDArray[np.uint16], Measures]:
    """Undo a PNG's filters, `relabel` and `measure`, in one pass.

    lines_HB: uint8 (H, 1 + 3 W), each row the kind of its filter, 0 to 4, and its filtered pixels of three
    bytes; a pixel's id has the first of them lowest. sorted_ids_N and labels_N as in `relabel`, the labels
    being 1..N. Returns the labels, uint16 (H, W), and what `measure` returns; UNKNOWN is not measured.
    """
    height, width, segments = lines_HB.shape[0], lines_HB.shape[1] // 3, labels_N.size
    labels_HW = np.empty((height, width), np.uint16)
    tally_N7 = _new_tally(segments, height, width)
    id_of_label_N = np.zeros(segments + 1, np.int32)
    id_of_label_N[labels_N] = sorted_ids_N
    ids_W = np.zeros(width, np.uint32)
    for y in range(height):
        _unfilter(lines_HB[y, 0], lines_HB[y, 1:], ids_W)
        start = 0
        while start < width:
            end = _run_end(ids_W, start)
            value = np.int32(ids_W[start])
            label = labels_HW[y - 1, start] if y > 0 else np.uint16(0)  # most runs continue the one above
            if label == UNKNOWN or id_of_label_N[label] != value:
                label = _label_of(value, sorted_ids_N, labels_N)
            labels_HW[y, start:end] = label
            if label != UNKNOWN:
                _count_run(tally_N7[label], y, start, end)
            start = end
    return labels_HW, _measures(tally_N7)


@njit(cache=True, nogil=True)
def _run_end(row_W: NDArray[np.integer], start: int) -> int:
    """First x after start where the row has another value than at start, or its width."""
    value, x = row_W[start], start + 1
    while x + BLOCK <= row_W.size:
        block, difference = row_W[x : x + BLOCK], value ^ value
        for i in range(BLOCK):
            difference |= block[i] ^ value
        if difference != 0:
            break
        x += BLOCK
    while x < row_W.size and row_W[x] == value:
        x += 1
    return x


@njit(cache=True, nogil=True)
def _label_of(value: np.int32, sorted_ids_N: NDArray[np.int32], labels_N: NDArray[np.uint16]) -> np.uint16:
    if value == 0:
        return np.uint16(0)
    at = np.searchsorted(sorted_ids_N, value)
    known = at < sorted_ids_N.size and sorted_ids_N[at] == value
    return labels_N[at] if known else np.uint16(UNKNOWN)


@njit(cache=True, nogil=True)
def _new_tally(segments: int, height: int, width: int) -> NDArray[np.int64]:
    """Of each label: area, sum of x, sum of y, least x, least y, largest x, largest y."""
    tally_N7 = np.zeros((segments + 1, 7), np.int64)
    tally_N7[:, 3:5] = max(height, width)
    tally_N7[:, 5:] = -1
    return tally_N7


@njit(cache=True, nogil=True)
def _count_run(tally_7: NDArray[np.int64], y: int, start: int, end: int) -> None:
    """Add the pixels start..end - 1 of row y; rows come from top to bottom."""
    length = end - start
    tally_7[0] += length
    tally_7[1] += (start + end - 1) * length // 2
    tally_7[2] += y * length
    tally_7[3] = min(tally_7[3], start)
    tally_7[4] = min(tally_7[4], y)
    tally_7[5] = max(tally_7[5], end - 1)
    tally_7[6] = y


@njit(cache=True, nogil=True)
def _measures(tally_N7: NDArray[np.int64]) -> Measures:
    labels = tally_N7.shape[0]
    box_N4 = np.zeros((labels, 4), np.int64)
    centroid_N2 = np.full((labels, 2), np.nan)
    for label in range(labels):
        tally_7 = tally_N7[label]
        if tally_7[0] > 0:
            box_N4[label, :2] = tally_7[3:5]
            box_N4[label, 2:] = tally_7[5:] - tally_7[3:5] + 1
            centroid_N2[label] = tally_7[1:3] / tally_7[0]
    return tally_N7[:, 0].copy(), box_N4, centroid_N2


NONE, SUB, UP, AVERAGE, PAETH = range(5)
"""Kinds of a PNG's filters."""


@njit(cache=True, nogil=True)
def _unfilter(kind: np.uint8, steps_B: NDArray[np.uint8], pixels_W: NDArray[np.uint32]) -> None:
    """Turn the pixels of the row above into those of this row.

    steps_B: what the row's filter left, 3 bytes a pixel. pixels_W: 3 bytes each, the first one lowest.
    """
    left = corner = np.uint32(0)  # the pixels to the left, in this row and in the one above
    for x in range(0, pixels_W.size, BLOCK):
        block_W = pixels_W[x : x + BLOCK]
        part_B = steps_B[3 * x : 3 * (x + block_W.size)]
        goes_on = kind == UP or (kind == PAETH and left == corner)  # without a step: a copy of the row above
        if goes_on and _all_zero(part_B):
            left = corner = block_W[-1]
        else:
            left, corner = _unfilter_block(kind, part_B, block_W, left, corner)


@njit(cache=True, nogil=True)
def _all_zero(part_B: NDArray[np.uint8]) -> bool:
    bits = np.uint8(0)
    for i in range(part_B.size):
        bits = np.uint8(bits | part_B[i])
    return bits == 0


@njit(cache=True, nogil=True)
def _unfilter_block(
    kind: np.uint8, steps_B: NDArray[np.uint8], pixels_W: NDArray[np.uint32], left: np.uint32, corner: np.uint32
) -> tuple[np.uint32, np.uint32]:
    """`_unfilter` for some pixels and those to the left of them; returns the same for what follows."""
    for x in range(pixels_W.size):
        above, guess = pixels_W[x], np.uint32(0)
        if kind == SUB or (kind == PAETH and above == corner):
            guess = left
        elif kind == UP or (kind == PAETH and left == corner):
            guess = above
        elif kind == AVERAGE:  # of each byte, without its carry
            guess = np.uint32((left & above) + (((left ^ above) & np.uint32(0xFEFEFE)) >> np.uint32(1)))
        elif kind == PAETH:
            guess = _paeth(left, above, corner)
        step = np.uint32(steps_B[3 * x] | steps_B[3 * x + 1] << 8 | steps_B[3 * x + 2] << 16)
        corner = above
        left = _add_bytes(guess, step)
        pixels_W[x] = left
    return left, corner


@njit(cache=True, nogil=True)
def _add_bytes(a: np.uint32, b: np.uint32) -> np.uint32:
    """Sum of each of three bytes modulo 256: the low 7 bits by addition, the highest without its carry."""
    low = np.uint32(0x7F7F7F)
    return np.uint32(((a & low) + (b & low)) ^ ((a ^ b) & np.uint32(0x808080)))


@njit(cache=True, nogil=True)
def _paeth(left: np.uint32, above: np.uint32, corner: np.uint32) -> np.uint32:
    """Of each of three bytes: whichever is nearest to left + above - corner."""
    result = np.uint32(0)
    for shift in range(0, 24, 8):
        a, b, c = (left >> shift) & 255, (above >> shift) & 255, (corner >> shift) & 255
        to_a, to_b, to_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
        nearest = a if to_a <= to_b and to_a <= to_c else b if to_b <= to_c else c
        result |= np.uint32(nearest << shift)
    return result


@njit(cache=True, nogil=True)
def squared_distance(labels_HW: NDArray[np.uint16], group_N: NDArray[np.uint16], radius: int) -> NDArray[np.uint16]:
    """Squared Euclidean distance to the nearest boundary pixel, exact, clipped at radius^2.

    A pixel is a boundary pixel when a 4-neighbour inside the image has another group; void has group 0 and
    counts, the image border does not (docs/architecture.md, Boundary). group_N: uint16, the group of each
    label, (segments + 1,): categories for the semantic task, instances for the instance task. radius: 1 to
    MAX_RADIUS pixels. Returns uint16 (H, W); radius^2 everywhere if nothing is a boundary.

    Method: clipped distances along rows, then the least of their squares plus k^2 over the pixels k rows
    above and below. The second works in tiles of a strip whose rows lie end to end: k rows are then a
    constant offset, one long aligned loop does all rows of a tile, and a tile is finished as soon as k^2
    cannot lower anything in it.
    """
    height, width = labels_HW.shape
    row_distance_HW = _row_distance(labels_HW, group_N, radius)
    out_HW = np.empty((height, width), np.uint16)
    margin = radius + 3  # `_lower` takes four k at once
    strip_HT = np.full((height + 2 * margin, TILE_COLUMNS), radius * radius, np.uint16)
    strip_HT[margin : margin + height] = 0  # columns beyond the image need no lowering
    tile = np.empty((TILE_ROWS, TILE_COLUMNS), np.uint16)
    for left in range(0, width, TILE_COLUMNS):
        columns = min(TILE_COLUMNS, width - left)
        for y in range(height):
            _square(row_distance_HW[y, left : left + columns], strip_HT[margin + y])
        for top in range(0, height, TILE_ROWS):
            rows = min(TILE_ROWS, height - top)
            _lower_tile(strip_HT.ravel(), margin + top, tile[:rows].ravel())
            for y in range(rows):
                _copy(tile[y, :columns], out_HW[top + y, left : left + columns])
    return out_HW


@njit(cache=True, nogil=True)
def _row_distance(labels_HW: NDArray[np.uint16], group_N: NDArray[np.uint16], radius: int) -> NDArray[np.uint8]:
    """Distance to the nearest boundary pixel of the same row, clipped at radius; uint8 (H, W).

    With the distances to boundary pixels up to n away, a look step <= n + 1 to both sides gives those up to
    n + step. No sum exceeds 255: step is at most 64 for radii up to MAX_RADIUS.
    """
    height, width = labels_HW.shape
    group_HW = np.empty((height, width), np.uint16)
    for y in range(height):
        for x in range(width):
            group_HW[y, x] = group_N[labels_HW[y, x]]
    out_HW = np.empty((height, width), np.uint8)
    near_2M = np.full((2, width + 2 * radius), radius, np.uint8)  # before and after a step, with margins
    for y in range(height):
        above, below = group_HW[max(y - 1, 0)], group_HW[min(y + 1, height - 1)]
        reach = turn = 0
        _mark_boundary(group_HW[y], above, below, near_2M[turn, radius : radius + width], radius)
        while reach < radius - 1:
            step = min(reach + 1, radius - 1 - reach)
            _spread(near_2M[turn], near_2M[1 - turn], radius, step)
            reach, turn = reach + step, 1 - turn
        _copy(near_2M[turn, radius : radius + width], out_HW[y])
    return out_HW


@njit(cache=True, nogil=True)
def _mark_boundary(
    row: NDArray[np.uint16], above: NDArray[np.uint16], below: NDArray[np.uint16], out: NDArray[np.uint8], radius: int
) -> None:
    """0 at the row's boundary pixels, radius elsewhere."""
    width = row.size
    far = np.uint8(radius)
    for x in range(width):
        out[x] = far if row[x] == above[x] and row[x] == below[x] else np.uint8(0)
    before, after = row[: width - 1], row[1:]
    for part in (out[: width - 1], out[1:]):
        for x in range(width - 1):
            part[x] = part[x] if before[x] == after[x] else np.uint8(0)


@njit(cache=True, nogil=True)
def _spread(near: NDArray[np.uint8], out: NDArray[np.uint8], margin: int, step: int) -> None:
    """out[x] = the least of near[x] and near[x -+ step] + step."""
    width, cost = near.size - 2 * margin, np.uint8(step)
    centre, result = near[margin:][:width], out[margin:][:width]
    before, after = near[margin - step :][:width], near[margin + step :][:width]
    for x in range(width):
        result[x] = min(centre[x], np.uint8(min(before[x], after[x]) + cost))


@njit(cache=True, nogil=True)
def _copy(values: NDArray[np.integer], out: NDArray[np.integer]) -> None:
    """out[:] = values, which Numba does not vectorise."""
    for x in range(values.size):
        out[x] = values[x]


@njit(cache=True, nogil=True)
def _square(values: NDArray[np.uint8], out: NDArray[np.uint16]) -> None:
    for x in range(values.size):
        out[x] = np.uint16(values[x]) * np.uint16(values[x])


@njit(cache=True, nogil=True)
def _lower_tile(strip: NDArray[np.uint16], top: int, tile: NDArray[np.uint16]) -> None:
    """tile = the least, over all k, of the strip's values k rows above and below, plus k^2; both flat."""
    start = top * TILE_COLUMNS
    here = strip[start:][: tile.size]
    highest = np.uint16(0)
    for i in range(tile.size):
        tile[i] = here[i]
        highest = max(highest, here[i])
    k = 1
    while k * k < highest:
        highest = _lower(strip, start, tile, k)
        k += 4


@njit(cache=True, nogil=True)
def _lower(strip: NDArray[np.uint16], start: int, tile: NDArray[np.uint16], k: int) -> np.uint16:
    """`_lower_tile` for k to k + 3: four at once read and write the tile once. Returns its highest value."""
    above_0, below_0 = _rows_at(strip, start, tile.size, k)
    above_1, below_1 = _rows_at(strip, start, tile.size, k + 1)
    above_2, below_2 = _rows_at(strip, start, tile.size, k + 2)
    above_3, below_3 = _rows_at(strip, start, tile.size, k + 3)
    cost_0, cost_1 = np.uint16(k**2), np.uint16((k + 1) ** 2)
    cost_2, cost_3 = np.uint16((k + 2) ** 2), np.uint16((k + 3) ** 2)
    highest = np.uint16(0)
    for i in range(tile.size):
        by_0 = np.uint16(min(above_0[i], below_0[i]) + cost_0)
        by_1 = np.uint16(min(above_1[i], below_1[i]) + cost_1)
        by_2 = np.uint16(min(above_2[i], below_2[i]) + cost_2)
        by_3 = np.uint16(min(above_3[i], below_3[i]) + cost_3)
        tile[i] = min(tile[i], min(min(by_0, by_1), min(by_2, by_3)))
        highest = max(highest, tile[i])
    return highest


@njit(cache=True, nogil=True)
def _rows_at(strip: NDArray[np.uint16], start: int, size: int, k: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """The part of the strip that lies k rows above the one at start, and the one k rows below."""
    return strip[start - k * TILE_COLUMNS :][:size], strip[start + k * TILE_COLUMNS :][:size]
