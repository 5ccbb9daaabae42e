"""PQ of 12 synthetic 480x640 maps, ours against panopticapi's core: `python -m benchmarks.pq`.

Single thread, CPU time, both sides alternating on the same image with the order flipped every round; the
figure is the median of the ratios. Ids are random 24-bit ones, as in COCO's files.

in_memory: ours compares two maps in memory; panopticapi can only read files, so it writes the prediction's
PNG first (not the ground truth's, which is a file already). from_png: both read both PNGs.
"""

import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from panopticapi.evaluation import PQStat, pq_compute_single_core

from benchmarks.bars import bar, finish
from evaluation.coco_files import read_entry, score_files, score_image
from evaluation.coco_format import annotation, png
from evaluation.pq import PQStats, compare
from preprocessing import rgb_ids
from preprocessing.labels import Category, LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment
from preprocessing.tree import Folder

os.environ["RAYON_NUM_THREADS"] = "1"  # before hotcoco starts its threads
try:
    import hotcoco.panoptic
except ImportError:
    hotcoco = None

SIZE, SEGMENTS, MAPS, ROUNDS = (480, 640), 20, 12, 5
T = TypeVar("T")
LABELS = LabelTable(tuple(Category(i + 1, str(i), i % 2 == 0, (0, 0, 0)) for i in range(8)))
CATEGORIES = {entry["id"]: entry for entry in LABELS.to_coco()}


@dataclass(frozen=True)
class Case:
    """One image: both maps in memory and as PNG files, and their rows of the JSON."""

    truth: PanopticMap
    prediction: PanopticMap
    folder: Path
    annotations: tuple[dict[str, Any], dict[str, Any]]

    def ours_in_memory(self) -> PQStats:
        return compare(self.truth, self.prediction, len(LABELS))

    def theirs_in_memory(self) -> PQStat:
        (self.folder / "prediction.png").write_bytes(png(self.prediction))
        return self.theirs_from_png()

    def ours_from_png(self) -> PQStats:
        pngs = Folder.on_disk(str(self.folder))
        truth, prediction = (read_entry(rows, self.folder, pngs, LABELS) for rows in self.annotations)
        return score_image(truth, prediction, len(LABELS))

    def theirs_from_png(self) -> PQStat:
        with redirect_stdout(io.StringIO()):  # it prints its progress
            return pq_compute_single_core(0, [self.annotations], self.folder, self.folder, CATEGORIES)


def make_case(rng: np.random.Generator, folder: Path) -> Case:
    labels_HW, category_N = _voronoi(rng), rng.integers(0, len(LABELS), SEGMENTS)
    guessed_N = np.where(rng.random(SEGMENTS) < 0.8, category_N, rng.integers(0, len(LABELS), SEGMENTS))
    truth = _panoptic(rng, labels_HW, category_N)
    prediction = _panoptic(rng, np.roll(labels_HW, (2, 5), (0, 1)), guessed_N)
    folder.mkdir()
    (folder / "truth.png").write_bytes(png(truth))
    (folder / "prediction.png").write_bytes(png(prediction))
    rows = annotation(truth, LABELS, 1, "truth.png"), annotation(prediction, LABELS, 1, "prediction.png")
    return Case(truth, prediction, folder, rows)


def _voronoi(rng: np.random.Generator) -> NDArray[np.int64]:
    """Labels 0..SEGMENTS - 1 of the nearest seed, with wavy edges; int64 (H, W)."""
    y_HW, x_HW = np.mgrid[: SIZE[0], : SIZE[1]].astype(np.float32)
    y_HW, x_HW = y_HW + 8 * np.sin(x_HW / 17), x_HW + 8 * np.sin(y_HW / 13)
    seeds = rng.random((SEGMENTS, 2)) * SIZE
    return np.argmin([(y_HW - y) ** 2 + (x_HW - x) ** 2 for y, x in seeds], axis=0)


def _panoptic(rng: np.random.Generator, labels_HW: NDArray[np.int64], category_N: NDArray[np.int64]) -> PanopticMap:
    """Random ids, the first label made void; areas counted, boxes left out."""
    ids_N = 1 + rng.choice(rgb_ids.MAX_ID, SEGMENTS, replace=False)
    ids_N[0] = 0
    areas = np.bincount(labels_HW.ravel(), minlength=SEGMENTS)
    rows = [
        Segment(int(ids_N[i]), int(category_N[i]), True, area=int(areas[i])) for i in range(1, SEGMENTS) if areas[i]
    ]
    return PanopticMap(ids_N.astype(np.int32)[labels_HW], tuple(rows))


def ratio(cases: list[T], ours: Callable[[T], object], theirs: Callable[[T], object]) -> float:
    """Median over cases and rounds of their CPU time divided by ours."""
    ratios = []
    for number in range(ROUNDS):
        for case in cases:
            order = (ours, theirs) if number % 2 else (theirs, ours)
            seconds = {side: _cpu_seconds(side, case) for side in order}
            ratios.append(seconds[theirs] / seconds[ours])
    return median(ratios)


def _cpu_seconds(side: Callable[[T], object], case: T) -> float:
    start = time.process_time()
    side(case)
    return time.process_time() - start


def difference(case: Case) -> float:
    """Largest difference of any of iou, tp, fp, fn of any category; also compiles the kernels."""
    ours, theirs = case.ours_from_png(), case.theirs_from_png()
    return max(
        abs(getattr(ours, name)[c] - getattr(theirs[category.dataset_id], name))
        for c, category in enumerate(LABELS.categories)
        for name in ("iou", "tp", "fp", "fn")
    )


def write_set(cases: list[Case], folder: Path) -> tuple[Path, Path]:
    """All cases as one set of files, as hotcoco reads it; image ids from 0."""
    jsons = folder / "truth.json", folder / "prediction.json"
    for side, path in enumerate(jsons):
        path.with_suffix("").mkdir(parents=True)
        rows = []
        for number, case in enumerate(cases):
            entry, name = case.annotations[side], f"{number}.png"
            rows.append({**entry, "image_id": number, "file_name": name})
            (path.with_suffix("") / name).write_bytes((case.folder / entry["file_name"]).read_bytes())
        images = [{"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]} for i in range(len(cases))]
        content = {"images": images, "annotations": rows, "categories": list(CATEGORIES.values())}
        path.write_text(json.dumps(content, default=int))  # panopticapi leaves numpy's integers in the rows
    return jsons


def against_hotcoco(truth: Path, prediction: Path) -> float:
    """hotcoco's CPU time (of one thread: RAYON_NUM_THREADS) for a set of files divided by ours."""
    folders = truth.with_suffix(""), prediction.with_suffix("")

    def ours(case: None) -> object:
        return score_files(truth, prediction, *folders)

    def theirs(case: None) -> object:
        with redirect_stdout(io.StringIO()):
            return hotcoco.panoptic.pq_compute(str(truth), str(prediction), str(folders[0]), str(folders[1]))

    summary, found = ours(None), theirs(None)
    assert abs(summary["pq"]["all"] - 100 * found["All"]["pq"]) < 1e-9
    return ratio([None] * 3, ours, theirs)


def main() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        cases = [make_case(rng, Path(folder) / str(number)) for number in range(MAPS)]
        bar("pq_difference_from_panopticapi", max(map(difference, cases)), "at-most", 1e-9)
        in_memory = ratio(cases, Case.ours_in_memory, Case.theirs_in_memory)
        bar("pq_in_memory_vs_panopticapi", in_memory, "at-least", 15)
        from_png = ratio(cases, Case.ours_from_png, Case.theirs_from_png)
        bar("pq_from_png_vs_panopticapi", from_png, "at-least", 4)
        if hotcoco is None:
            print("hotcoco is not installed here: without its row")
        else:
            bar("pq_from_png_vs_hotcoco", against_hotcoco(*write_set(cases, Path(folder) / "set")), "at-least", 0.8)
    finish()


if __name__ == "__main__":
    main()
