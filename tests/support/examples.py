"""Examples, batches and label tables in memory: nothing on disk, targets by the real kernels."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from preprocessing.labels import LabelTable
from preprocessing.panoptic_map import PanopticMap, Segment, measured
from preprocessing.sample import distances
from preprocessing.synthetic import CATEGORIES, SHAPES, draw_scene
from training.batch import Batch, Example, collate

RADIUS = 50
DISK, BOX, SKY, FIELD = (CATEGORIES.names.index(name) for name in ("disk", "box", "sky", "field"))
THING, CROWD, STUFF = Segment(0, DISK, True), Segment(0, BOX, True, is_crowd=True), Segment(0, SKY, False)


def table(things: int, stuff: int) -> LabelTable:
    """A label table of that many categories; dataset ids have gaps."""
    names = [(f"thing {i}", 1) for i in range(things)] + [(f"stuff {i}", 0) for i in range(stuff)]
    return LabelTable.from_coco({"id": 3 * i + 1, "name": n, "isthing": t} for i, (n, t) in enumerate(names))


def example_of(labels_HW: np.ndarray, segments: Sequence[Segment], key: str = "1", rgb: np.ndarray | None = None):
    """An Example of a map whose label i is segments[i - 1]; the picture is noise unless given."""
    labels_HW = np.ascontiguousarray(labels_HW, np.uint16)
    if rgb is None:
        rgb = np.random.default_rng(0).integers(0, 256, (*labels_HW.shape, 3), np.uint8)
    rows = tuple(measured(labels_HW, segments))
    return Example(key, rgb, labels_HW, distances(labels_HW, rows, RADIUS), rows)


def scene(seed: int, size: tuple[int, int] = (32, 32)) -> Example:
    """A synthetic scene: things, stuff, void, sometimes a crowd."""
    drawn = draw_scene(np.random.default_rng(seed), size)
    found = np.unique(drawn.label[drawn.label > 0])
    labels_HW = np.where(drawn.label > 0, np.searchsorted(found, drawn.label) + 1, 0)
    rows = [
        Segment(0, CATEGORIES.names.index(drawn.names[i]), drawn.names[i] in SHAPES, bool(i in drawn.crowds))
        for i in found
    ]
    return example_of(labels_HW, rows, str(seed), drawn.rgb.clip(0, 255).astype(np.uint8))


def scenes(count: int, size: tuple[int, int] = (32, 32), first: int = 0) -> list[Example]:
    """Scenes of consecutive seeds."""
    return [scene(seed, size) for seed in range(first, first + count)]


def of_all_kinds(size: tuple[int, int] = (32, 32)) -> Example:
    """Quarters: void, stuff, crowd, and stuff with a thing inside."""
    height, width = size
    labels_HW = np.zeros(size, int)
    labels_HW[: height // 2, width // 2 :] = 1
    labels_HW[height // 2 :, : width // 2] = 2
    labels_HW[height // 2 :, width // 2 :] = 3
    labels_HW[height * 5 // 8 : height * 7 // 8, width * 5 // 8 : width * 7 // 8] = 4
    return example_of(labels_HW, [STUFF, CROWD, Segment(0, FIELD, False), THING])


def whole(segment: Segment | None, size: tuple[int, int]) -> Example:
    """One segment, or void, everywhere."""
    return example_of(np.full(size, segment is not None), [segment] if segment else [])


def one_pixel(size: tuple[int, int]) -> Example:
    """A thing of one pixel in stuff."""
    labels_HW = np.ones(size, int)
    labels_HW[size[0] // 3, size[1] // 3] = 2
    return example_of(labels_HW, [STUFF, THING])


def odd(size: tuple[int, int]) -> dict[str, Example]:
    """What no data set has many of, and every method must bear."""
    return {
        "only void": whole(None, size),
        "only stuff": whole(STUFF, size),
        "only a crowd": whole(CROWD, size),
        "only a thing": whole(THING, size),
        "a thing of one pixel": one_pixel(size),
    }


def recast(example: Example, labels: LabelTable) -> Example:
    """The same picture with categories of another table; things stay things, stuff of one category is one segment."""
    of_kind = {kind: np.flatnonzero(labels.is_thing == kind) for kind in (True, False)}
    rows, label_N = [], [0]
    for s in example.segments:
        category = int(of_kind[s.is_thing][s.category % len(of_kind[s.is_thing])])
        known = [i for i, row in enumerate(rows, 1) if not s.is_thing and row.category == category]
        rows += [] if known else [replace(s, category=category)]
        label_N += known or [len(rows)]
    return example_of(np.array(label_N)[example.labels_HW], rows, example.key, example.image_HW3)


def truth(example: Example) -> PanopticMap:
    """What a perfect method would return."""
    return PanopticMap(example.labels_HW.astype(np.int32), example.segments)


def in_double(batch: Batch) -> Batch:
    """float64 areas and centroids, for references and gradcheck."""
    return replace(batch, area_BN=batch.area_BN.double(), centroid_BN2=batch.centroid_BN2.double())


def same_batches(left: Batch, right: Batch) -> bool:
    """Equal to the bit."""
    tensors = [name for name in vars(left) if name != "keys"]
    return left.keys == right.keys and all(torch.equal(getattr(left, n), getattr(right, n)) for n in tensors)


def batch_of(*examples: Example) -> Batch:
    """The examples as a batch."""
    return collate(examples)
