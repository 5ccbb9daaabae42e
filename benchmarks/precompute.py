"""One sample's targets, against what one would write with numpy and scipy: `python -m benchmarks.precompute`.

A sample: a panoptic PNG and its ids -> label map, areas, centroids and the squared distance to the nearest boundary,
clipped at 50 pixels; ours also has the boxes. Naive A: a boolean mask and a distance transform a segment. Naive B: a
boolean mask a segment, the boundary by numpy and one distance transform. The distance rows start from the label map
and include the boundary mask on all sides. Every result is checked equal before it is timed: labels, areas and squared
distances exactly, centroids to 1e-9 and OpenCV's distances to 1e-3 pixels.

One thread, CPU time, all sides in turn on the same image, order flipped from image to image and round to round;
milliseconds are medians, ratios the medians of the ratios. Images: warped Voronoi cells and blobs with void seams and
random 24-bit ids, written by Pillow; and COCO's own where a small copy lies in ../shared/data/coco_mini.
"""

import io
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt

from benchmarks.bars import bar, finish
from preprocessing import png, rgb_ids
from preprocessing.kernels import read_scanlines, squared_distance

try:
    import cv2
except ImportError:
    cv2 = None

MASKS = Path(__file__).resolve().parents[2] / "shared/data/coco_mini/annotations/panoptic_val2017"
RADIUS = 50
Size = tuple[int, int]
Outcome = tuple[NDArray[np.uint16], NDArray[np.int64], NDArray[np.float64], list[NDArray]]
"""Labels, areas, centroids (both without void), and a distance map for each grouping."""


@dataclass(frozen=True)
class Case:
    """A panoptic PNG, the ids listed for it, and the groupings of its labels that want a distance map."""

    data: bytes
    ids: NDArray[np.int32]
    groups: tuple[NDArray[np.uint16], ...]

    def with_both_tasks(self) -> "Case":
        """With groups as a semantic and an instance task have them: 40 categories, two thirds of them things."""
        category = np.append(0, 1 + np.random.default_rng(0).integers(0, 40, self.ids.size)).astype(np.uint16)
        instance = np.where(category % 3 > 0, np.arange(category.size), 0).astype(np.uint16)
        return Case(self.data, self.ids, (category, instance))


def ours(case: Case) -> Outcome:
    labels, (area, _, centroid) = rgb_ids.read_labels(case.data, case.ids)
    return labels, area[1:], centroid[1:], [squared_distance(labels, group, RADIUS) for group in case.groups]


def naive_b(case: Case) -> Outcome:
    labels, area, centroid = by_masks(case)
    return labels, area, centroid, [scipy_distance(labels, group) for group in case.groups]


def naive_a(case: Case) -> Outcome:
    labels, area, centroid = by_masks(case)
    inner = ~boundary(labels)
    distance = np.zeros(labels.shape)
    for label in range(case.ids.size + 1):
        distance += distance_transform_edt((labels == label) & inner)
    return labels, area, centroid, [distance]


def by_masks(case: Case) -> tuple[NDArray[np.uint16], NDArray[np.int64], NDArray[np.float64]]:
    """Labels, areas and centroids, by Pillow and a boolean mask of each segment."""
    rgb = np.asarray(Image.open(io.BytesIO(case.data))).astype(np.int32)
    ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
    labels, area, centroid = np.zeros(ids.shape, np.uint16), [], []
    for label, value in enumerate(case.ids, start=1):
        mask = ids == value
        ys, xs = np.nonzero(mask)
        labels[mask] = label
        area.append(xs.size)
        centroid.append((xs.mean(), ys.mean()))
    return labels, np.array(area), np.array(centroid)


def boundary(groups: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Pixels with a 4-neighbour of another group, bool (H, W)."""
    edges = np.zeros(groups.shape, bool)
    down, across = groups[1:] != groups[:-1], groups[:, 1:] != groups[:, :-1]
    edges[1:] |= down
    edges[:-1] |= down
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    return edges


def scipy_distance(labels: NDArray[np.uint16], group: NDArray[np.uint16]) -> NDArray[np.float64]:
    return distance_transform_edt(~boundary(group[labels]))


def opencv_distance(labels: NDArray[np.uint16], group: NDArray[np.uint16]) -> NDArray[np.float32]:
    inner = (~boundary(group[labels])).view(np.uint8)
    return cv2.distanceTransform(inner, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def our_distance(labels: NDArray[np.uint16], group: NDArray[np.uint16]) -> NDArray[np.uint16]:
    return squared_distance(labels, group, RADIUS)


def check(expected: Outcome, found: Outcome) -> None:
    """Both are equal; `expected` is ours."""
    assert np.array_equal(expected[0], found[0])
    assert np.array_equal(expected[1], found[1])
    assert np.abs(expected[2] - found[2]).max() < 1e-9
    for d2, distance in zip(expected[3], found[3], strict=True):
        assert np.array_equal(d2, np.minimum(np.rint(distance**2), RADIUS**2))


def seconds(sides: Sequence[Callable], arguments: Sequence[tuple], rounds: int) -> list[list[float]]:
    """CPU seconds of each side, for each image and round; the first side is compiled already."""
    result: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        for position, argument in enumerate(arguments):
            order = list(range(len(sides)))
            for side in order if (number + position) % 2 else order[::-1]:
                start = time.process_time()
                sides[side](*argument)
                result[side].append(time.process_time() - start)
    return result


def compare(name: str, sides: dict[str, Callable], arguments: Sequence[tuple], rounds: int) -> dict[str, float]:
    """Print a line a side; how often slower than the first each of the others is."""
    every = dict(zip(sides, seconds(list(sides.values()), arguments, rounds), strict=True))
    base, ratios = next(iter(every.values())), {}
    for side, values in every.items():
        ratios[side] = median(theirs / ours for theirs, ours in zip(values, base, strict=True))
        print(f"{name:<28} {side:<18} {1000 * median(values):9.3f} ms {ratios[side]:8.1f}x", flush=True)
    return ratios


def draw(rng: np.random.Generator, size: Size, segments: int) -> Case:
    """Half the segments are cells with wavy edges and some seams of void between them, half are blobs on top."""
    ys, xs = np.mgrid[: size[0], : size[1]].astype(np.float32)
    for cell, shift in ((90, 18), (20, 4), (6, 1)):
        ys, xs = ys + shift * smooth_noise(rng, size, cell), xs + shift * smooth_noise(rng, size, cell)
    cells = max(1, segments // 2)
    first, second = np.full((2, *size), np.inf, np.float32)
    labels = np.zeros(size, int)
    for label, (y, x) in enumerate(rng.random((cells, 2)) * size, start=1):
        distance = np.hypot(ys - y, xs - x)
        labels[distance < first] = label
        second = np.minimum(second, np.maximum(first, distance))
        first = np.minimum(first, distance)
    labels[(second - first < 1.5) & (smooth_noise(rng, size, 60) > 0.5)] = 0
    for label in range(cells + 1, segments + 1):
        y, x, turn = rng.random(3) * (*size, np.pi)
        radius, slim = min(size) * rng.uniform(0.02, 0.12), rng.uniform(0.4, 1)
        along, across = (np.cos(turn + t) * (ys - y) + np.sin(turn + t) * (xs - x) for t in (0, np.pi / 2))
        labels[(along / slim) ** 2 + (across * slim) ** 2 < radius**2] = label
    present = np.setdiff1d(labels, [0])
    ids = np.zeros(segments + 1, np.int32)
    ids[1:] = 1 + rng.choice(rgb_ids.MAX_ID, segments, replace=False)
    return one_map(rgb_ids.write_png(ids[labels]), ids[present])


def smooth_noise(rng: np.random.Generator, size: Size, cell: int) -> NDArray[np.float32]:
    coarse = rng.normal(size=(size[0] // cell + 2, size[1] // cell + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def one_map(data: bytes, ids: NDArray[np.int32]) -> Case:
    """Every segment is a group."""
    return Case(data, ids, (np.arange(ids.size + 1, dtype=np.uint16),))


def coco() -> Iterator[Case]:
    rows = json.loads(MASKS.with_suffix(".json").read_text())["annotations"]
    for row in rows[:20]:
        ids = np.array([s["id"] for s in row["segments_info"]], np.int32)
        yield one_map((MASKS / row["file_name"]).read_bytes(), ids)


def samples(name: str, cases: Sequence[Case], rounds: int, with_a: bool) -> dict[str, float]:
    """Time whole samples of one kind; ratios by side."""
    sides = {"ours": ours, "naive B": naive_b} | ({"naive A": naive_a} if with_a else {})
    for case in cases:
        for side in sides.values():
            check(ours(case), side(case)) if side is not ours else None
    ratios = compare(f"sample {name}", sides, [(case,) for case in cases], rounds)
    both = [case.with_both_tasks() for case in cases]
    for case in both:
        check(ours(case), naive_b(case))
    compare(f"both maps {name}", {"ours": ours, "naive B": naive_b}, [(case,) for case in both], rounds)
    return ratios


def distances(name: str, cases: Sequence[Case], rounds: int) -> dict[str, float]:
    """Time the distance map alone; ratios by side."""
    sides: dict[str, Callable] = {"ours": our_distance, "scipy": scipy_distance}
    if cv2 is None:
        print("OpenCV is not installed here: without its row")
    else:
        cv2.setNumThreads(1)
        sides["OpenCV"] = opencv_distance
    arguments = [(rgb_ids.read_labels(case.data, case.ids)[0], case.groups[0]) for case in cases]
    for argument in arguments:
        d2 = our_distance(*argument)
        assert np.array_equal(d2, np.minimum(np.rint(scipy_distance(*argument) ** 2), RADIUS**2))
        if cv2 is not None:
            assert np.abs(np.minimum(opencv_distance(*argument), RADIUS) - np.sqrt(d2)).max() < 1e-3
    return compare(f"distance {name}", sides, arguments, rounds)


def scaling(rng: np.random.Generator) -> None:
    """Print how our time grows with pixels and with segments."""
    for size in ((240, 320), (480, 640), (1024, 1024), (1024, 2048)):
        (values,) = seconds([ours], [(draw(rng, size, 20),) for _ in range(3)], 5)
        print(f"{size[0]}x{size[1]}, 20 segments: {1e9 * median(values) / (size[0] * size[1]):.2f} ns/pixel")
    for segments in (1, 10, 100, 500):
        (values,) = seconds([ours], [(draw(rng, (480, 640), segments),) for _ in range(3)], 5)
        print(f"480x640, {segments} segments: {1000 * median(values):.3f} ms")


def stages(name: str, case: Case) -> None:
    """Print what our steps take, beside the time to inflate the PNG and to move each array once."""
    lines, order = png.rgb_scanlines(case.data), np.argsort(case.ids)
    assert lines is not None
    table = case.ids[order], (order + 1).astype(np.uint16)
    labels = read_scanlines(lines, *table)[0]
    sides = {
        "chunks and inflating": lambda: png.rgb_scanlines(case.data),
        "pixels to labels and measures": lambda: read_scanlines(lines, *table),
        "distance": lambda: our_distance(labels, case.groups[0]),
    }
    source, target = np.ones((2, 2**26), np.uint8)
    (copying,) = seconds([np.copyto], [(target, source)], 5)
    took = [median(values) for values in seconds(list(sides.values()), [()], 31)]
    # the scanlines are written and read, so are the labels, and the distances are written
    moved = (2 * lines.nbytes + 3 * labels.nbytes) / (2 * source.nbytes) * median(copying)
    for step, value in zip(sides, took, strict=True):
        print(f"{name} {step}: {1000 * value:.3f} ms")
    print(f"{name} floor: {1000 * (took[0] + moved):.3f} ms with inflating; all: {1000 * sum(took):.3f} ms", flush=True)


def work(cases: Sequence[Case], start: float) -> tuple[float, float]:
    """In a process of its own: images a second from the time `start` on, and its peak memory in MiB."""
    ours(cases[0])  # loads the compiled kernels
    time.sleep(max(0.0, start - time.time()))
    done = 0
    while time.time() < start + 3:
        ours(cases[done % len(cases)])
        done += 1
    # not getrusage's ru_maxrss: a child starts with that of its parent
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return done / 3, int(peak.split()[1]) / 1024


def processes(cases: Sequence[Case]) -> None:
    """Print images a second by the clock of one process and of two at the same time, and the memory of one."""
    for number in (1, 2):
        with ProcessPoolExecutor(number, multiprocessing.get_context("spawn")) as pool:
            start = time.time() + 5  # all are up by then
            rates, memory = zip(*pool.map(work, [cases] * number, [start] * number), strict=True)
        print(f"{number} processes: {sum(rates):.0f} images/s, {max(memory):.0f} MiB in one of them", flush=True)


def main() -> None:
    rng = np.random.default_rng(0)
    small = [draw(rng, (480, 640), segments) for segments in (15, 18, 21, 24, 27, 30)]
    large = [draw(rng, (1024, 2048), 60) for _ in range(2)]
    ratios = samples("480x640", small, 5, with_a=True)
    wide = samples("1024x2048", large, 5, with_a=False)
    real = samples("COCO", list(coco()), 5, with_a=True) if MASKS.is_dir() else None
    alone = distances("480x640", small, 15)
    distances("1024x2048", large, 5)
    for name, case in (("480x640", small[3]), ("1024x2048", large[0])):
        stages(name, case)
    scaling(rng)
    processes(small)
    bar("sample_480x640_vs_naive_b", ratios["naive B"], "at-least", 12)  # the dream: 25
    bar("sample_480x640_vs_naive_a", ratios["naive A"], "at-least", 80)
    bar("sample_1024x2048_vs_naive_b", wide["naive B"], "at-least", 30)
    bar("distance_480x640_vs_scipy", alone["scipy"], "at-least", 8)
    if cv2 is not None:
        bar("distance_480x640_vs_opencv", alone["OpenCV"], "at-least", 3)
    if real is not None:
        bar("sample_coco_vs_naive_b", real["naive B"], "at-least", 12)
    else:
        print(f"{MASKS} is not there: no row for COCO")
    finish()


if __name__ == "__main__":
    main()
